"""The folder of a run on disk: made whole or not at all, and what it says of its run.

Training adds the record, the checkpoints and the views of them; here is what stands before the
first step and never changes after: config, tokenizer, environment.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mainrun import config as configs
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
    runs = Path(os.environ.get("MAINRUN_RUNS_DIR") or "runs")
    wanted = [run_dir] if run_dir else _names(runs, name)
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


def _names(root: Path, name: str) -> Iterator[Path]:
    """Date, time and name, with a number behind it for the second of that second."""
    first = root / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"
    yield first
    for number in range(2, 1000):
        yield first.with_name(f"{first.name}-{number}")
