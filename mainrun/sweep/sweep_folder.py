"""The folder of a sweep: made whole or not at all, gone on with only by the same sweep.

It holds the search (`sweep.yaml`), what all trials share (`base.yaml`), and what the engines add:
the study or the address at W&B, the trials, the summary. Nothing outside is needed to go on.
"""

import contextlib
import math
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from mainrun import config
from mainrun.errors import RunFailed, UserError
from mainrun.folder import names
from mainrun.record import metrics, read_events
from mainrun.result import read_result
from mainrun.sweep import search_space, sweep_file, sweep_summary
from mainrun.sweep.metric import Metric
from mainrun.sweep.search_space import SearchSpace
from mainrun.sweep.study import Outcome, Study, Trial
from mainrun.sweep.sweep_summary import Ending, Report

WANDB_ADDRESS = "wandb.json"
"""The file that says which sweep of W&B's this is; a folder without it has a study of its own."""


@dataclass(frozen=True)
class Sweep:
    """A sweep folder and what stands in it from the start."""

    folder: Path
    space: SearchSpace
    base: config.Config

    def base_path(self) -> Path:
        return self.folder / "base.yaml"

    def run_dir(self, trial: Trial) -> Path:
        return self.folder / "trials" / f"trial-{trial.number:03}"


def load(folder: Path) -> Sweep:
    """The sweep in the folder. UserError where there is none."""
    path = folder / "sweep.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is no sweep folder: it has no sweep.yaml")
    return Sweep(folder, sweep_file.read(path), config.load(folder / "base.yaml"))


def open_folder(
    source: Path,
    space: SearchSpace,
    run_dir: Path | None,
    files: Mapping[str, str] = MappingProxyType({}),
) -> Sweep:
    """The sweep in `run_dir`, new or the same as asked for. UserError where it is another.

    A new one is checked first: nothing is made for a search that cannot work.
    """
    base = search_space.base_config(space)
    if run_dir is not None and run_dir.exists():
        stored = load(run_dir)
        if not space.is_same_search(stored.space):
            other = f"searches another space than {source}"
        elif base != stored.base:
            other = f"varies another config: `{_first_difference(base, stored.base)}` differs"
        else:
            return stored
        raise UserError(
            f"{run_dir} {other}: go on with `{go_on_command(run_dir)}`, or choose another --run-dir"
        )
    search_space.check(space)
    contents = {
        "base.yaml": search_space.base_yaml(space),
        "sweep.yaml": yaml.safe_dump(
            sweep_file.definition(space), sort_keys=False, allow_unicode=True
        ),
        **files,
    }
    folder = _make(run_dir, source.stem, contents)
    return Sweep(folder, space, base)


def report(
    made: Sweep, study: Study, status: Ending, reason: str | None, *, result: bool = False
) -> None:
    """Writes the summary of a sweep that has its study here; with `result`, prints it as well."""
    trials = study.trials()
    run_dirs = {t.number: made.run_dir(t) for t in trials}
    found = Report(
        folder=made.folder,
        space=made.space,
        status=status,
        reason=reason,
        trials=trials,
        wanted=study.wanted(),
        run_dirs={number: path for number, path in run_dirs.items() if path.is_dir()},
        resume_command=None if status == "finished" else go_on_command(made.folder),
    )
    tell(found, result=result)


def tell(report: Report, *, result: bool) -> None:
    """Writes the summary; with `result`, prints it as well."""
    try:
        found = sweep_summary.write(report)
    except OSError as error:
        raise RunFailed(f"{error.filename}: cannot write: {error.strerror}") from error
    if result:
        with contextlib.suppress(OSError):
            sys.stdout.write("".join(f"{line}\n" for line in sweep_summary.result_lines(found)))
            sys.stdout.flush()


def outcome_of(run_dir: Path, metric: Metric) -> Outcome:
    """What the run in the folder came to, by its record; `running` where it was interrupted."""
    events = read_events(run_dir / "events.jsonl")
    told = read_result(run_dir, events)
    seconds = float(told["total_seconds"])
    match told["status"]:
        case "stopped":
            return Outcome("running", seconds=seconds)
        case "failed":
            return Outcome("failed", seconds=seconds, reason=told["reason"])
    return _best(events, metric, Outcome("finished", seconds=seconds))


def pruned(run_dir: Path, metric: Metric, reason: str) -> Outcome:
    """What the run in the folder came to before it was stopped for this reason."""
    events = read_events(run_dir / "events.jsonl")
    seconds = float(read_result(run_dir, events)["total_seconds"])
    return _best(events, metric, Outcome("pruned", seconds=seconds, reason=reason))


def timed(outcome: Outcome, run_dir: Path) -> Outcome:
    """The outcome with the seconds that the run in the folder took."""
    told = read_result(run_dir, read_events(run_dir / "events.jsonl"))
    return replace(outcome, seconds=float(told["total_seconds"]))


def _best(events: Sequence[Mapping[str, Any]], metric: Metric, ending: Outcome) -> Outcome:
    """The ending with the best evaluation; failed where there is none."""
    rows = [r for r in metrics(events) if math.isfinite(r.get(metric.name, math.nan))]
    if not rows:
        return replace(ending, status="failed", reason=f"{metric.name} was never a number")
    choose = min if metric.goal == "minimize" else max
    row = choose(rows, key=lambda row: row[metric.name])
    stderr = row.get("val/loss_stderr", math.nan) if metric.name == "val/loss" else math.nan
    return replace(
        ending,
        value=float(row[metric.name]),
        stderr=float(stderr) if math.isfinite(stderr) else None,
        step=int(row["step"]),
    )


def go_on_command(folder: Path) -> str:
    return shlex.join(["mainrun", "sweep", str(folder)])


def _make(run_dir: Path | None, name: str, contents: Mapping[str, str]) -> Path:
    """A new folder of these files, whole or not at all."""
    path = run_dir or next(path for path in names(name) if not path.exists())
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for file, text in contents.items():
            (partial / file).write_text(text, encoding="utf-8")
        partial.rename(path)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path}: cannot be made ({error.strerror}); see --run-dir") from error
    return path


def _first_difference(one: config.Config, other: config.Config) -> str:
    """The dotted path of a setting that differs."""
    ours, theirs = (config.leaves(config.as_dict(x)) for x in (one, other))
    return next(
        path
        for path in [*ours, *theirs]
        if path not in ours or path not in theirs or ours[path] != theirs[path]
    )
