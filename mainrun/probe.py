"""Whether something can be written at a place, tried before any work whose result it would be.

Rights alone do not say it: a disk may be full, only read, or have no such long names. So a file of
one byte is written beside what is to come, and is gone again.
"""

import contextlib
import os
from pathlib import Path


def check(path: Path) -> None:
    """Raises OSError where no file or folder can be made there, or written anew.

    Folders above it that are missing are taken for granted: they are made when it is.
    """
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)  # of a path that is too long, or behind a folder that may not be entered
    place, longest = path.absolute().parent, path.name
    while not os.path.lexists(place):
        longest = max(longest, place.name, key=lambda name: len(os.fsencode(name)))
        place = place.parent
    probe = place / f".{longest}.{os.getpid()}"
    try:
        probe.write_bytes(b"\n")
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
