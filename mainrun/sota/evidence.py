"""What runs of one config came to, as a promoted file says it; what is no evidence is refused.

A seed decides order and split of the text, so two seeds' fingerprints differ even on one corpus.
That it is one is seen by reading the source again: each run's fingerprint must come out.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path, PurePath
from statistics import mean, stdev
from typing import Any

from mainrun import config as configs
from mainrun import run_config
from mainrun.config import Config
from mainrun.data import sources
from mainrun.errors import UserError
from mainrun.promoted import Measured
from mainrun.record import Row, metrics, read_events
from mainrun.result import by_loss, last_event, read_result

_OF_THE_START = ("parameters", "steps_per_epoch", "train_tokens", "val_tokens")
"""What a promoted file needs of the event `run_started`."""


@dataclass(frozen=True, eq=False)
class Evidence:
    """One finished run."""

    config: Config
    measured: Measured
    environment: Mapping[str, Any]
    started: Mapping[str, Any]
    told: Mapping[str, Any]
    evaluation: Row
    """The best, whose parameters the run has kept."""


def read(folders: Sequence[Path]) -> list[Evidence]:
    """Of run folders, or of a sweep's best trial; by seed. UserError for what is no evidence."""
    runs = [_run(run_dir) for run_dir in _run_dirs(folders)]
    runs.sort(key=lambda run: run.config.seed)
    for run in runs[1:]:
        _check_alike(runs[0], run)
    for one, other in pairwise(runs):
        if one.config.seed == other.config.seed:
            raise UserError(
                f"{one.measured.run} and {other.measured.run} both have seed={one.config.seed}: "
                "name one of them, or runs of different seeds"
            )
    for run in runs:
        _check_data(run)
    return runs


def mean_and_error(runs: Sequence[Evidence]) -> tuple[float, float | None]:
    """Of the values; the error is that of the mean over seeds, or the only evaluation's own."""
    values = [run.measured.value for run in runs]
    if len(values) == 1:
        return values[0], runs[0].measured.stderr_over_documents
    return mean(values), stdev(values) / math.sqrt(len(values))


def versions(runs: Sequence[Evidence]) -> dict[str, str]:
    """Of Python and the packages; of several, all, where the runs had not the same."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        packages = {"python": run.environment["python"], **run.environment["packages"]}
        for name, version in packages.items():
            if version is not None:
                found.setdefault(name, {})[version] = None
    return {name: ", ".join(those) for name, those in found.items()}


def public_source(source: str) -> str:
    """The source without the folders of this machine: a file that lies elsewhere is its name."""
    kind, _, rest = source.partition(":")
    return f"file:{_public_path(rest)}" if kind == "file" else source


def public_command(words: Sequence[str]) -> list[str]:
    """A command without the run's folder and the paths of this machine."""
    root = configs.default_config_root()
    shown: list[str] = []
    is_folder = False
    for word in words:
        if is_folder or word == "--run-dir" or word.startswith("--run-dir="):
            is_folder = word == "--run-dir"
            continue
        name, equals, value = word.rpartition("=")
        if value.startswith("file:"):
            value = public_source(value)
        elif Path(value).is_absolute() and Path(value).is_relative_to(root):
            value = str(Path("config") / Path(value).relative_to(root))
        else:
            value = _public_path(value)
        shown.append(f"{name}{equals}{value}")
    return shown


def _public_path(text: str) -> str:
    path = PurePath(text)
    is_elsewhere = path.is_absolute() or ".." in path.parts or text.startswith("~")
    return path.name if is_elsewhere else text


def _run_dirs(folders: Sequence[Path]) -> list[Path]:
    found: dict[Path, Path] = {}
    for path in folders:
        run_dir = _best_trial(path) if (path / "sweep.yaml").is_file() else path
        found[run_dir.resolve()] = run_dir
    return list(found.values())


def _best_trial(sweep: Path) -> Path:
    try:
        best = json.loads((sweep / "summary.json").read_text(encoding="utf-8"))["best"]
    except (OSError, ValueError, KeyError, TypeError):
        best = None
    if not best:
        raise UserError(f"{sweep} has no finished trial yet: go on with `mainrun sweep {sweep}`")
    # Where it lay when it ended; the sweep may have moved since.
    run_dir = sweep / "trials" / PurePath(best["run_dir"] or "none").name
    if not run_dir.is_dir():
        raise UserError(
            f"trial {best['trial']} of {sweep} has left no run folder: train it again with "
            f"`mainrun train {sweep}/best.yaml`, and promote that run"
        )
    return run_dir


def _run(run_dir: Path) -> Evidence:
    config = run_config.load(run_dir)
    events = read_events(run_dir / "events.jsonl")
    told = read_result(run_dir, events)
    name = run_dir.resolve().name
    if config.training.init_from is not None:
        raise UserError(
            f"{run_dir} starts from another run (training.init_from), which a config does not "
            "hold: promote a run that starts from nothing"
        )
    if told["status"] != "finished":
        raise UserError(f"{run_dir} is {told['status']}: only a finished run can be promoted")
    if moved := run_config.moved(run_dir, events):
        raise UserError(
            f"{run_dir} was resumed with {', '.join(moved)}: no one config makes its result; "
            "promote a run made in one piece"
        )
    rows = metrics(events)
    evaluations = [row for row in rows if "val/loss" in row]
    losses = [row[n] for row in rows[-1:] for n in ("train/loss", "val/loss") if n in row]
    if not evaluations or not all(map(math.isfinite, losses)):
        raise UserError(f"{run_dir} ended with a loss that is no number: it cannot be promoted")
    if len(evaluations) > 1 and not evaluations[-1]["val/loss"] < evaluations[0]["val/loss"]:
        raise UserError(
            f"{run_dir} diverged: val/loss went from {evaluations[0]['val/loss']:.3f} to "
            f"{evaluations[-1]['val/loss']:.3f}"
        )
    started, best = last_event(events, "run_started"), min(evaluations, key=by_loss)
    lost = [name for name in _OF_THE_START if name not in started]
    lost += [name for name in ("val/tokens",) if name not in best]
    if lost:
        raise UserError(f"{run_dir} is no evidence: its record no longer says {', '.join(lost)}")
    if best["val/tokens"] != started["val_tokens"]:
        raise UserError(
            f"{run_dir} scored {best['val/tokens']:,} of {started['val_tokens']:,} tokens of its "
            "validation text: evaluate all of it"
        )
    environment = _environment(run_dir)
    stderr = best.get("val/loss_stderr", math.nan)
    measured = Measured(
        run=name,
        seed=config.seed,
        value=float(best["val/loss"]),
        stderr_over_documents=float(stderr) if math.isfinite(stderr) else None,
        step=int(best["step"]),
        data_fingerprint=environment["data_fingerprint"],
        commit=environment["commit"],
        dirty=environment["dirty"],
        device=environment["devices"][0],
        date=datetime.fromisoformat(events[-1]["timestamp"]).date().isoformat(),
    )
    return Evidence(config, measured, environment, started, told, best)


def _environment(run_dir: Path) -> dict[str, Any]:
    """What the run was made with. Resumed elsewhere, it is no longer one commit and one device."""
    path = run_dir / "environment.json"
    try:
        first: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    for later in first.get("resumed", []):
        for name in ("commit", "devices"):
            if later[name] != first[name]:
                raise UserError(
                    f"{run_dir} was resumed with another {name.removesuffix('s')} than it began "
                    "with: promote a run made in one piece"
                )
    return first


def _check_alike(first: Evidence, other: Evidence) -> None:
    ours, theirs = (configs.leaves(configs.as_dict(run.config)) for run in (first, other))
    for path in dict.fromkeys([*ours, *theirs]):
        if not configs.is_effect(path) or ours.get(path) == theirs.get(path):
            continue
        raise UserError(
            f"{first.measured.run} and {other.measured.run} are runs of different configs: "
            f"`{path}` is {ours.get(path)} and {theirs.get(path)}"
        )


def _check_data(run: Evidence) -> None:
    """UserError where the source, read again, is not what the run was trained on."""
    found = sources.fingerprint(sources.documents(run.config.data, run.config.seed))
    if found != run.measured.data_fingerprint:
        raise UserError(
            f"data.source={run.config.data.source} is not what {run.measured.run} was trained on "
            f"(fingerprint {found[:12]}, not {run.measured.data_fingerprint[:12]}): it could not "
            "be reproduced, nor be one with runs on other data"
        )


def without_machine(config: Config) -> Config:
    """The config as it may be published: of a file elsewhere only its name."""
    source = public_source(config.data.source)
    return replace(config, data=replace(config.data, source=source))


_ABSOLUTE = re.compile(r"(?<![\w.:/])/(?:[\w.-]+/)+[\w.-]*")


def check_public(text: str) -> None:
    """UserError where a path of this machine would be published."""
    if found := _ABSOLUTE.search(text):
        raise UserError(
            f"the promoted file would name a path of this machine, {found[0]}: train with a path "
            "relative to the checkout"
        )
