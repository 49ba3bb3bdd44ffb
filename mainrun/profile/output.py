"""The folder of a profile: `profile.json`, and the trace under `trace/`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from mainrun import probe
from mainrun.errors import RunFailed, UserError, one_line

FILE = "profile.json"


def default_folder(name: str) -> Path:
    return Path("profile") / f"{datetime.now():%Y%m%d-%H%M%S}-{name}"


@contextmanager
def opened(folder: Path | None) -> Iterator[None]:
    """The folder, new or empty; gone again where the block fails before anything is in it.

    Without one, nothing. UserError where it cannot be made or written to, or is not empty.
    """
    if folder is None:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
        probe.check(folder / FILE)
    except OSError as error:
        raise UserError(
            f"--output={folder} cannot be made ({error.strerror}): name a folder of yours"
        ) from error
    if not is_empty:
        raise UserError(f"--output={folder} is not empty: name a new folder")
    try:
        yield
    except BaseException:
        with suppress(OSError):
            folder.rmdir()
        raise


def write(folder: Path, found: dict[str, Any]) -> None:
    """RunFailed where it cannot be written after all."""
    try:
        (folder / FILE).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise RunFailed(f"{folder / FILE} cannot be written: {one_line(error)}") from error


def read(folder: Path) -> dict[str, Any] | None:
    """What was written there; None where nothing was."""
    path = folder / FILE
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found
