"""One contestant as a process that stays, and the lines it and its parent exchange.

    BEGIN {}                                     before its first step: all is read and compiled
    READY {"first_loss": …, "versions": …, …}    after its first step is done
    3                                            the parent asks for three more steps
    R {"seconds": …, "loss": …, "steps": …, "device_bytes": …}

`seconds` is per step, over whole steps: data, loss, gradient, clipping, optimizer, and at the end
whatever the contestant must wait for until its numbers are there. `loss` is the last step's,
`steps` counts all it ever did. Memory and faults are read by the parent from /proc, with one
instrument for all; `ru_maxrss` would not do, for a child inherits its parent's.
"""

import dataclasses
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self


class WorkerFailed(RuntimeError):
    """A contestant ended, or said something else than its line; its last words are the message."""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What some steps cost one contestant."""

    seconds: float  # per step
    loss: float  # of the last step, nats per token
    steps: int  # done since the start, the first one included
    device_bytes: int | None  # peak on a GPU since the start
    minor_faults: float | None  # per step
    system_seconds: float | None  # per step


class Worker:
    """A running contestant. As a context manager it is gone at the end, whatever happens."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], folder: Path
    ) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        try:
            self._answer("BEGIN ")
            self.begin_seconds = time.perf_counter() - started
            self.facts = self._answer("READY ")
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.perf_counter() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def run(self, steps: int) -> Answer:
        """Lets it do so many steps and waits for them."""
        assert self._process.stdin is not None
        before = _usage(self._process.pid)
        self._process.stdin.write(f"{steps}\n")
        self._process.stdin.flush()
        said = self._answer("R ")
        after = _usage(self._process.pid)
        faults = system = None
        if before is not None and after is not None:
            faults, system = ((b - a) / steps for a, b in zip(before, after, strict=True))
        return Answer(**said, minor_faults=faults, system_seconds=system)

    def peak_bytes(self) -> int | None:
        """The most memory the process ever had resident; None where there is no /proc."""
        status = Path(f"/proc/{self._process.pid}/status")
        if not status.exists():
            return None
        line = next(s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024

    def close(self) -> None:
        """Ends the process and reaps it."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()

    def _answer(self, prefix: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line.startswith(prefix):
            self._errors.seek(0)
            last_words = (line + self._errors.read())[-2000:]
            raise WorkerFailed(f"expected a line {prefix.strip()!r}, got: {last_words}")
        return json.loads(line.removeprefix(prefix))


def _usage(pid: int) -> tuple[float, float] | None:
    """Minor faults and seconds in the kernel of all threads so far; proc_pid_stat(5)."""
    stat = Path(f"/proc/{pid}/stat")
    if not stat.exists():
        return None
    fields = stat.read_text().rpartition(")")[2].split()  # the name before it may hold spaces
    return int(fields[7]), int(fields[12]) / os.sysconf("SC_CLK_TCK")
