"""Who works on what in a sweep folder: locks that the kernel drops when their holder ends.

Byte n of one file stands for trial n, so there is nothing to clean up after a process that was
killed, and nothing grows old. The locks are POSIX's, which a network file system passes on: they
hold between machines that share the folder.
"""

import fcntl
import os
from pathlib import Path

_WORKERS = 1 << 20  # bytes from there on stand for the processes that look after workers


class Claims:
    """Of this process; to open the file a second time would drop those of the first."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._ours: set[int] = set()

    def take(self, trial: int) -> bool:
        """Whether this process works on the trial from now on; nobody else can then."""
        return self._take(trial)

    def drop(self, trial: int) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1, trial)
        self._ours.discard(trial)

    def take_supervision(self, worker: int) -> bool:
        """The same of looking after the worker of this number."""
        return self._take(_WORKERS + worker)

    def close(self) -> None:
        os.close(self._fd)

    def _take(self, byte: int) -> bool:
        if byte in self._ours:  # the kernel would give it to its holder again
            return False
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        self._ours.add(byte)
        return True
