"""The GitHub runners of this machine, and the units of systemd that keep them and us going.

Found where `.github/runner/setup.sh` puts them and among the running processes; GitHub is not
asked. A runner's labels are known to GitHub only, so its folder is named after its label.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

FOLDER = Path("/srv/mainrun/runners")
LABELS = ("gpu", "gpu-ops")
"""One for jobs, one for status and updates: a runner takes one job at a time."""

HOOKS = {
    "ACTIONS_RUNNER_HOOK_JOB_STARTED": "started.sh",
    "ACTIONS_RUNNER_HOOK_JOB_COMPLETED": "completed.sh",
}
"""Variables of a runner's `.env`, and the scripts they name; GitHub wants the ending `.sh`."""

_LISTENER, _WORKER = "Runner.Listener", "Runner.Worker"
_UNITS = ("actions.runner.*", "mainrun-*")


@dataclass(frozen=True)
class Runner:
    """A folder with a runner in it."""

    label: str
    folder: str
    name: str = ""
    """As GitHub lists it; empty where it is not registered, or this user may not look."""
    repository: str = ""
    """Address it is registered at."""
    is_listening: bool = False
    is_busy: bool = False
    hooks: tuple[str, ...] = ()
    """The job hooks it is told to run."""
    is_ours: bool = True
    """Set up by us; false for one that runs from elsewhere, as on GitHub's own machines."""


@dataclass(frozen=True)
class Unit:
    name: str
    state: str
    """systemd's word: active, inactive, failed, …"""


def read(folder: Path | None = None, proc: Path = Path("/proc")) -> tuple[Runner, ...]:
    """The runners in `folder` (FOLDER), and those that run from elsewhere."""
    installed = _installed(folder or FOLDER)
    listening, busy = _folders_of(proc, _LISTENER), _folders_of(proc, _WORKER)
    return tuple(
        replace(
            _runner(path),
            is_listening=path in listening,
            is_busy=path in busy,
            is_ours=path in installed,
        )
        for path in sorted({*installed, *listening})
    )


def units() -> tuple[Unit, ...] | None:
    """The units of runners and of mainrun; None where systemd does not run."""
    command = ["systemctl", "list-units", "--all", "--plain", "--no-legend", "--no-pager", *_UNITS]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    rows = (line.split() for line in done.stdout.splitlines())
    return tuple(Unit(row[0], row[2]) for row in rows if len(row) > 3)


def _installed(folder: Path) -> list[Path]:
    try:
        return [path.resolve() for path in folder.iterdir() if path.is_dir()]
    except OSError:
        return []


def _folders_of(proc: Path, program: str) -> set[Path]:
    """Runner folders that a process of this name was started from: FOLDER/bin/PROGRAM."""
    return {
        Path(words[0]).resolve().parent.parent
        for words in _command_lines(proc, program)
        if Path(words[0]).name == program
    }


def _command_lines(proc: Path, program: str) -> Iterator[list[str]]:
    for path in proc.glob("[0-9]*"):
        try:
            if (path / "comm").read_text(encoding="utf-8", errors="replace").strip() != program:
                continue
            yield (path / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
        except OSError:  # it has ended, or is somebody else's business
            continue


def _runner(folder: Path) -> Runner:
    registered = _registration(folder)
    return Runner(
        label=folder.name,
        folder=str(folder),
        name=registered.get("agentName", ""),
        repository=registered.get("gitHubUrl", ""),
        hooks=_hooks(folder),
    )


def _registration(folder: Path) -> dict[str, str]:
    try:  # the runner writes it with a byte order mark
        read = json.loads((folder / ".runner").read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    if not isinstance(read, dict):
        return {}
    return {str(name): value for name, value in read.items() if isinstance(value, str)}


def _hooks(folder: Path) -> tuple[str, ...]:
    try:
        lines = (folder / ".env").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ()
    named = dict(line.split("=", 1) for line in lines if "=" in line)
    return tuple(named[name] for name in HOOKS if name in named)
