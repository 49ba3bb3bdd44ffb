"""What GitHub's runner does to a step's process when somebody cancels the job, done to any process.

From actions/runner, src/Runner.Sdk/ProcessInvoker.cs: SIGINT to the process that it started, and
to no other; 7.5 s later SIGTERM to the same; 2.5 s later SIGKILL. On Linux that too is for the one
process (on Windows it is for the whole tree), so what a shell had started outlives it. A step is
`bash --noprofile --norc -eo pipefail FILE` with a stdin that is closed and no terminal; `exec` as
its only line makes the command itself that process.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

_RUNNER = """
import subprocess, sys
step = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT)
for line in step.stdout:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()
sys.exit(step.wait())
"""

SIGINT_SECONDS = 7.5
SIGTERM_SECONDS = 2.5


def start_step(
    call: str, *, cwd: Path, output: IO[bytes] | int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """The process of a step with this `run:`, started as the runner does."""
    return _start([], call, cwd, output, environment)


def start_runner(
    call: str, *, cwd: Path, output: IO[bytes] | int, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """A runner with that step as its child, which reads what the step prints and prints it.

    Its `kill()` is what the kernel does to a runner when memory runs out: nobody signals the step,
    which loses its parent and the reader of its output.
    """
    return _start([sys.executable, "-c", _RUNNER], call, cwd, output, environment)


def _start(
    runner: list[str],
    call: str,
    cwd: Path,
    output: IO[bytes] | int,
    environment: Mapping[str, str] | None,
) -> subprocess.Popen[bytes]:
    with tempfile.NamedTemporaryFile("w", suffix=".sh", delete=False) as script:
        script.write(f"{call}\n")
    return subprocess.Popen(
        [*runner, "bash", "--noprofile", "--norc", "-eo", "pipefail", script.name],
        cwd=cwd,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
    )


def cancel(
    process: subprocess.Popen[bytes] | subprocess.Popen[str],
    *,
    sigint_seconds: float = SIGINT_SECONDS,
    sigterm_seconds: float = SIGTERM_SECONDS,
) -> str:
    """What ended it: SIGINT, SIGTERM or SIGKILL; `nothing` where it had ended before."""
    if process.poll() is not None:
        return "nothing"
    for number, seconds in ((signal.SIGINT, sigint_seconds), (signal.SIGTERM, sigterm_seconds)):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            return number.name
    process.kill()
    process.wait()
    return "SIGKILL"


def kill_tree(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """SIGKILL to its descendants and to itself: what is left of a machine that loses its power."""
    for pid in [*descendants(process.pid), process.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Children, their children and so on, the youngest generation first."""
    children = [child for child, parent in _parents().items() if parent == pid]
    return [below for child in children for below in (*descendants(child), child)]


def _parents() -> dict[int, int]:
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                # The name of the program, in parentheses, may hold anything.
                after = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
                found[int(folder.name)] = int(after[1])
    return found
