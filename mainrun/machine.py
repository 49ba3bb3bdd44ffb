"""The state of the machine: GPUs and whose processes use them, our containers, disks, runners.

`read` looks at all of it once, from the host and without a container, in well under a second. What
is not there (no driver, no Docker, no runner) is a fact and no fault: a fault is what should work
here and does not, and `Machine.problems` names each in a sentence. machine_report.py shows it.
"""

import contextlib
import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException
from requests.exceptions import RequestException

from mainrun import containers, gpu, runners
from mainrun.containers import Container
from mainrun.errors import UserError, one_line
from mainrun.gpu import Gpus, GpuStatus
from mainrun.host import Host
from mainrun.runners import Runner, Unit

FULL_PERCENT = 90.0
"""A disk this full is a fault: a checkpoint of the next job may not fit."""

_SHA = "mainrun.sha"
_CONTAINER_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")


@dataclass(frozen=True)
class Process:
    """A process that has memory on a GPU."""

    gpu: int
    pid: int
    used_bytes: int | None
    name: str
    user: str
    container: str
    """Name of our container that it runs in, "another container", or empty: on the host itself."""
    by: str = ""
    url: str = ""
    """Of the workflow run that started its container."""


@dataclass(frozen=True)
class Engine:
    """The Docker Engine that answers."""

    version: str
    root: str
    is_rootless: bool
    gives_gpus: bool
    """Whether the NVIDIA runtime or the device interface CDI is set up."""
    limits_memory: bool


@dataclass(frozen=True)
class Disk:
    holds: tuple[str, ...]
    """What of ours lies on it: runs, cache, Docker."""
    path: str
    free_bytes: int
    total_bytes: int
    used_percent: float


@dataclass(frozen=True)
class Image:
    id: str
    sha: str
    tags: tuple[str, ...]
    created: datetime


@dataclass(frozen=True)
class Machine:
    read_at: datetime
    gpus: Gpus
    gpus_expected: bool
    """Whether this machine should have one: its settings or the driver's device file say so."""
    toolkit: str | None
    """Version of the NVIDIA Container Toolkit."""
    processes: tuple[Process, ...]
    engine: Engine | None
    engine_missing: str
    """Why there is no Engine; empty where one answers."""
    containers: tuple[Container, ...]
    strays: tuple[str, ...]
    """Names of our containers whose job nobody watches over any more."""
    images: tuple[Image, ...]
    """Ours, the newest first."""
    images_bytes: int
    """Of all of them, each layer counted once however many share it."""
    disks: tuple[Disk, ...]
    runners: tuple[Runner, ...]
    units: tuple[Unit, ...] | None
    """None where systemd does not run."""

    @property
    def problems(self) -> tuple[str, ...]:
        """What should work on this machine and does not, each in a sentence with its remedy."""
        return (
            *_gpu_problems(self),
            *_engine_problems(self),
            *_disk_problems(self),
            *_runner_problems(self),
        )


def read(host: Host) -> Machine:
    """The machine as it is now."""
    gpus = gpu.read()
    engine, missing = None, ""
    ours: Sequence[Container] = ()
    strays: Sequence[str] = ()
    images: Sequence[Image] = ()
    images_bytes = 0
    try:
        client = containers.connect(timeout_seconds=5)
        engine = _engine(client.info())
        ours, strays = _containers(client)
        images, images_bytes = _images(client)
    except (UserError, DockerException, RequestException) as error:
        missing = one_line(error)
    return Machine(
        read_at=datetime.now(UTC),
        gpus=gpus,
        gpus_expected=_gpus_expected(host, gpus),
        toolkit=_toolkit(),
        processes=tuple(_process(card.index, used, ours) for card, used in _users(gpus)),
        engine=engine,
        engine_missing=missing,
        containers=tuple(ours),
        strays=tuple(strays),
        images=tuple(images),
        images_bytes=images_bytes,
        disks=tuple(disks(host, engine.root if engine else None)),
        runners=runners.read(),
        units=runners.units(),
    )


def container_ids(cgroup: str) -> list[str]:
    """Ids of the containers that a process is in, by its `/proc/PID/cgroup`; the innermost last.

    Both versions of cgroups, both drivers of Docker, rootless or not: what is common to
    `4:memory:/docker/ID` and `0::/system.slice/docker-ID.scope` is the id itself.
    """
    return list(dict.fromkeys(_CONTAINER_ID.findall(cgroup)))


def disks(host: Host, docker_root: str | None) -> list[Disk]:
    """The disks that runs, caches and Docker lie on, each once."""
    folders = host.folders()
    if docker_root is not None and Path(docker_root).exists():  # the Engine may be elsewhere
        folders["Docker"] = Path(docker_root)
    found: dict[int, Disk] = {}
    for name, folder in folders.items():
        place = _existing(folder.absolute())
        device = place.stat().st_dev
        usage = shutil.disk_usage(place)
        holds = (*found[device].holds, name) if device in found else (name,)
        found[device] = Disk(
            holds=holds,
            path=found[device].path if device in found else str(place),
            free_bytes=usage.free,
            total_bytes=usage.total,
            # As `df` has it: what is kept for root counts as neither used nor free.
            used_percent=100 * usage.used / max(usage.used + usage.free, 1),
        )
    return list(found.values())


# ---------------------------------------------------------------------------------------------
# Looking


def _gpus_expected(host: Host, gpus: Gpus) -> bool:
    if host.gpus not in ("auto", "none") or Path("/dev/nvidiactl").exists():
        return True
    # A driver that a new kernel left behind: the card is there, the library too, no device file.
    return gpus.reason not in ("", gpu.NO_DRIVER) and _has_nvidia_card()


def _has_nvidia_card() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            kind = vendor.with_name("class").read_text()
            if vendor.read_text().strip() == "0x10de" and kind.startswith("0x03"):
                return True
    return False


def _toolkit() -> str | None:
    try:
        done = subprocess.run(
            ["nvidia-ctk", "--version"], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"\d+\.\d+[\w.~-]*", done.stdout)
    return found[0] if found else None


def _users(gpus: Gpus) -> Iterable[tuple[GpuStatus, gpu.GpuProcess]]:
    return ((card, used) for card in gpus.cards for used in card.processes or ())


def _process(index: int, used: gpu.GpuProcess, ours: Iterable[Container]) -> Process:
    folder = Path("/proc") / str(used.pid)
    ids = container_ids(_read(folder / "cgroup"))
    owner = next((container for container in ours if container.id in ids), None)
    elsewhere = "another container" if ids else ""
    return Process(
        gpu=index,
        pid=used.pid,
        used_bytes=used.used_bytes,
        name=_read(folder / "comm").strip(),
        user=_user(folder),
        container=owner.name if owner else elsewhere,
        by=owner.by if owner else "",
        url=owner.url if owner else "",
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return ""


def _user(folder: Path) -> str:
    try:
        uid = folder.stat().st_uid
    except OSError:
        return ""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _engine(info: Mapping[str, Any]) -> Engine:
    devices = [device.get("ID", "") for device in info.get("DiscoveredDevices") or ()]
    specs = [name for folder in info.get("CDISpecDirs") or () for name in _names(Path(folder))]
    return Engine(
        version=info["ServerVersion"],
        root=info["DockerRootDir"],
        is_rootless=any("name=rootless" in option for option in info.get("SecurityOptions") or ()),
        gives_gpus="nvidia" in (info.get("Runtimes") or ())
        or any("nvidia.com/gpu" in text for text in devices)
        or any("nvidia" in name for name in specs),
        limits_memory=bool(info.get("MemoryLimit", True)),
    )


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _containers(client: docker.DockerClient) -> tuple[list[Container], list[str]]:
    """Ours, and the names of the strays among them."""
    ours = containers.ours(client)
    unwatched = {container.id for container in ours if containers.is_stray(container)}
    if unwatched:  # one that ended between the two looks is no stray: see whether it is gone
        unwatched &= {container.id for container in containers.ours(client)}
    return ours, [container.name for container in ours if container.id in unwatched]


def _images(client: docker.DockerClient) -> tuple[list[Image], int]:
    """Ours, and the bytes of all their layers; the Engine's own sizes count shared ones again."""
    found = client.api.images(filters={"label": _SHA})
    layers = {
        (layer["Created"], layer.get("CreatedBy", ""), layer["Size"])
        for entry in found
        for layer in client.api.history(entry["Id"])
    }
    images = [
        Image(
            id=entry["Id"],
            sha=entry["Labels"][_SHA],
            tags=tuple(sorted(tag for tag in entry["RepoTags"] or () if "<none>" not in tag)),
            created=datetime.fromtimestamp(entry["Created"], UTC),
        )
        for entry in found
    ]
    newest_first = sorted(images, key=lambda image: image.created, reverse=True)
    return newest_first, sum(size for _, _, size in layers)


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


# ---------------------------------------------------------------------------------------------
# Judging


def _gpu_problems(machine: Machine) -> Iterable[str]:
    if machine.gpus_expected and not machine.gpus.cards:
        why = machine.gpus.reason or "the driver sees none"
        yield f"no GPU answers, and this machine should have one: {why}"
    for card in machine.gpus.cards:
        which = f"GPU {card.index}" + (f" ({card.name})" if card.name else "")
        if card.fault:
            yield f"{which} does not answer: {card.fault}"
        if card.ecc_uncorrected:
            errors = f"{card.ecc_uncorrected} memory error{'s' * (card.ecc_uncorrected > 1)}"
            yield f"{which} had {errors} that could not be mended: let it run empty, then reset it"
        if faults := [word for word in card.throttling or () if word in gpu.FAULTY_THROTTLING]:
            yield f"{which} slows itself down ({', '.join(faults)}): see to its cooling and power"


def _engine_problems(machine: Machine) -> Iterable[str]:
    if machine.engine is None and any(runner.is_ours for runner in machine.runners):
        yield f"jobs cannot run: {machine.engine_missing}"
    for container in machine.containers:
        if container.health == "unhealthy":
            yield f"the container {container.name} is unhealthy: `docker logs {container.name}`"
        if container.name in machine.strays:
            yield (
                f"the container {container.name} is a stray, nobody watches over it: "
                "`mainrun launch --reap` lets it save and removes it"
            )


def _disk_problems(machine: Machine) -> Iterable[str]:
    for disk in machine.disks:
        if disk.used_percent > FULL_PERCENT:
            yield (
                f"the disk of {' and '.join(disk.holds)} is {disk.used_percent:.0f} % full: remove "
                "old runs, or old images with `mainrun image prune`"
            )


def _runner_problems(machine: Machine) -> Iterable[str]:
    for runner in machine.runners:
        if runner.name and not runner.is_listening:
            yield f"the runner {runner.name} does not listen: see `systemctl status` of its service"
    for unit in machine.units or ():
        if unit.state == "failed":
            yield f"the unit {unit.name} failed: `journalctl -u {unit.name}` says why"
