"""What a run came to, read from its record: losses, times, tokens, how it ended.

Also of a run that was stopped, failed, or died in its first second: what it did not live to say is
null. How it is told stands in `summary`.
"""

import math
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mainrun import config, run_config
from mainrun.errors import UserError
from mainrun.record import Number, Row, metrics

_ENDINGS = ("finished", "stopped", "failed")
_NO_LAST_WORD = "the process ended without a last word: killed, or the machine went down"


def read_result(run_dir: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `summary.json`: see `summary.write_summary` for the units."""
    started = last_event(events, "run_started")
    tracking = last_event(events, "tracking_started")
    rows = metrics(events)
    evaluations = [row for row in rows if "val/loss" in row]
    steps = int(rows[-1]["step"]) if rows else 0
    status, reason, again = _ending(events)
    settings = _settings(run_dir, events)
    now = {**started, **last_event(events, "resumed")}
    return {
        "name": started.get("name", run_dir.resolve().name),
        "run_dir": str(run_dir),
        "status": status,
        "reason": reason,
        "steps": steps,
        "total_steps": now.get("total_steps"),
        "changes": [change._asdict() for change in run_config.changes(events)],
        "val/loss": {
            "first": _point(evaluations[0]) if evaluations else None,
            "last": _point(evaluations[-1]) if evaluations else None,
            "best": _point(min(evaluations, key=by_loss)) if evaluations else None,
        },
        "last": _finite(rows[-1]) if rows else {},
        "parameters": started.get("parameters"),
        "trained_parameters": started.get("trained_parameters", started.get("parameters")),
        "tokens_seen": _tokens_seen(settings, started, steps),
        "device": now.get("device"),
        "precision": now.get("precision"),
        "compile_seconds": started.get("compile_seconds"),
        "training_seconds": _training_seconds(rows),
        "total_seconds": _total_seconds(events),
        "noise": _noise(settings, rows),
        "tokens_per_second": median(warm_rows(events, rows), "perf/tokens_per_second"),
        "peak_memory_bytes": max((row.get("perf/peak_memory_bytes", 0) for row in rows), default=0)
        or None,
        "resume_command": None if status == "finished" else again or resume_command(run_dir),
        "wandb": {
            "mode": tracking.get("wandb"),
            "id": tracking.get("wandb_id"),
            "url": tracking.get("wandb_url"),
        },
    }


def resume_command(run_dir: Path) -> str:
    """What was said at earlier resumes stands in the record, and need not be said again."""
    return shlex.join(["mainrun", "resume", str(run_dir)])


def last_event(events: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The last event of that name; without fields where there is none."""
    found: Mapping[str, Any] = {}
    for event in events:
        if event["event"] == name:
            found = event
    return found


def _processes(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of each process that worked on the run; a process begins with tracking_started."""
    processes: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "tracking_started" or not processes:
            processes.append([])
        processes[-1].append(event)
    return processes


def _ending(events: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str | None]:
    """Status, reason and resume command, as far as the last process came to say them."""
    for event in reversed(_processes(events)[-1] if events else []):
        if event["event"] in _ENDINGS:
            return event["event"], event.get("reason"), event.get("resume_command")
    return "failed", _NO_LAST_WORD, None


def by_loss(row: Row) -> Number:
    return row["val/loss"] if math.isfinite(row["val/loss"]) else math.inf


def _point(row: Row) -> dict[str, Any]:
    finite = _finite(row)
    return {
        "step": row["step"],
        "value": finite["val/loss"],
        "stderr": finite.get("val/loss_stderr"),
    }


def _finite(row: Row) -> dict[str, Number | None]:
    """The row as JSON has it: null for what is no number."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _tokens_seen(
    settings: config.Config | None, started: Mapping[str, Any], steps: int
) -> int | None:
    """Training tokens read, repeated ones counted again; padding is none.

    A step reads batch × context places. Packing whole documents leaves some of them empty: an
    epoch has no more tokens than the training split.
    """
    if settings is None or not {"train_tokens", "steps_per_epoch"} <= started.keys():
        return None
    places = steps * settings.training.batch_size * settings.data.context_length
    return min(places, round(started["train_tokens"] * steps / started["steps_per_epoch"]))


def _noise(settings: config.Config | None, rows: Sequence[Row]) -> dict[str, Number] | None:
    """The gradient noise scale, and the batch of as many tokens beside the one that was.

    It grows as the loss falls, often a hundredfold: the median over the steps stands for the run.
    """
    scale = median(rows, "noise/scale_tokens")
    if settings is None or scale is None:
        return None
    return {
        "median_scale_tokens": scale,
        "last_scale_tokens": next(
            row["noise/scale_tokens"] for row in reversed(rows) if "noise/scale_tokens" in row
        ),
        "suggested_batch_size": max(1, round(scale / settings.data.context_length)),
        "batch_size": settings.training.batch_size,
    }


def _settings(run_dir: Path, events: Sequence[Mapping[str, Any]]) -> config.Config | None:
    """The run's, as they are now; None where its config is not there, or can no longer be read."""
    try:
        return run_config.load(run_dir, events=events)
    except UserError:
        return None


def _training_seconds(rows: Iterable[Row]) -> Number:
    """Time in optimizer steps only; a step not recorded counts as the next one that was."""
    seconds, last = 0.0, 0.0
    for row in rows:
        if "perf/step_ms" in row:
            seconds += row["perf/step_ms"] / 1000 * (row["step"] - last)
            last = row["step"]
    return round(seconds, 3)


def _total_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Wall time of all processes of the run, from the first to the last event of each."""
    seconds = 0.0
    for process in _processes(events):
        first, last = (datetime.fromisoformat(process[i]["timestamp"]) for i in (0, -1))
        seconds += (last - first).total_seconds()
    return round(seconds, 3)


def warm_rows(events: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> list[Row]:
    """The rows of trained steps, less the first of each process: it warms the device up."""
    cold = set()
    for process in _processes(events):
        trained = (e["step"] for e in process if e["event"] == "train_step")
        cold.update([next(trained, None)])
    return [row for row in rows if "train/loss" in row and row["step"] not in cold]


def median(rows: Iterable[Row], name: str) -> Number | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None
