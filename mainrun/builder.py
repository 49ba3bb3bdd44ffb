"""One `docker build` as a stream of lines that can be stopped.

The Docker command line is used, not the Engine's API: which builder there is, BuildKit or the one
before it, is its business, and a build that it was told to end is cancelled in the Engine too.
"""

import contextlib
import queue
import re
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException

from mainrun import containers
from mainrun.errors import RunFailed
from mainrun.stop import StopSignal

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # the old builder paints what a step says on stderr
_LOOK_SECONDS = 0.2
_CLIENT_SECONDS = 30


def run(
    client: docker.DockerClient, command: list[str], stop: StopSignal, say: Callable[[str], None]
) -> None:
    """Passes its output on, line by line, to its end. Raises RunFailed with the reason, Stopped.

    However this ends, nothing of the build runs on: neither the client nor a step's container.
    """
    stop.check()
    # A session of its own: Ctrl-C comes to us alone, and we tell the client once.
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        stdin=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    tail: deque[str] = deque(maxlen=60)
    steps: list[str] = []
    try:
        for line in _lines(process, stop):
            say(line)
            tail.append(line)
            steps += re.findall(r"---> Running in ([0-9a-f]{12})", line)
    finally:
        _end(process)
        for step in steps[-1:]:  # the others were removed when they had ended well
            with contextlib.suppress(DockerException, RequestException):
                containers.remove(client, step)
    stop.check()
    if process.returncode:
        raise RunFailed(f"the image could not be built: {reason(tail)}")


def reason(lines: Sequence[str]) -> str:
    """The line of a builder's output that says why it failed; the builder only repeats the step."""
    if any("no space left on device" in line.lower() for line in lines):
        return "the disk of Docker is full: `docker system df` says of what"
    # BuildKit puts `#7 1.234 ` before what a step prints, and the seconds alone in its last words.
    said = [re.sub(r"^(#\d+ )?(\d+\.\d+ )?", "", line).strip() for line in lines]
    telling = [line for line in said if line and not _REPEATS.search(line)]
    return telling[-1] if telling else "the builder gave no reason"


_REPEATS = re.compile(
    r"returned a non-zero code|did not complete successfully|^-+$|^>|^Dockerfile:\d+|^\d+ \|"
    r"|^---> |^Removing intermediate container|^(CACHED|DONE|CANCELED)|^\d+ warnings? found"
)


def _lines(process: subprocess.Popen[str], stop: StopSignal) -> Iterator[str]:
    """What it prints, until it ends or a stop is requested."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(_COLOUR.sub("", line).rstrip())
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    while not stop.requested():
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=_LOOK_SECONDS)
            if line is None:
                process.wait()  # it closes its output a moment before it ends
                return
            yield line


def _end(process: subprocess.Popen[str]) -> None:
    """Asks the client to end, which cancels the build in the Engine, and waits until it has."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(_CLIENT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
