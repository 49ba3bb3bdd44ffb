"""Lists of texts kept between runs, in one folder of this user's, never beside the user's files.

An entry's name says all that its texts depend on, so an entry is never wrong, only absent: one that
is damaged is as good as absent, and a folder that cannot be written costs time and nothing else.
"""

import contextlib
import hashlib
import json
import os
import tempfile
import urllib.parse
import warnings
from collections.abc import Sequence
from pathlib import Path

from mainrun import user
from mainrun.errors import UserError


def folder() -> Path:
    """$MAINRUN_CACHE_DIR, else $XDG_CACHE_HOME/mainrun, else ~/.cache/mainrun."""
    if chosen := os.environ.get("MAINRUN_CACHE_DIR"):
        return user.expanded(chosen)
    try:
        return user.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mainrun"
    except UserError:
        raise UserError(
            "this user has no home: MAINRUN_CACHE_DIR names a folder for caches"
        ) from None


def load(*name: str) -> list[str] | None:
    """The texts stored under this name; None if there are none or they are not as stored."""
    try:
        checksum, _, body = _path(name).read_bytes().partition(b"\n")
    except OSError:
        return None
    if checksum != hashlib.sha256(body).hexdigest().encode():
        return None
    texts: list[str] = json.loads(body)
    return texts


def store(texts: Sequence[str], *name: str) -> None:
    """Stores the texts whole or not at all; warns if it cannot."""
    path = _path(name)
    body = json.dumps(texts, ensure_ascii=False, separators=(",", ":")).encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            try:
                file.write(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
                file.flush()
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
    except OSError as error:
        warnings.warn(
            f"{folder()}: the cache cannot be written ({error.strerror}), so the next run reads "
            "the data anew; MAINRUN_CACHE_DIR names another folder",
            stacklevel=2,
        )


def _path(name: Sequence[str]) -> Path:
    # One file name, so that nothing in a data set's name can lead out of the folder.
    return folder() / "documents" / (urllib.parse.quote("@".join(name), safe="@") + ".json")
