"""Our containers on this machine's Docker Engine: how they are marked, found, stopped and removed.

A container is ours by its labels, and by nothing else: what other people run on the machine is
never seen here. What the Engine refuses is said in the user's terms, with the remedy.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound

from mainrun import locks
from mainrun.errors import UserError, one_line

JOB = "mainrun.job"
TASK = "mainrun.task"
GPUS = "mainrun.gpus"
RUN = "mainrun.run"
URL = "mainrun.url"
BY = "mainrun.by"
LOCKS = "mainrun.locks"


@dataclass(frozen=True)
class Container:
    """One of our containers as the Engine lists it."""

    id: str
    name: str
    job: str
    task: str
    gpus: tuple[int, ...]
    run: str
    """Name of the run folder; empty where the task has none."""
    url: str
    """Of the workflow run that started it; empty for one started at a terminal."""
    by: str
    locks: str
    """Folder of the locks that its launcher holds: whether it is watched over is asked there."""
    image: str
    created: datetime
    state: str
    """The Engine's word: created, running, exited, …"""
    health: str
    """The Engine's word: starting, healthy, unhealthy; empty where nothing checks it."""


def connect(*, timeout_seconds: int = 60) -> docker.DockerClient:
    """The Engine that DOCKER_HOST names, or this machine's. UserError where none answers."""
    try:
        client = docker.from_env(timeout=timeout_seconds)
        client.ping()
    except (DockerException, OSError) as error:
        raise UserError(_unreachable(error)) from None
    return client


def ours(client: docker.DockerClient, job: str | None = None) -> list[Container]:
    """All containers of ours, of every state, or those of one job; the oldest first."""
    wanted = JOB if job is None else f"{JOB}={job}"
    # The plain listing: `containers.list` asks again for each, and one may be gone by then.
    found = client.api.containers(all=True, filters={"label": wanted})
    return sorted((_container(entry) for entry in found), key=lambda c: c.created)


def is_stray(container: Container) -> bool:
    """Whether what started it is gone: nobody holds its job's lock."""
    return not locks.is_held(Path(container.locks), locks.job(container.job))


def remove(client: docker.DockerClient, container_id: str) -> None:
    """Removes it and its anonymous volumes; one that is gone already is no trouble."""
    try:
        client.api.remove_container(container_id, v=True, force=True)
    except NotFound:
        pass
    except APIError as error:
        if "already in progress" not in str(error):
            raise


def plain_words(error: Exception, image: str = "") -> str:
    """What Docker's error means here, and what to do, in one line."""
    text = one_line(error)
    if isinstance(error, ImageNotFound) or "No such image" in text:
        return f"the image {image} is not on this machine: make it with `mainrun image build`"
    if "could not select device driver" in text or "unresolvable CDI devices" in text:
        return (
            "Docker cannot give GPUs to a container: the NVIDIA Container Toolkit is missing or "
            "not configured (see docs/runner.md), or ask for none with --gpus none"
        )
    if "nvidia-container-cli" in text or "nvml error" in text:
        return (
            f"the NVIDIA Container Toolkit cannot reach the GPU ({_tail(text)}): "
            "`nvidia-smi` and `mainrun doctor` say more"
        )
    if "no space left on device" in text:
        return "the disk of Docker is full: `docker system df` says of what"
    if isinstance(error, APIError) and error.status_code == 409 and "name" in text:
        return "a container of this job is already there: `mainrun launch --reap` removes a stray"
    if not isinstance(error, APIError):
        return _unreachable(error)
    return f"Docker refused: {_tail(text)}"


def _container(entry: Mapping[str, Any]) -> Container:
    labels = entry["Labels"]
    status = entry.get("Status", "")
    health = [word for word in ("unhealthy", "starting", "healthy") if f"({word}" in status]
    if "health: starting" in status:
        health = ["starting"]
    return Container(
        id=entry["Id"],
        name=entry["Names"][0].removeprefix("/") if entry.get("Names") else entry["Id"][:12],
        job=labels[JOB],
        task=labels.get(TASK, ""),
        gpus=tuple(int(index) for index in labels.get(GPUS, "").split(",") if index.isdigit()),
        run=labels.get(RUN, ""),
        url=labels.get(URL, ""),
        by=labels.get(BY, ""),
        locks=labels.get(LOCKS, ""),
        image=entry["Image"],
        created=datetime.fromtimestamp(entry["Created"], UTC),
        state=entry["State"],
        health=health[0] if health else "",
    )


def _unreachable(error: Exception) -> str:
    text = one_line(error)
    if "PermissionError" in text or "Permission denied" in text:
        return "this user may not speak to Docker: be in the group `docker`, or run it rootless"
    return f"no Docker Engine answers ({_tail(text)}): is it installed and started?"


def _tail(text: str) -> str:
    """The end of a long message: Docker puts the cause last."""
    return text if len(text) <= 200 else "…" + text[-200:]
