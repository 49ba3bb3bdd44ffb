"""The file of a study, in Optuna's own journal format: one JSON object a line.

Any number of processes may read and append, on one machine or on several that share the folder.
Optuna's own backend locks by a second file, which a killed process leaves behind, and appends to
the half line of a killed one, which spoils the file; else the two read alike.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optuna.storages.journal import BaseJournalBackend

from mainrun.errors import RunFailed


class Journal(BaseJournalBackend):
    """What is damaged is told, as RunFailed, before anything is written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._logs: list[dict[str, Any]] = []  # in the whole lines up to `_end`
        self._end = 0
        self._held = 0

    @contextlib.contextmanager
    def exclusively(self) -> Iterator[None]:
        """Nobody else writes in this block."""
        # On the open file, so that no lock is left when we are killed.
        if self._held == 0:
            fcntl.flock(self._fd, fcntl.LOCK_EX)
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
            if self._held == 0:
                fcntl.flock(self._fd, fcntl.LOCK_UN)

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        self._read()
        return iter(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        data = "".join(f"{json.dumps(log)}\n" for log in logs).encode()
        with self.exclusively():
            self._read()
            os.ftruncate(self._fd, self._end)  # the half line that a killed process left
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
                os.fsync(self._fd)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._fd, self._end)
                raise RunFailed(f"{self._path}: cannot write: {error.strerror}") from error
            self._read()

    def close(self) -> None:
        os.close(self._fd)

    def _read(self) -> None:
        """What others have written; a line that is not whole may still be being written."""
        size = os.fstat(self._fd).st_size
        data = os.pread(self._fd, size - self._end, self._end)
        for line in data[: data.rfind(b"\n") + 1].splitlines(keepends=True):
            self._logs.append(self._parsed(line))
            self._end += len(line)

    def _parsed(self, line: bytes) -> dict[str, Any]:
        try:
            log = json.loads(line)
        except ValueError:
            log = None
        if not isinstance(log, dict) or "op_code" not in log:
            number = len(self._logs) + 1
            raise RunFailed(f"{self._path}:{number}: damaged: not a line of Optuna's journal")
        return log
