"""The config of a run that exists: what it was told on its first day, and at every resume since.

`config.yaml` is the first day's and is never written again, because the first steps were trained
with it. What a resume said stands in the record with the step it was said at, so there is no second
file that could tell another story than the record.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from mainrun import config as configs
from mainrun import fingerprint, yaml12
from mainrun.config import Config, Source
from mainrun.errors import UserError
from mainrun.record import read_events


class Change(NamedTuple):
    """What a resume said, and the step from which on it holds."""

    step: int
    overrides: list[str]


def load(
    run_dir: Path,
    overrides: Sequence[str] = (),
    *,
    events: Iterable[Mapping[str, Any]] | None = None,
) -> Config:
    """The run's config as it is now, with these overrides; `events` are its record, if it is read.

    Raises UserError where there is no run, its settings can no longer be read, or they are not what
    it was trained with; and for an override that would make another run of it, with another network
    or another text. Where nothing is trained, the size of the batch does not.
    """
    return _load(run_dir, overrides, events, free={"training.batch_size"})


def load_to_resume(run_dir: Path, overrides: Sequence[str]) -> Config:
    """The same, to train on. Raises UserError for an override of the batch's size, too."""
    return _load(run_dir, overrides, None, free=set())


def history(
    run_dir: Path, events: Iterable[Mapping[str, Any]] | None = None
) -> list[tuple[Change, Source]]:
    """The run's settings on its first day, and after each resume that said some.

    Raises UserError where there is no run.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run folder: it has no config.yaml and tokenizer.json")
    if events is None:
        record = run_dir / "events.jsonl"
        events = read_events(record) if record.is_file() else ()
    # It states everything. One that names a parent was not written by us, and the parent may be any
    # file of the host's, where this is read for the job's page.
    stages = [(Change(0, []), Source(*yaml12.read(path)))]
    for change in changes(events):
        stages.append((change, stages[-1][1].with_overrides(change.overrides)))
    return stages


def moved(run_dir: Path, events: Iterable[Mapping[str, Any]] | None = None) -> list[str]:
    """What resumes changed that can move a result: no single config is that of such a run.

    Each as `training.max_steps=44 from step 40`. Raises UserError as `load` does.
    """
    effects = [
        (change.step, {path: v for path, v in _leaves(source).items() if _is_effect(path)})
        for change, source in history(run_dir, events)
    ]
    return [
        f"{path}={value} from step {step}"
        for (_, before), (step, after) in pairwise(effects)
        for path, value in after.items()
        if path not in before or before[path] != value
    ]


def changes(events: Iterable[Mapping[str, Any]]) -> list[Change]:
    """In the order they were said."""
    return [
        Change(event["step"], list(event["overrides"]))
        for event in events
        if event["event"] == "resumed" and event.get("overrides")
    ]


def _load(
    run_dir: Path,
    overrides: Sequence[str],
    events: Iterable[Mapping[str, Any]] | None,
    free: Set[str],
) -> Config:
    _, source = history(run_dir, events)[-1]
    settings, changed = _leaves(source), source.with_overrides(overrides)
    fingerprint.check_settings(run_dir, settings, source.origins)
    was = {path: v for path, v in fingerprint.fixed(settings).items() if path not in free}
    fingerprint.check_same(_leaves(changed), was, changed.origins, run_dir)
    return changed.load()


def _leaves(source: Source) -> dict[str, Any]:
    return configs.leaves(configs.as_dict(source.load()))


def _is_effect(path: str) -> bool:
    """A place is none here: a resume reads only what the run knows again by its fingerprint."""
    return configs.is_effect(path) and not configs.is_place(path)
