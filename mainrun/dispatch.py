"""What somebody typed on the GitHub page, made into a request, or refused in one line.

Inputs come as environment variables (`INPUT_CONFIG` and so on) and are looked at here, never by a
shell. Whatever passes names a file of this checkout, settings that the config's schema accepts, or
a run on this machine; it reaches the container as a list of arguments.
"""

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mainrun import config, host, snapshot
from mainrun.errors import UserError
from mainrun.host import Host
from mainrun.request import Request, chosen_gpus

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}")
_KEY = re.compile(r"(?:--)?[A-Za-z_][A-Za-z0-9_.]{0,127}")
_SWEEP_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*(/[A-Za-z0-9][A-Za-z0-9_.-]*){0,2}")
_NUMBER = re.compile(r"[1-9][0-9]{0,19}")
_MOST_CHARACTERS = 4096
_MOST_TRIALS = 10_000


@dataclass(frozen=True)
class Inputs:
    """A dispatch, each input by itself beyond doubt."""

    task: str
    """train, resume or sweep."""
    file: str
    """Config or search space, from the root of the repository; empty for what is resumed."""
    overrides: tuple[str, ...]
    resume: str
    """Name of a run on this machine's disk; empty: a new one."""
    artifact: str
    """Number of the workflow run whose artifact holds the run to be resumed; empty: none."""
    gpus: str
    count: int | None
    """Trials that a sweep has in the end; None: as many as its file says."""
    backend: str
    sweep_id: str


def inputs_from(env: Mapping[str, str]) -> Inputs:
    """The inputs of a dispatch. Raises UserError naming the input and what it may be."""
    asked = _one_of(env, "task", ("train", "sweep"), default="train")
    resume = _matching(env, "resume", _RUN_NAME, "the name of a run folder")
    artifact = _matching(env, "resume_artifact", _NUMBER, "the number of a workflow run")
    if resume and artifact:
        raise UserError("resume and resume_artifact are both given: one run is resumed at a time")
    resumed = bool(resume or artifact)
    modes = ("auto", "online", "offline", "disabled")
    inputs = Inputs(
        task="resume" if resumed and asked == "train" else asked,
        # What is resumed does what stands in its folder.
        file="" if resumed else _file(env, "sweep" if asked == "sweep" else "config"),
        overrides=(
            *_overrides(_text(env, "overrides")),
            *_tracking(_one_of(env, "tracking", modes, default="auto")),
        ),
        resume=resume,
        artifact=artifact,
        gpus=_gpus(_text(env, "gpus") or "auto"),
        count=_count(_text(env, "count")),
        backend=_one_of(env, "backend", ("auto", "local", "wandb"), default="auto"),
        sweep_id=_matching(env, "sweep_id", _SWEEP_ID, "the id of a sweep: ENTITY/PROJECT/ID"),
    )
    if inputs.task == "train":
        config.load(config.default_config_root().parent / inputs.file, inputs.overrides)
    return inputs


def request_from(env: Mapping[str, str], machine: Host | None = None) -> Request:
    """The job that GitHub's variables and the inputs make. Raises UserError.

    A run that comes in an artifact has no name yet: `resuming` gives it one.
    """
    inputs = inputs_from(env)
    machine = machine or host.load()
    if inputs.resume:
        _find_run(machine.runs_dir, inputs.resume)
    label = label_from(env)
    server, repository = env.get("GITHUB_SERVER_URL", ""), env.get("GITHUB_REPOSITORY", "")
    request = Request(
        task=inputs.task,
        words=(),
        label=label,
        image=f"mainrun:{env.get('GITHUB_SHA') or 'current'}",
        gpus=chosen_gpus(machine.gpus if inputs.gpus == "auto" else inputs.gpus),
        url=f"{server}/{repository}/actions/runs/{label.partition('-')[0]}" if repository else "",
        by=env.get("GITHUB_ACTOR", ""),
    )
    return named(request, inputs, inputs.resume or f"{Path(inputs.file).stem}-{label}")


def named(request: Request, inputs: Inputs, run: str) -> Request:
    """The request with the name of its run folder, and the words that follow from it."""
    folder = f"runs/{run}"
    match inputs.task:
        case "resume":
            words = [folder, *inputs.overrides]
        case "sweep" if not inputs.file:  # one that is gone on with
            words = [folder]
            words += ["--count", str(inputs.count)] if inputs.count is not None else []
        case "sweep":
            words = [inputs.file, "--run-dir", folder, "--backend", inputs.backend]
            words += ["--count", str(inputs.count)] if inputs.count is not None else []
            words += ["--id", inputs.sweep_id] if inputs.sweep_id else []
            words += inputs.overrides
        case _:
            words = [inputs.file, "--run-dir", folder, *inputs.overrides]
    return replace(request, words=tuple(words), run=run)


def is_run_name(name: str) -> bool:
    return bool(_RUN_NAME.fullmatch(name)) and ".." not in name


def label_from(env: Mapping[str, str]) -> str:
    """`<run id>-<attempt>` of the workflow run: the job's name on this machine."""
    label = f"{env.get('GITHUB_RUN_ID', '')}-{env.get('GITHUB_RUN_ATTEMPT', '')}"
    if not re.fullmatch(r"\d+-\d+", label):
        raise UserError("GITHUB_RUN_ID and GITHUB_RUN_ATTEMPT are not set: this is a workflow's")
    return label


def _text(env: Mapping[str, str], name: str) -> str:
    return env.get(f"INPUT_{name.upper()}", "").strip()


def _one_of(env: Mapping[str, str], name: str, accepted: tuple[str, ...], *, default: str) -> str:
    text = _text(env, name) or default
    if text not in accepted:
        raise UserError(f"{name}={_shown(text)}: accepted are {', '.join(accepted)}")
    return text


def _matching(env: Mapping[str, str], name: str, form: re.Pattern[str], what: str) -> str:
    text = _text(env, name)
    if text and (not form.fullmatch(text) or ".." in text):
        raise UserError(f"{name}={_shown(text)} is not {what}")
    return text


def _file(env: Mapping[str, str], name: str) -> str:
    """The file meant by `baseline`, `base/baseline` or `config/base/baseline.yaml`."""
    root = config.default_config_root().resolve()
    folder = root / "sweep" if name == "sweep" else root
    text = _text(env, name) or "quickstart"
    short = text.removeprefix("config/").removesuffix(".yaml")
    if _FILE.fullmatch(text) and ".." not in text:
        for place in (root / short, folder / short, root / "base" / short, root / "sota" / short):
            path = place.with_name(place.name + ".yaml").resolve()
            if path.is_file() and path.is_relative_to(folder):
                return f"config/{path.relative_to(root).as_posix()}"
    there = sorted(
        path.relative_to(root).as_posix()
        for path in folder.rglob("*.yaml")
        if path.name not in ("base.yaml", "host.yaml")
        and (name == "sweep" or path.relative_to(root).parts[0] != "sweep")
    )
    raise UserError(f"{name}={_shown(text)}: no such file in config/; there are {', '.join(there)}")


def _overrides(text: str) -> tuple[str, ...]:
    """`a.b=1 c='two words'` in its parts; quotes are the only thing with a meaning."""
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"overrides: at most {_MOST_CHARACTERS} characters, not {len(text)}")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UserError(f"overrides={_shown(text)}: {str(error).lower()}") from error
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not _KEY.fullmatch(key):
            raise UserError(f"overrides: {_shown(word)} is not key.path=value")
        if not value.isprintable():
            raise UserError(f"overrides: {_shown(word)} has a character that cannot be printed")
        if "{{" in word:
            raise UserError(f"overrides: {_shown(word)}: `{{{{` is a template to `task`")
    return tuple(words)


def _tracking(mode: str) -> list[str]:
    return [] if mode == "auto" else [f"tracking.wandb={mode}"]


def _gpus(text: str) -> str:
    try:
        return host.checked_gpus(text)
    except ValueError:
        accepted = "auto, all, none, or indices such as 0,1"
        raise UserError(f"gpus={_shown(text)}: accepted are {accepted}") from None


def _count(text: str) -> int | None:
    if not text:
        return None
    if not _NUMBER.fullmatch(text) or int(text) > _MOST_TRIALS:
        raise UserError(f"count={_shown(text)} is not a number of trials from 1 to {_MOST_TRIALS}")
    return int(text)


def _find_run(runs: Path, name: str) -> None:
    """UserError where there is no such folder; what is in it, the container finds out.

    The other names may be a container's making: those that no run has are not repeated.
    """
    if snapshot.is_folder(runs / name):
        return
    if os.path.lexists(runs / name):
        raise UserError(f"resume={name}: it is a link on this machine, or a file, and no run")
    folders = [path for path in runs.glob("[!.]*") if snapshot.is_folder(path)]
    newest = sorted(folders, key=lambda path: path.lstat().st_mtime, reverse=True)
    known = ", ".join([path.name for path in newest if is_run_name(path.name)][:5]) or "none"
    raise UserError(f"resume={name}: no such run on this machine; the newest are {known}")


def _shown(text: str) -> str:
    """What was typed, on one line and not too much of it."""
    return repr(text if len(text) <= 80 else text[:80] + "…")
