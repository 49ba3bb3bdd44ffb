"""The record of a run: `events.jsonl`, one fact a line, and the table of its metrics.

Here the file is written, read back and made into rows; nothing here knows what an event means,
but for three things. A field whose name has a slash is a metric (`val/loss`), and so is
`elapsed_seconds`. `resumed` voids what was logged after its step: the process that logged it
died, and the resumed one walks those steps again. And a line that lacks what every reader of such
an event takes for granted is none. `metrics.csv` is the rows as a table.
"""

import contextlib
import csv
import fcntl
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from mainrun.console import say
from mainrun.errors import RunFailed, UserError

Number = int | float
Row = dict[str, Number]

WALL_CLOCK = ("perf/", "val/seconds", "elapsed_seconds")
"""Columns that begin so depend on the machine's clock; all others a resumed run has alike."""

_GROUPS = ("train/", "val/", "val_average/", "optimizer/", "precision/", "noise/", "perf/")
_NEEDED = {
    "train_step": {"step"},
    "evaluation": {"step"},
    "samples": {"step", "texts"},
    "checkpoint": {"step"},
    "step_skipped": {"step"},
    "went_back": {"step"},
    "stopped_early": {"step", "best_step"},
    "resumed": {"step"},
}
"""Fields without which an event is none, beside its name and its time."""

_SHOWN_LINES = 5  # numbers of lines that are no events
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Record:
    """`events.jsonl`, open for appending by this process alone.

    Each event is written at once and whole: a failed write is undone, so that the record stays
    readable. What JSON has no number for is written as "NaN", "Infinity" or "-Infinity", and
    `read_events` reads it back. The file itself carries the lock: no lock file can be left behind.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        """Raises UserError where another process writes the record, or a new run finds an old;
        RunFailed where the disk will not have it."""
        import structlog

        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunFailed(f"{path} cannot be opened: {error.strerror}") from error
        try:
            self._lock()
            whole = path.read_bytes().rfind(b"\n") + 1  # behind it, a killed process's half line
            if whole and not resume:
                raise UserError(
                    f"{path} already records a run: resume it with `mainrun resume {path.parent}`, "
                    "or choose another --run-dir"
                )
            self._end = whole
            with contextlib.suppress(OSError):  # a device has no length
                os.ftruncate(self._fd, whole)
        except BaseException:
            os.close(self._fd)
            raise
        self._logger = structlog.wrap_logger(
            structlog.WriteLogger(self),  # type: ignore[arg-type]  # it calls write and flush only
            processors=[
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                _name_and_time_first,
                structlog.processors.JSONRenderer(_to_json),
            ],
            wrapper_class=structlog.BoundLogger,
            cache_logger_on_first_use=True,
        )

    def append(self, event: str, step: int | None, fields: Mapping[str, Any]) -> None:
        """Raises RunFailed, naming file and reason, where the disk does not take the line, or takes
        it to a place where nobody looks for it: the file was moved or removed."""
        numbered = fields if step is None else {"step": step, **fields}
        try:
            self._logger.info(event, **numbered)
        except OSError as error:
            raise RunFailed(f"{self.path}: cannot write `{event}`: {error.strerror}") from error
        try:
            is_in_place = os.path.samestat(os.stat(self.path), os.fstat(self._fd))
        except (FileNotFoundError, NotADirectoryError):
            is_in_place = False
        if not is_in_place:
            raise RunFailed(f"{self.path} is gone: it was moved or removed while the run went on")

    def close(self) -> None:
        os.close(self._fd)

    def write(self, line: str) -> None:
        # A lone surrogate becomes \udc80, which inside a JSON string is its proper escape.
        data = line.encode("utf-8", "backslashreplace")
        start = self._end
        try:
            while data:
                written = os.write(self._fd, data)
                self._end += written
                data = data[written:]
        except OSError:
            self._end = start
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, start)
            raise

    def flush(self) -> None:
        """Nothing waits in this process; what the kernel holds survives a SIGKILL."""

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"{self.path.parent} is being written by another process: "
                "wait until it ends, or stop it"
            ) from None


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events in the order they were logged; the half line a killed process left is no event.

    Nor is a whole line that is damaged: it is told with its number, and skipped. Raises UserError
    where there is no such file.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: not a run folder's record") from None
    events, skipped = [], []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        if (event := _event(line)) is not None:
            events.append(_finite_or_not(event))
        else:
            skipped.append(number)
    if skipped:
        shown = ", ".join(map(str, skipped[:_SHOWN_LINES]))
        more = f" and {len(skipped) - _SHOWN_LINES} more" if len(skipped) > _SHOWN_LINES else ""
        which = f"lines {shown}{more} are no events" if skipped[1:] else f"line {shown} is no event"
        _warn(f"{path}: {which}: skipped")
    return events


@cache
def _warn(text: str) -> None:
    """Once: the record is read anew for each of its views."""
    say(f"warning: {text}")


def _event(line: bytes) -> dict[str, Any] | None:
    """None for a line that is no event."""
    try:
        event = json.loads(line)
        is_event = (
            isinstance(event["event"], str)
            and datetime.fromisoformat(event["timestamp"]).tzinfo is not None
            and type(event.get("step")) in (int, type(None))
            and all(event.get(name) is not None for name in _NEEDED.get(event["event"], ()))
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    return event if is_event else None


def metrics(events: Iterable[Mapping[str, Any]]) -> list[Row]:
    """One row a step, in order: `step` and every metric logged for it, the last value of each."""
    rows: dict[int, Row] = {}
    for event in events:
        if event["event"] == "resumed":
            rows = {step: row for step, row in rows.items() if step <= event["step"]}
        elif event.get("step") is not None and (values := metric_fields(event)):
            rows.setdefault(event["step"], {}).update(values)
    return [{"step": step, **rows[step]} for step in sorted(rows)]


def metric_fields(fields: Mapping[str, Any]) -> Row:
    """The metrics among the fields of an event."""
    return {
        name: value
        for name, value in fields.items()
        if _is_metric(name) and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _is_metric(name: str) -> bool:
    return "/" in name or name == "elapsed_seconds"


def columns(names: Iterable[str]) -> list[str]:
    """The order of a table's columns, whatever order the metrics came in.

    `step`; then train, val, val_average, optimizer, precision, noise, perf and other metrics, by
    alphabet in each group; `elapsed_seconds` last.
    """

    def rank(name: str) -> tuple[int, str]:
        groups = [i for i, prefix in enumerate(_GROUPS) if name.startswith(prefix)]
        return (groups[0] if groups else len(_GROUPS) + ("/" not in name), name)

    return ["step", *sorted(set(names) - {"step"}, key=rank)]


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows as a table, complete or as before; an empty cell is a metric not logged then."""
    header = columns(name for row in rows for name in row)
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        file.write(_csv_line(header))
        file.writelines(_csv_line(_cells(header, row)) for row in rows)
    os.replace(partial, path)


def write_table(run_dir: Path) -> None:
    """Makes `metrics.csv` anew from the record; a run without a metric yet has none."""
    if rows := metrics(read_events(run_dir / "events.jsonl")):
        write_csv(run_dir / "metrics.csv", rows)


class Table:
    """`metrics.csv` while the run goes on: at every moment the rows of what is recorded.

    A row is written with its first metric and written over when the step brings more. A new
    column, or a step before the last, is rare: then the table is made anew from the record. So it
    is where it was lost, but not at every step: that reads the whole record.
    """

    def __init__(self, path: Path, record: Path) -> None:
        self.path = path
        self._record = record
        self._header: list[str] = []
        self._row: Row = {}
        self._offset = 0  # bytes before the last row
        self._is_lost = False

    def add(self, event: str, step: int | None, fields: Mapping[str, Any]) -> str | None:
        """Takes up an event that is already in the record; why the table was lost, where it was."""
        values = {} if step is None else metric_fields(fields)
        if (not values and event != "resumed") or (self._is_lost and event == "train_step"):
            return None
        was_lost = self._is_lost
        try:
            if was_lost or event == "resumed" or not values.keys() <= set(self._header):
                self._rebuild()
            elif step == self._row["step"]:
                self._put(self._row | values, self._offset)
            elif step is not None and step > self._row["step"]:
                self._put({"step": step, **values}, self.path.stat().st_size)
            else:
                self._rebuild()
        except OSError as error:
            self._is_lost = True
            return None if was_lost else error.strerror
        self._is_lost = False
        return None

    def _put(self, row: Row, offset: int) -> None:
        line = _csv_line(_cells(self._header, row)).encode()
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(line)
            file.truncate()
        self._row, self._offset = row, offset

    def _rebuild(self) -> None:
        rows = metrics(read_events(self._record))
        write_csv(self.path, rows)
        self._header = columns(name for row in rows for name in row)
        self._row = rows[-1] if rows else {"step": -1}
        last = _csv_line(_cells(self._header, self._row)) if rows else ""
        self._offset = self.path.stat().st_size - len(last.encode())


def _cells(header: Sequence[str], row: Row) -> list[str]:
    return [repr(row[name]) if name in row else "" for name in header]


def _csv_line(cells: Iterable[str]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def _finite_or_not(event: dict[str, Any]) -> dict[str, Any]:
    for name, value in event.items():
        if _is_metric(name) and isinstance(value, str) and value in _NOT_FINITE:
            event[name] = _NOT_FINITE[value]
    return event


def _name_and_time_first(_: Any, __: str, event: MutableMapping[str, Any]) -> dict[str, Any]:
    return {"event": event.pop("event"), "timestamp": event.pop("timestamp"), **event}


def _to_json(event: dict[str, Any], **_: Any) -> str:
    try:
        return json.dumps(event, ensure_ascii=False, allow_nan=False)
    except ValueError:  # rare: looking at every number first would cost each event
        return json.dumps(_named_when_not_finite(event), ensure_ascii=False, allow_nan=False)


def _named_when_not_finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _named_when_not_finite(item) for key, item in value.items()}
        case list() | tuple():
            return [_named_when_not_finite(item) for item in value]
        case float() if not math.isfinite(value):
            return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        case _:
            return value
