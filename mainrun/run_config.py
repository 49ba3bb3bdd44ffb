"""The config of a run that exists: what it was told on its first day, and at every resume since.

`config.yaml` is the first day's and is never written again, because the first steps were trained
with it. What a resume said stands in the record with the step it was said at, so there is no second
file that could tell another story than the record.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mainrun import yaml12
from mainrun.config import Config, Source
from mainrun.errors import UserError
from mainrun.record import read_events


class Change(NamedTuple):
    """What a resume said otherwise than the run before it."""

    step: int
    """From which on it holds."""
    overrides: list[str]


def load(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    events: Iterable[Mapping[str, Any]] | None = None,
) -> Config:
    """The run's config as it is now, with these overrides; `events` are its record, if it is read.

    Raises UserError where there is no run, or its settings can no longer be read.
    """
    return sources(run_dir, events)[-1].load(overrides)


def sources(run_dir: Path, events: Iterable[Mapping[str, Any]] | None = None) -> list[Source]:
    """The run's settings on its first day, and after each resume that changed some."""
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.yaml and tokenizer.json")
    if events is None:
        record = run_dir / "events.jsonl"
        events = read_events(record) if record.is_file() else ()
    # It states everything. One that names a parent was not written by us, and the parent may be any
    # file of the host's, where this is read for the job's page.
    told = [Source(*yaml12.read(path))]
    for change in changes(events):
        told.append(told[-1].with_overrides(change.overrides))
    return told


def changes(events: Iterable[Mapping[str, Any]]) -> list[Change]:
    """In the order they were said."""
    return [
        Change(event["step"], list(event["overrides"]))
        for event in events
        if event["event"] == "resumed" and event.get("overrides")
    ]
