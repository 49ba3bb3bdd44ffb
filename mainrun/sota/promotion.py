"""From finished runs to `config/sota/NAME.yaml`: the shipped file they are near to, and a result.

The file is for a public repository: no path of this machine, no run folder, no account stands in
it. Nothing is written before all that it says has been looked at, and its check has been run.
"""

import os
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from mainrun import config as configs
from mainrun import probe, yaml12
from mainrun.config import Config
from mainrun.config.trees import merge
from mainrun.errors import RunFailed, UserError
from mainrun.promoted import Check, Result
from mainrun.sota import check, difference, evidence
from mainrun.sota.evidence import Evidence

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_HEADER = "# Promoted by `mainrun promote`: what these settings came to stands in `result`.\n"

Tell = Callable[[str], None]


def promote(
    folders: Sequence[Path], name: str, root: Path, overrides: Sequence[str], tell: Tell
) -> Path:
    """The file in `root`/sota, which is made; the same file again is left as it is.

    `overrides` are the check's own, instead of those that fit the config. UserError, with nothing
    written, for runs that are no evidence or a name that is taken.
    """
    path = _path(name, root)
    runs = evidence.read(folders)
    config = evidence.without_machine(runs[0].config)
    base, settings = difference.nearest(config, root)
    tree: dict[str, Any] = {"extends": os.path.relpath(base, path.parent), **settings}
    words = tuple(overrides) or check.overrides(config, runs[0].started["parameters"])
    if path.exists() and _is_of(path, tree, runs, words):
        tell(f"{path} is of these runs already: nothing is left to do")
        return path
    if path.exists():
        raise UserError(f"{path} exists: choose another name, or remove it first")
    for run in runs:
        if run.measured.commit is None or run.measured.dirty:
            tell(f"{run.measured.run} was made with code that is in no commit: the file says so")
    tell(f"training the check: {shlex.join(words)}")
    checked = check.made(_loaded(base, tree, config, words), words)
    text = _text(tree, _result(runs, checked))
    evidence.check_public(text)
    _write(path, text)
    return path


def summary(path: Path) -> list[str]:
    """What was promoted, for a person."""
    result = check.read(path)
    error = "" if result.standard_error is None else f" ± {result.standard_error:.4f}"
    over = f"{len(result.runs)} seeds" if len(result.runs) > 1 else "documents, of one seed"
    return [
        f"{result.metric} {result.mean:.4f}{error} {result.unit} (standard error over {over})",
        f"check: {result.check.value:.5f} after {shlex.join(result.check.overrides)}",
        str(path),
    ]


def _path(name: str, root: Path) -> Path:
    if not _NAME.fullmatch(name):
        raise UserError(
            f"{name!r} is no name for a config: letters, digits, - and _, at most 64, beginning "
            "with a letter or digit"
        )
    path = root / "sota" / f"{name}.yaml"
    try:
        probe.check(path)
    except OSError as error:
        raise UserError(
            f"{root} cannot be written ({error.strerror}): promote in a checkout of the repository"
        ) from error
    return path


def _loaded(base: Path, tree: dict[str, Any], config: Config, words: Sequence[str]) -> Config:
    """What the file will load as, with the check's overrides. UserError where they do not fit."""
    source = configs.read(base)
    settings = {name: value for name, value in tree.items() if name != "extends"}
    merged = configs.Source(merge(source.tree, settings), {})
    assert configs.as_dict(merged.load()) | {"tracking": None} == (
        configs.as_dict(config) | {"tracking": None}
    )
    return merged.load(words)


def _result(runs: Sequence[Evidence], checked: Check) -> Result:
    first = runs[0]
    mean, error = evidence.mean_and_error(runs)
    return Result(
        metric="val/loss",
        unit="nats per character",
        mean=mean,
        standard_error=error,
        standard_error_over="seeds" if len(runs) > 1 else "documents",
        runs=tuple(run.measured for run in runs),
        coverage=first.evaluation["val/tokens"] / first.started["val_tokens"],
        validation_tokens=first.started["val_tokens"],
        parameters=first.started["parameters"],
        trained_parameters=first.told["trained_parameters"],
        steps=first.told["steps"],
        tokens_seen=first.told["tokens_seen"],
        data=_of_data(first.config.data.source),
        command=shlex.join(evidence.public_command(first.environment["command"])),
        versions=evidence.versions(runs),
        check=checked,
    )


def _of_data(source: str) -> str | None:
    if source.startswith("file:"):
        return (
            "a file that is not in this repository; data_fingerprint tells whether yours is the "
            "same, and data.source=file:PATH names it"
        )
    if source == "python-docs":
        return "the docstrings of the Python in `versions`; another Python has another text"
    return None


def _is_of(
    path: Path, tree: dict[str, Any], runs: Sequence[Evidence], words: Sequence[str]
) -> bool:
    """Whether the file says what would be promoted now; its check is taken as it stands."""
    stored, _ = yaml12.read(path)
    if "result" not in stored:
        return False
    was = check.read(path)
    now = _result(runs, was.check)
    settings = {name: value for name, value in stored.items() if name != "result"}
    return settings == tree and was == now and was.check.overrides == tuple(words)


def _text(tree: dict[str, Any], result: Result) -> str:
    whole = {**tree, "result": _plain(asdict(result))}
    return _HEADER + yaml.dump(
        whole, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100
    )


class _Dumper(yaml.SafeDumper):
    """Quotes a text that our reader would take for a number, such as the run name `1e5`."""


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    is_text = _reads_as(text) == text
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if is_text else "'")


_Dumper.add_representer(str, _text_node)


def _reads_as(text: str) -> Any:
    try:
        return yaml12.parse(text)
    except ValueError:
        return text  # PyYAML sees for itself that it must be quoted


def _plain(value: Any) -> Any:
    """Tuples as lists, which YAML has."""
    match value:
        case dict():
            return {name: _plain(inner) for name, inner in value.items()}
        case tuple() | list():
            return [_plain(inner) for inner in value]
        case _:
            return value


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        os.link(partial, path)  # a name that was taken meanwhile is not overwritten
    except FileExistsError:
        raise UserError(f"{path} exists: choose another name, or remove it first") from None
    except OSError as error:
        raise RunFailed(f"{path}: cannot write: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
