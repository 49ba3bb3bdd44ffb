"""The folder of a run on disk: made whole or not at all, and what it says of its run.

Training adds the record, the checkpoints and the views of them; here is what stands before the
first step and never changes after: config, tokenizer, environment.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mainrun import config as configs
from mainrun import probe, user
from mainrun.config import Config
from mainrun.data import tokenizers
from mainrun.environment import write_environment
from mainrun.errors import UserError
from mainrun.fingerprint import check_tokenizer, fingerprint
from mainrun.record import read_events

BASE = "base.json"


def create(
    run_dir: Path | None,
    name: str,
    config: Config,
    tokenizer: Tokenizer,
    *,
    data_fingerprint: str,
    device: str,
    command: Sequence[str],
    base: Mapping[str, Any] | None = None,
) -> Path:
    """A new folder; without `run_dir`, `<date>-<time>-<name>` in $MAINRUN_RUNS_DIR or `runs`.

    `base` says which parameters training starts from, if it is not fresh ones. UserError if the
    folder exists.
    """
    wanted = [run_dir] if run_dir else names(name)
    partial = None
    try:
        for path in wanted:
            if path.exists():
                continue
            # Under another name first: a process killed here leaves no half run.
            partial = path.with_name(f".{path.name}.{os.getpid()}")
            partial.mkdir(parents=True)
            (partial / "config.yaml").write_text(configs.to_yaml(config), encoding="utf-8")
            tokenizers.save(tokenizer, partial / "tokenizer.json")
            if base is not None:
                (partial / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
            write_environment(
                partial,
                command=command,
                devices=[device],
                data_fingerprint=data_fingerprint,
                fingerprint=fingerprint(config, partial / "tokenizer.json", data_fingerprint),
            )
            partial.rename(path)
            return path
    except OSError as error:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{path}: cannot be made ({error.strerror}); see --run-dir") from error
    raise UserError(f"{run_dir} exists: choose another --run-dir, or resume it")


def names(name: str) -> Iterator[Path]:
    """Where a folder of that name may come to lie: with date and time before it, and with a number
    behind it for the second of that second."""
    runs = user.expanded(os.environ.get("MAINRUN_RUNS_DIR") or "runs")
    first = runs / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    yield first
    for number in range(2, 1000):
        yield first.with_name(f"{first.name}-{number}")


def check_new(run_dir: Path | None, name: str) -> None:
    """UserError, before any work, where `create` could not make the folder."""
    path = run_dir or next(names(name))
    if run_dir is not None and os.path.lexists(run_dir):
        raise UserError(f"{run_dir} exists: choose another --run-dir, or resume it")
    try:
        probe.check(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be made ({error.strerror}); see --run-dir") from error


def check_open(run_dir: Path) -> None:
    """UserError, before any work, where a run could not go on: nobody may write there, or somebody
    does. Asking takes a shared lock for a moment."""
    record = run_dir / "events.jsonl"
    try:
        probe.check(record)
        probe.check(run_dir / "checkpoints" / "step")
        if record.exists():
            with record.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{run_dir} is being written by another process: wait until it ends, or stop it"
        ) from None
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written ({error.strerror}): make room or give this user the "
            "right, or resume a copy of it"
        ) from error


def base_reference(run_dir: Path) -> dict[str, Any] | None:
    """What `create` was told of the base: its `run_dir`, `step` and `fingerprint`; or None."""
    path = run_dir / BASE
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: stored[name] for name in ("run_dir", "step", "fingerprint")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def checkpoint_steps(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, in order; none where there is no folder of them."""
    try:
        names = [path.name for path in (run_dir / "checkpoints").iterdir()]
    except OSError:
        return []
    return sorted(int(name) for name in names if name.isdecimal())


def is_finished(run_dir: Path) -> bool:
    """Whether the last process that trained here came to the end."""
    path = run_dir / "events.jsonl"
    names = [event["event"] for event in read_events(path)] if path.is_file() else []
    ends = [name for name in names if name in ("resumed", "finished")]
    return ends[-1:] == ["finished"]


def tokenizer(run_dir: Path) -> Tokenizer:
    """The run's. Raises UserError where it is not the one that it was trained with."""
    path = run_dir / "tokenizer.json"
    loaded = tokenizers.load(path)
    check_tokenizer(run_dir)
    return loaded
