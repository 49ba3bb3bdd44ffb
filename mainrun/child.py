"""A process of ours that works for us: shown while it works, stopped once when we are.

Its output goes to a log file, which it holds locked as long as it lives: whoever comes after us can
wait for one that outlived us. It has a process group of its own, so a signal to ours reaches it
through us alone; and when we are killed outright, the kernel asks it to stop.
"""

import contextlib
import fcntl
import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mainrun.stop import StopSignal

_POLL_SECONDS = 0.1

_UNTIL_PARENT_ENDS = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(128 + signal.SIGTERM)  # it had ended before
os.execvp(sys.argv[2], sys.argv[2:])
"""

MAINRUN = (
    sys.executable, "-P", "-c", "import sys; from mainrun.cli import main; sys.exit(main())",
)  # fmt: skip
"""The command `mainrun`, by the interpreter that runs us, whatever PATH says."""


@contextlib.contextmanager
def log(path: Path, stopping: StopSignal) -> Iterator[io.FileIO]:
    """The log file, once nobody holds it. Raises Stopped when a stop is asked for meanwhile."""
    with path.open("ab", buffering=0) as file:
        told = False
        while True:
            try:
                # On the open file, not on us: a child that has it open keeps the lock.
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                stopping.check()
            if not told:
                say(f"waiting for a process that still works on {path.with_suffix('')}")
                told = True
            time.sleep(_POLL_SECONDS)
        yield file


def follow(
    command: Sequence[str],
    output: io.FileIO,
    stopping: StopSignal,
    environment: Mapping[str, str] | None = None,
) -> int:
    """Its exit code, when it has ended; what it says is shown meanwhile.

    The first stop signal we get is passed on to it as one SIGTERM, and it is waited for.
    """
    with open(output.name, "rb") as shown:
        shown.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            _asked_to_stop_after_us(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            process_group=0,
        )
        told = False
        try:
            while process.poll() is None:
                if stopping.requested() and not told:
                    process.send_signal(signal.SIGTERM)
                    told = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_SECONDS)
                _show(shown.read())
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        _show(shown.read())
        return process.returncode


def say(text: str) -> None:
    """A line for whoever watches; a terminal that went away ends the showing, not the work."""
    _show(f"{text}\n".encode())


def _show(data: bytes) -> None:
    if data:
        with contextlib.suppress(OSError):
            sys.stderr.write(data.decode("utf-8", "replace"))
            sys.stderr.flush()


def _asked_to_stop_after_us(command: Sequence[str]) -> list[str]:
    """The command, which gets SIGTERM from the kernel when we end, however we end.

    Said by the child itself, before it becomes the command: a function between fork and exec may
    hang where the parent has threads.
    """
    if sys.platform != "linux":
        return list(command)
    return [sys.executable, "-I", "-S", "-c", _UNTIL_PARENT_ENDS, str(os.getpid()), *command]
