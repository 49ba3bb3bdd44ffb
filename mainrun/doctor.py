"""Is this machine ready: each thing that training and jobs need, what was found, what to do.

Training needs Python and nothing else. Jobs in containers need Docker too, jobs from GitHub a
runner; a machine without them is a laptop and no patient. On a machine that is set up for jobs
(it has runners or settings of its own) the same lack is a problem. Nothing is changed here, and
no secret is shown.
"""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from mainrun import machine, runners
from mainrun.console import printable
from mainrun.host import SYSTEM_FILE, Host, num_bytes
from mainrun.machine import Machine
from mainrun.machine_report import gib
from mainrun.runners import Runner
from mainrun.wandb_run import has_key

State = Literal["ok", "absent", "warning", "problem"]
"""`absent`: not here, and nothing on this machine asks for it."""

GITHUB_SETTINGS = (
    "Actions, General: approval is required for all outside collaborators",
    "Actions, General: actions must be pinned to a full-length commit SHA",
    "Actions, General: the workflow token is read-only, and Actions may not create pull requests",
    "Actions, General: a private repository runs no workflows of fork pull requests",
    "Actions, Runners: the repository is private, or nobody outside can start a workflow",
    "Actions, Runners: both runners are registered at this repository, not at the organisation",
    "Environments: `gpu` is limited to the branch main and holds WANDB_API_KEY",
    "Branches: main is protected, and changes to .github need a review",
)
"""What only an admin of the repository can see."""

_ENGINE, _RUNNERS = "Docker", "GitHub runners"
_WIDTH = 100
_LEAST_DRIVER, _CUDA_13_DRIVER = 525, 580  # for CUDA 12 and 13, as JAX's documents say
_LEAST_TOOLKIT = (1, 18)  # before it, containers lose their GPUs at a `systemctl daemon-reload`
_LEAST_ENGINE = 24
_LEAST_MEMORY = 8 * 2**30
HOOK_FOLDER = "/opt/mainrun/current/.github/runner/hooks"
"""Where `.github/runner/setup.sh` puts them."""


@dataclass(frozen=True)
class Check:
    name: str
    state: State
    finding: str
    remedy: str = ""


def examine(host: Host) -> list[Check]:
    """All checks of this machine, with its settings `host`. Takes about a second."""
    return checks(machine.read(host), host)


def checks(found: Machine, host: Host) -> list[Check]:
    """What a machine in this state, with these settings, has and lacks."""
    is_for_jobs = any(runner.is_ours for runner in found.runners) or SYSTEM_FILE.exists()
    lack: State = "problem" if is_for_jobs else "absent"
    general = [
        _system(),
        _python(found),
        _driver(found),
        *_docker(found, lack),
        *_disk(found, host, lack),
        _memory(found, host),
        *_folders(host, lack),
        _wandb(is_for_jobs),
        _clock(is_for_jobs),
    ]
    return general + (_runners(found) if is_for_jobs else [_no_runners()])


def has_problems(found: Iterable[Check]) -> bool:
    return any(check.state == "problem" for check in found)


def table(found: Sequence[Check]) -> str:
    """The checks line by line with their remedies, what they come to, what GitHub must be asked."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        text = check.finding + (f". {check.remedy}" if check.remedy else "")
        begin = f"{check.state:8} {check.name:{width}}  "
        lines += textwrap.wrap(
            printable(text), _WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin)
        )
    lines += ["", *textwrap.wrap(_conclusion(found), _WIDTH)]
    lines += ["", "To check on GitHub, where only an admin can look:"]
    return "\n".join([*lines, *(f"  {setting}" for setting in GITHUB_SETTINGS)])


def as_dict(found: Sequence[Check]) -> dict[str, Any]:
    return {
        "ready": not has_problems(found),
        "checks": [asdict(check) for check in found],
        "conclusion": _conclusion(found),
        "github_settings": list(GITHUB_SETTINGS),
    }


def _conclusion(found: Sequence[Check]) -> str:
    if count := sum(check.state == "problem" for check in found):
        return f"{count} problem{'s' * (count > 1)}: this machine is not ready."
    absent = {check.name for check in found if check.state == "absent"}
    lines = ["Training works here."]
    if _ENGINE in absent:
        lines.append("Jobs in containers need Docker.")
    if _RUNNERS in absent:
        lines.append("Jobs from GitHub need a runner: see docs/runner.md.")
    return " ".join(lines) if absent & {_ENGINE, _RUNNERS} else "This machine is ready."


# ---------------------------------------------------------------------------------------------
# What training needs


def _system() -> Check:
    name = _os_name()
    if platform.system() != "Linux":
        return Check("system", "warning", name, "Training works; jobs and GPUs need Linux")
    if platform.machine() != "x86_64":
        return Check("system", "warning", name, "It is tried on x86_64 only")
    return Check("system", "ok", name)


def _os_name() -> str:
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.machine()}"


def _python(found: Machine) -> Check:
    jax, cuda = _version_of("jax"), _version_of("jax-cuda12-plugin")
    version = platform.python_version()
    if jax is None:
        return Check("Python", "ok", f"{version}, without JAX: enough to start jobs")
    what = f"{version} with JAX {jax} for {'CUDA 12' if cuda else 'the CPU'}"
    if found.gpus.cards and cuda is None:
        remedy = "Training here uses the CPU; MAINRUN_DEVICE=cuda12 ./task setup installs the other"
        return Check("Python", "warning", what, remedy)
    if sys.version_info < (3, 12):
        return Check("Python", "warning", what, "3.12 or newer gets a faster JAX")
    return Check("Python", "ok", what)


def _version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver(found: Machine) -> Check:
    gpus = found.gpus
    if not gpus.cards:
        reason = gpus.reason or "the driver sees no GPU"
        if found.gpus_expected:
            return Check("GPU", "problem", reason, "Mend the driver: `nvidia-smi` must answer")
        return Check("GPU", "absent", f"{reason}: training uses the CPU")
    cards = ", ".join(card.name or f"GPU {card.index}" for card in gpus.cards)
    what = f"{cards}; driver {gpus.driver_version}"
    major = int((gpus.driver_version or "0").split(".")[0])
    if major < _LEAST_DRIVER:
        return Check("GPU", "problem", what, f"CUDA 12 needs driver {_LEAST_DRIVER} or newer")
    faults = [problem for problem in found.problems if problem.startswith("GPU ")]
    if faults:
        return Check("GPU", "problem", f"{what}; {'; '.join(faults)}")
    return Check("GPU", "ok", f"{what}, for CUDA {'12 and 13' if major >= _CUDA_13_DRIVER else 12}")


def _wandb(is_for_jobs: bool) -> Check:
    if has_key():
        return Check("W&B key", "ok", "found, not shown")
    if is_for_jobs:
        return Check("W&B key", "ok", "none here: a job gets it from GitHub's environment gpu")
    return Check("W&B key", "absent", "none: runs are kept offline; `wandb login` goes online")


# ---------------------------------------------------------------------------------------------
# What containers need


def _docker(found: Machine, lack: State) -> Iterable[Check]:
    engine = found.engine
    if engine is None:
        yield Check(_ENGINE, lack, found.engine_missing)
        return
    major = int(re.match(r"\d*", engine.version)[0] or 0)  # type: ignore[index]
    if major < _LEAST_ENGINE:
        remedy = f"{_LEAST_ENGINE} or newer is what GPUs are documented for"
        yield Check(_ENGINE, "warning", f"Engine {engine.version}", remedy)
    elif not engine.limits_memory:
        remedy = "A job could starve the machine: boot with cgroup memory limits"
        yield Check(_ENGINE, "warning", f"Engine {engine.version} cannot limit memory", remedy)
    else:
        yield Check(_ENGINE, "ok", f"Engine {engine.version}")
    if engine.is_rootless:
        yield Check("Docker rights", "ok", "rootless")
    else:
        remedy = "Let nothing else live on this machine, or run Docker rootless"
        yield Check(
            "Docker rights", "warning", "who may use Docker is root on this machine", remedy
        )
    if found.gpus.cards:
        yield _toolkit(found)
    yield _image(found)


def _toolkit(found: Machine) -> Check:
    name = "Container Toolkit"
    assert found.engine is not None
    if found.toolkit is None:
        remedy = "Without it no container sees a GPU: see docs/runner.md"
        return Check(name, "problem", "nvidia-ctk is not there", remedy)
    if not found.engine.gives_gpus:
        remedy = "Run `nvidia-ctk runtime configure --runtime=docker`, then restart Docker"
        return Check(name, "problem", f"{found.toolkit}, unknown to Docker", remedy)
    numbers = tuple(int(part) for part in re.findall(r"\d+", found.toolkit)[:2])
    if numbers < _LEAST_TOOLKIT:
        remedy = "From 1.18 a running container keeps its GPU when systemd reloads"
        return Check(name, "warning", found.toolkit, remedy)
    return Check(name, "ok", found.toolkit)


def _image(found: Machine) -> Check:
    tags = {tag.rpartition(":")[2] for image in found.images for tag in image.tags}
    if "current" not in tags:
        remedy = "`mainrun image update` makes it; a job from GitHub makes its own"
        return Check("image", "absent", "no mainrun:current", remedy)
    if "previous" not in tags:
        return Check("image", "ok", "mainrun:current, none before it to roll back to")
    return Check("image", "ok", "mainrun:current and mainrun:previous")


def _disk(found: Machine, host: Host, lack: State) -> Iterable[Check]:
    least = num_bytes(host.free_disk)
    for disk in found.disks:
        what = f"{gib(disk.free_bytes)} free for {', '.join(disk.holds)}"
        if disk.free_bytes < least:
            state: State = "problem" if lack == "problem" else "warning"
            yield Check("disk", state, what, f"A job wants {gib(least)} (free_disk): make room")
        else:
            yield Check("disk", "ok", what)


def _memory(found: Machine, host: Host) -> Check:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    what = f"{gib(total)}, a job may take {gib(host.memory_bytes)}"
    if host.memory_bytes > total:
        remedy = "`memory` in the host's settings is more than there is"
        return Check("memory", "problem", what, remedy)
    if total < _LEAST_MEMORY:
        return Check("memory", "warning", what, "Small models only")
    return Check("memory", "ok", what)


def _folders(host: Host, lack: State) -> Iterable[Check]:
    wanted = {**host.folders(), "locks": Path(host.locks)}
    if homeless := [name for name in ("runs", "cache") if name not in wanted]:
        remedy = "Set HOME, or name them in the host's settings; MAINRUN_CACHE_DIR for training"
        yield Check("home", "problem", f"this user has none, for {' and '.join(homeless)}", remedy)
    refused = [name for name, folder in wanted.items() if not _can_write(folder)]
    if refused:
        named = ", ".join(f"{name} ({wanted[name]})" for name in refused)
        remedy = "Give this user the folders, or name others in the host's settings"
        state: State = "problem" if lack == "problem" else "warning"
        yield Check("folders", state, f"no right to write {named}", remedy)
    else:
        yield Check("folders", "ok", f"{', '.join(wanted)} can be written")
    if host.data is not None:
        data = Path(os.path.expanduser(host.data))
        if os.access(data, os.R_OK | os.X_OK):
            yield Check("data", "ok", str(data))
        else:
            remedy = "Make it, or take `data` out of the host's settings"
            yield Check("data", "problem", f"{data} cannot be read", remedy)


def _can_write(folder: Path) -> bool:
    """Into it, or where it would be made."""
    place = next(
        place for place in (folder.absolute(), *folder.absolute().parents) if place.exists()
    )
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


# ---------------------------------------------------------------------------------------------
# What jobs from GitHub need


def _clock(is_for_jobs: bool) -> Check:
    """TLS and GitHub's tokens fail on a clock that is minutes off."""
    command = ["timedatectl", "show", "--property", "NTPSynchronized", "--value"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        state: State = "warning" if is_for_jobs else "absent"
        return Check("clock", state, "whether it is kept right cannot be told (no timedatectl)")
    if done.stdout.strip() == "yes":
        return Check("clock", "ok", "kept right over the network")
    return Check("clock", "warning", "not kept right", "Run `timedatectl set-ntp true`")


def _no_runners() -> Check:
    return Check(_RUNNERS, "absent", "none on this machine")


def _runners(found: Machine) -> list[Check]:
    there = {runner.label: runner for runner in found.runners}
    judged = []
    for label in runners.LABELS:
        name = f"runner {label}"
        if label not in there:
            remedy = "Run .github/runner/setup.sh: see docs/runner.md"
            judged.append(Check(name, "problem", f"none in {runners.FOLDER}/{label}", remedy))
        else:
            judged.append(_runner(name, there[label]))
    return [*judged, *_units(found)]


def _runner(name: str, runner: Runner) -> Check:
    wanted = tuple(f"{HOOK_FOLDER}/{hook}" for hook in runners.HOOKS.values())
    if not runner.name:
        return Check(name, "problem", "not registered", "Run setup.sh with --url and a token")
    if not runner.is_listening:
        remedy = f"Run `systemctl status actions.runner.mainrun.{runner.label}`"
        return Check(name, "problem", f"{runner.name} does not listen", remedy)
    if runner.hooks != wanted:
        remedy = "Run setup.sh again: it writes them into the runner's .env"
        return Check(name, "problem", f"{runner.name} lacks our job hooks", remedy)
    writable = [hook for hook in wanted if not os.access(hook, os.X_OK)]
    if writable:
        return Check(name, "problem", f"{', '.join(writable)} cannot be run", "Run setup.sh again")
    return Check(name, "ok", f"{runner.name} listens, with our job hooks")


def _units(found: Machine) -> Iterable[Check]:
    remedy = "Run setup.sh again"
    if found.units is None:
        yield Check("services", "warning", "systemd does not run: nothing starts by itself")
        return
    states = {unit.name: unit.state for unit in found.units}
    for name, unit, does in (
        ("prune timer", "mainrun-prune.timer", "old images and strays are removed daily"),
        ("metadata block", "mainrun-metadata.service", "containers cannot ask 169.254.169.254"),
    ):
        if states.get(unit) == "active":
            yield Check(name, "ok", does)
        else:
            yield Check(name, "warning", f"{unit} is {states.get(unit, 'not there')}", remedy)
