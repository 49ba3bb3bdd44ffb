"""First process of the container: starts the command, passes one stop on, leaves nothing running.

    entrypoint.py COMMAND [ARGUMENT ...]   the command's own exit code; 128 + n: ended by signal n
    entrypoint.py --health                 0, or 1 when the newest record of a run is too old

The first SIGINT, SIGTERM or SIGHUP goes on as one SIGTERM to the command's process group; later
ones are swallowed. GitHub sends two for one cancellation and Docker a third, go-task passes on none
and abandons what it started at its own third. Then every descendant is waited for, those included
that left the group, because a container ends with its first process, whatever else still saves.
What has not ended after the grace time is killed.

Signals are read like a file, never acted upon in a handler: none is lost, nor comes between two
lines. Only one that arrives while Python itself starts can be lost, and only where this is process
1, to which the kernel delivers nothing unasked: start the container with an init (`--init`).

Of the standard library only; NVML's module is loaded where GPUs were asked for.

    MAINRUN_SECRETS=stdin    a JSON object of names and values comes on stdin; it becomes part of
                             the command's environment, and of nothing that Docker records
    MAINRUN_GPUS             a number: so many must be visible, else exit 2; none or empty: any
    MAINRUN_GRACE_SECONDS    from the stop, or the command's end, to the kill of what is left: 150
    MAINRUN_HEALTH_SECONDS   age of the oldest record that is healthy: 1800
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
from pathlib import Path

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
GRACE_SECONDS = 150
HEALTH_SECONDS = 1800
NOT_STARTED = 128 + signal.SIGTERM

_RUNS = Path(__file__).resolve().parent.parent / "runs"
_KILL_AGAIN_SECONDS = 1.0  # what a dying process started meanwhile
_SET_CHILD_SUBREAPER = 36  # <linux/prctl.h>


class Refused(Exception):
    """What was asked for cannot be; nothing was started. Exit code 2."""


class StopRequested(Exception):
    """A stop came before the command was started."""


def main(words: list[str]) -> int:
    """The exit code."""
    signals = Signals()
    try:
        if words == ["--health"]:
            return 0 if is_healthy() else 1
        if not words:
            raise Refused("no command was given; for example: task -x train")
        grace_seconds = seconds("MAINRUN_GRACE_SECONDS", GRACE_SECONDS)
        environment = dict(os.environ)
        if environment.pop("MAINRUN_SECRETS", "") == "stdin":
            environment |= secrets(signals)
        check_gpus(os.environ.get("MAINRUN_GPUS", ""))
        signals.raise_if_stopped()
    except Refused as refused:
        say(str(refused))
        return 2
    except StopRequested:
        say("stopped before the command was started")
        return NOT_STARTED
    adopt_orphans()
    try:
        command = start(words, environment)
    except OSError as error:
        say(f"{words[0]} cannot be started: {error.strerror}")
        return 127 if isinstance(error, FileNotFoundError) else 126
    return wait_for_all(command, signals, grace_seconds)


class Signals:
    """Stop signals and deaths of children, in their order, as bytes of a pipe."""

    def __init__(self) -> None:
        self.pipe, inlet = os.pipe()
        os.set_blocking(self.pipe, False)
        os.set_blocking(inlet, False)
        signal.set_wakeup_fd(inlet, warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, signal.SIGCHLD):
            signal.signal(number, _nothing)  # without a handler of Python's there is no byte

    def wait(self, timeout_seconds: float | None) -> signal.Signals | None:
        """The first stop among what has arrived, or arrives in time; None when there is none."""
        select.select([self.pipe], [], [], timeout_seconds)
        arrived: list[int] = []
        with contextlib.suppress(BlockingIOError):
            arrived += os.read(self.pipe, 4096)
        stops = [number for number in arrived if number in STOP_SIGNALS]
        return signal.Signals(stops[0]) if stops else None

    def raise_if_stopped(self) -> None:
        if self.wait(0):
            raise StopRequested


def _nothing(*_: object) -> None: ...


def secrets(signals: Signals) -> dict[str, str]:
    """The JSON object on stdin, read to its end. Nothing of it is ever in a message."""
    text = b""
    try:
        while True:
            ready, _, _ = select.select([0, signals.pipe], [], [])
            signals.raise_if_stopped()  # whoever was to write them may be gone
            if 0 in ready:
                part = os.read(0, 65536)
                if not part:
                    break
                text += part
        values = json.loads(text)
    except (OSError, ValueError):  # closed; no JSON
        values = None
    if not isinstance(values, dict) or not all(map(_is_variable, values.items())):
        raise Refused("MAINRUN_SECRETS=stdin, but stdin holds no JSON object of names and texts")
    return values


def _is_variable(item: tuple[str, object]) -> bool:
    name, value = item
    return name.isidentifier() and isinstance(value, str) and "\0" not in value


def check_gpus(asked: str) -> None:
    """Raises Refused where fewer GPUs are visible than were asked for."""
    if asked in ("", "none"):
        return
    if not (asked.isdecimal() and int(asked)):
        raise Refused(f"MAINRUN_GPUS={asked}: it is none or a number of GPUs")
    wanted = "1 GPU was asked for" if asked == "1" else f"{asked} GPUs were asked for"
    if os.environ.get("MAINRUN_DEVICE") == "cpu":
        raise Refused(
            f"{wanted}, but this image has no CUDA; build it with "
            "`mainrun image build --target cuda`, or ask for no GPU"
        )
    import pynvml

    try:
        pynvml.nvmlInit()
        visible = pynvml.nvmlDeviceGetCount()
    except pynvml.NVMLError as error:
        raise Refused(
            f"{wanted}, but no NVIDIA driver answers in the container ({error}); "
            "`mainrun doctor` on the machine says what is missing, or ask for no GPU"
        ) from None
    if visible < int(asked):
        raise Refused(
            f"{wanted}, but the container sees {visible}; "
            "`mainrun gpu-status` on the machine shows which there are"
        )


def adopt_orphans() -> None:
    """From now on a descendant whose parent ends becomes our child, and can be waited for."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


def start(words: list[str], environment: dict[str, str]) -> int:
    """The process id of the command, which leads a session and a process group of its own."""
    no_stdin = [] if os.isatty(0) else [(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0)]
    return os.posix_spawnp(
        words[0], words, environment, file_actions=no_stdin, setsid=True,
        setsigmask=[], setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores these two
    )  # fmt: skip


def wait_for_all(command: int, signals: Signals, grace_seconds: float) -> int:
    """The command's exit code, once neither it nor any descendant is left."""
    code: int | None = None
    deadline: float | None = None
    stop: signal.Signals | None = None
    while True:
        ended, any_left = ended_children()
        if command in ended:
            code = os.waitstatus_to_exitcode(ended[command])
        if not any_left:
            assert code is not None
            return 128 - code if code < 0 else code
        if deadline is None and (stop or code is not None):
            say(
                f"{stop.name}: asking the command to stop, for up to {grace_seconds:g} s"
                if stop
                else f"the command left processes; they have {grace_seconds:g} s to end"
            )
            with contextlib.suppress(ProcessLookupError):
                os.killpg(command, signal.SIGTERM)  # the only time
            deadline = time.monotonic() + grace_seconds
        elif deadline is not None and time.monotonic() >= deadline:
            kill_descendants(grace_seconds)
            deadline = time.monotonic() + _KILL_AGAIN_SECONDS
        stop = signals.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))


def ended_children() -> tuple[dict[int, int], bool]:
    """Wait status of each child that has ended and was not told yet; whether any other is left."""
    ended: dict[int, int] = {}
    try:
        while (child := os.waitpid(-1, os.WNOHANG))[0]:
            ended[child[0]] = child[1]
    except ChildProcessError:
        return ended, False
    return ended, True


def kill_descendants(grace_seconds: float) -> None:
    pids = descendants(os.getpid())
    say(f"killing what is left after {grace_seconds:g} s: {len(pids)} of our processes")
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)


def descendants(ancestor: int) -> list[int]:
    """Process ids of all that descend from a process, in no order."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            # pid (name) state parent …; a name may hold spaces and parentheses
            parent = int(stat.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    new = children.get(ancestor, [])
    while new:
        found += new
        new = [child for pid in new for child in children.get(pid, [])]
    return found


def is_healthy(runs: Path = _RUNS) -> bool:
    """Whether a run of this container told something lately, or the container is young.

    Other containers write to the same folder. So what counts is the records that a process of this
    one holds open; where there is none (a run has just ended), all of the folder.
    """
    held = {path for path in open_files() if path.name == "events.jsonl" and runs in path.parents}
    records = held or set(runs.glob("*/events.jsonl"))
    times = [path.stat().st_mtime for path in records if path.exists()]
    newest = max([container_start(), *times])
    return time.time() - newest <= seconds("MAINRUN_HEALTH_SECONDS", HEALTH_SECONDS)


def container_start() -> float:
    """Seconds since the epoch at which process 1 was started."""
    fields = Path("/proc/1/stat").read_text().rpartition(")")[2].split()
    ticks_after_boot = int(fields[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks_after_boot / os.sysconf("SC_CLK_TCK")


def open_files() -> set[Path]:
    """Files that processes of this container hold open, as far as this user may see it."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            for link in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    found.add(Path(os.readlink(link)))
    return found


def seconds(name: str, default: int) -> float:
    text = os.environ.get(name) or str(default)
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise Refused(f"{name}={text}: it is a number of seconds")
    return value


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # the reader may be gone, and we must go on waiting
        os.write(2, f"mainrun: {line}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
