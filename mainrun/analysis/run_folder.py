"""A run as a report reads it: its record, its settings, what it ran on. Nothing is written.

A run may be going on while it is read, may have failed in its first second, and may be of a version
whose settings are no longer known: whatever can be read is told.
"""

import contextlib
import fcntl
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from mainrun import config, run_config, yaml12
from mainrun.errors import UserError
from mainrun.record import Number, Row, metrics, read_events
from mainrun.result import last_event, read_result, warm_rows


@dataclass(frozen=True)
class Run:
    folder: Path
    events: Sequence[Mapping[str, Any]]
    rows: Sequence[Row]
    result: Mapping[str, Any]
    """As `summary.json` has it; its status may also be `running`."""
    settings: Mapping[str, Any]
    """By dotted path, with what resumes changed: such a run is no run of its last config alone.

    None where the config cannot be read.
    """
    environment: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.result["name"])

    @property
    def status(self) -> str:
        return str(self.result["status"])

    @property
    def best(self) -> Mapping[str, Any] | None:
        """Step, value and standard error of the best evaluation; the value may be null."""
        found: Mapping[str, Any] | None = self.result["val/loss"]["best"]
        return found

    @property
    def last(self) -> Mapping[str, Any] | None:
        found: Mapping[str, Any] | None = self.result["val/loss"]["last"]
        return found

    @cached_property
    def started(self) -> Mapping[str, Any]:
        return last_event(self.events, "run_started")

    @cached_property
    def warm(self) -> list[Row]:
        """The rows of trained steps, less the first of each process."""
        return warm_rows(self.events, self.rows)

    @property
    def peak_bytes(self) -> int | None:
        """As the device counted it; else as the compiler did."""
        return self.result["peak_memory_bytes"] or self.started.get("step_bytes")

    @property
    def tokens_per_step(self) -> float | None:
        tokens, steps = self.result["tokens_seen"], self.result["steps"]
        return tokens / steps if tokens and steps else None

    def span(self) -> tuple[datetime, datetime] | None:
        """When the first and the last event were logged."""
        if not self.events:
            return None
        first, last = (datetime.fromisoformat(self.events[i]["timestamp"]) for i in (0, -1))
        return first, last


def is_run(folder: Path) -> bool:
    return (folder / "events.jsonl").is_file()


def read(folder: Path) -> Run:
    """Raises UserError where there is no run."""
    record = folder / "events.jsonl"
    if not record.is_file():
        if (folder / "checkpoints").is_dir():
            raise UserError(
                f"{folder} has lost its record, events.jsonl: `mainrun resume {folder}` begins "
                "another with what its checkpoints hold"
            )
        raise UserError(
            f"{folder} is no run folder: it has no events.jsonl; name a folder under runs/"
        )
    events = read_events(record)
    result = read_result(folder, events)
    if _is_being_written(record):
        result |= {"status": "running", "reason": None, "resume_command": None}
    return Run(
        folder, events, metrics(events), result, _settings(folder, events), _environment(folder)
    )


def percentiles(rows: Sequence[Row], name: str) -> tuple[Number, Number, Number] | None:
    """What 5, 50 and 95 percent of the values do not exceed."""
    values = sorted(row[name] for row in rows if math.isfinite(row.get(name, math.nan)))
    if len(values) < 2:
        return (values[0],) * 3 if values else None
    cuts = statistics.quantiles(values, n=20, method="inclusive")
    return cuts[0], cuts[9], cuts[18]


def _is_being_written(record: Path) -> bool:
    """Whether a process has the record open; it holds the file's lock as long as it lives.

    Asking takes a shared lock for a moment: a run that were resumed just then would be refused.
    """
    with record.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def _settings(folder: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    try:
        settings = config.leaves(config.as_dict(run_config.load(folder, events=events)))
        if moved := run_config.moved(folder, events):
            settings["changed on resume"] = ", ".join(moved)
        return settings
    except UserError as error:  # edited, or of another version: then as it is written
        with contextlib.suppress(UserError):
            settings = config.leaves(yaml12.read(folder / "config.yaml")[0])
            return settings | {"config.yaml": str(error)}
    return {}


def _environment(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
