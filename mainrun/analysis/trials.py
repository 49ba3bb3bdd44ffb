"""A sweep as a report reads it: the search in `sweep.yaml`, the trials in `trials.csv`, their runs.

Both engines leave these files, so which of them worked is not asked, and the study, which only one
process may open, is not touched. What a status is called is the engine's: one that is not known
here is shown as it stands. A run folder that the table does not have yet is a trial in progress.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mainrun import yaml12
from mainrun.analysis import run_folder
from mainrun.analysis.run_folder import Run
from mainrun.errors import UserError
from mainrun.sweep import sweep_file
from mainrun.sweep.distribution import Choices, Fixed, Interval, Multiples
from mainrun.sweep.search_space import SearchSpace


@dataclass(frozen=True)
class Trial:
    number: int
    status: str
    value: float | None
    """Of the metric, at its best; of a trial that was cut short, as far as it came."""
    stderr: float | None
    step: int | None
    seconds: float | None
    values: Mapping[str, Any]
    reason: str
    folder: Path | None

    @property
    def is_finished(self) -> bool:
        """Whether its value is a result."""
        return self.status == "finished" and self.value is not None

    @cached_property
    def run(self) -> Run | None:
        """None where it has no record, or none that can be read."""
        if self.folder is None:
            return None
        try:
            return run_folder.read(self.folder)
        except (UserError, OSError):
            return None


@dataclass(frozen=True)
class Parameter:
    """What a sweep varies, and how its values lie on an axis."""

    name: str
    is_numeric: bool
    is_log: bool
    levels: tuple[Any, ...]
    """Its values, in the file's order, where they are listed, or where they are no numbers."""
    bounds: tuple[float, float] = (0.0, 1.0)
    """Of a numeric one: the range that was searched, and what was seen beyond it."""

    def place(self, value: Any) -> float:
        """Where the value stands: itself, or the number of its level."""
        return float(value) if self.is_numeric else float(level_of(self.levels, value))


@dataclass(frozen=True)
class Sweep:
    folder: Path
    space: SearchSpace
    trials: Sequence[Trial]
    told: Mapping[str, Any]
    """The engine's `summary.json`; empty where there is none yet."""

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def status(self) -> str:
        return str(self.told.get("status") or "running")

    def ranking(self) -> list[Trial]:
        """The finished trials, the best first, the first of equals before others."""
        sign = 1.0 if self.space.metric.goal == "minimize" else -1.0
        finished = [trial for trial in self.trials if trial.is_finished]
        return sorted(finished, key=lambda trial: sign * (trial.value or 0.0))

    @cached_property
    def parameters(self) -> list[Parameter]:
        """Those that are varied, in the file's order."""
        return [_parameter(name, self) for name in self.space.varied()]


def read(folder: Path) -> Sweep:
    """Raises UserError where there is no sweep, or its table is not one."""
    space = sweep_file.read(folder / "sweep.yaml")
    table = folder / "trials.csv"
    listed = _table(table, space, folder) if table.is_file() else []
    return Sweep(folder, space, [*listed, *_in_progress(folder, space, listed)], _summary(folder))


def level_of(levels: Sequence[Any], value: Any) -> int:
    """The place of the value: 1, 1.0 and true are three different ones."""
    return [_text(level) for level in levels].index(_text(value))


def _table(path: Path, space: SearchSpace, folder: Path) -> list[Trial]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [_trial(row, space, folder) for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError, csv.Error, OSError) as error:
        raise UserError(f"{path}: not a sweep's table of trials ({error!r})") from error


def _trial(row: Mapping[str, str], space: SearchSpace, folder: Path) -> Trial:
    value, step = _float(row[space.metric.name]), _float(row["step"])
    return Trial(
        number=int(row["trial"]),
        status=row["status"],
        value=value,
        stderr=_float(row["stderr"]),
        step=None if step is None else int(step),
        seconds=_float(row["seconds"]),
        values={name: yaml12.parse(row[name]) for name in space.parameters},
        reason=row["reason"],
        folder=_folder(row["run_dir"], folder),
    )


def _folder(written: str, sweep: Path) -> Path | None:
    """Where the trial's run lies now: the sweep may have been moved since it was written."""
    if not written:
        return None
    found = (sweep / "trials" / Path(written).name, Path(written))
    return next((path for path in found if run_folder.is_run(path)), None)


def _in_progress(folder: Path, space: SearchSpace, listed: Sequence[Trial]) -> list[Trial]:
    known = {trial.folder.resolve() for trial in listed if trial.folder is not None}
    records = sorted((folder / "trials").glob("*/events.jsonl"))
    new = [r.parent for r in records if r.parent.resolve() not in known]
    number = max((trial.number for trial in listed), default=0)
    trials = []
    for place, path in enumerate((p for p in new if not p.name.startswith(".")), start=1):
        try:
            settings = run_folder.read(path).settings
        except UserError:
            continue
        values = {name: _setting(settings, name) for name in space.parameters}
        trials.append(Trial(number + place, "running", None, None, None, None, values, "", path))
    return trials


def _setting(settings: Mapping[str, Any], name: str) -> Any:
    """The value under a dotted path; the mapping of those below it where it is one."""
    if name in settings:
        return settings[name]
    below = {k.removeprefix(f"{name}."): v for k, v in settings.items() if k.startswith(f"{name}.")}
    return below or None


def _summary(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _parameter(name: str, sweep: Sweep) -> Parameter:
    distribution = sweep.space.parameters[name]
    seen = [trial.values[name] for trial in sweep.trials if trial.value is not None]
    listed = list(distribution.values) if isinstance(distribution, Choices) else []
    values = [*listed, *seen]
    if not values or not all(map(_is_number, values)):
        return Parameter(name, False, False, _distinct(values))
    low, high = min(values), max(values)
    log = False
    match distribution:
        case Interval(low=least, high=most, log=log):
            low, high = min(low, least), max(high, most)
        case Multiples(log=log):
            low, high = (
                min(low, distribution.at(distribution.first)),
                max(high, distribution.at(distribution.last)),
            )
        case Choices():  # 16, 64, 256 are equal steps to whoever chose them
            log = low > 0 and high / low >= 10
        case Fixed():
            raise AssertionError("it is not varied")
        case _:
            low, high = min(low, distribution.low), max(high, distribution.high)
    levels = _distinct(listed) if listed else ()
    return Parameter(name, True, log and low > 0, levels, (float(low), float(high)))


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple({_text(value): value for value in values}.values())


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _float(text: str) -> float | None:
    """None for nothing, and for what is no number."""
    value = float(text) if text else math.nan
    return value if math.isfinite(value) else None
