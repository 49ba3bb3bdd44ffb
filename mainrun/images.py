"""Images of ours: built from a checkout, tried, named `current` and `previous`, removed when old.

An image is named after the commit it was made of, `mainrun:<sha>`, and carries it in the label
`mainrun.sha`; `current` and `previous` are names that move. Containers keep the image that they
were started with, so nothing here disturbs a running job. What is built, and how, stands in
docker/Dockerfile; this file only starts the Docker command line, which knows every builder.
"""

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import docker
from docker.errors import APIError, DockerException, ImageNotFound, NotFound
from docker.models.images import Image
from requests.exceptions import RequestException

from mainrun import builder, containers, gpu
from mainrun.environment import git
from mainrun.errors import RunFailed, UserError
from mainrun.host import Host
from mainrun.stop import StopSignal, listening

REPOSITORY = "mainrun"
SHA = "mainrun.sha"
SMOKE = "mainrun.smoke"
"""Label of a smoke test's container; it is no job, so nobody takes it for a stray."""

Say = Callable[[str], None]

_DEVICES: dict[str, str] = {"cpu": "cpu", "cuda": "cuda12"}
_TINY = (
    "data.num_documents=200", "data.context_length=16", "tokenizer.vocab_size=320",
    "model.d_model=16", "model.num_layers=2", "model.mlp.hidden=32", "model.attention.num_heads=2",
    "training.max_steps=4", "training.batch_size=8", "training.num_samples=1",
    "tracking.wandb=disabled",
)  # fmt: skip
_SMOKE_SECONDS = 600
_SMOKE_MEMORY = "4g"
_DANGLING_SECONDS = 3600  # younger ones may be the steps of a build that is going on
_LOOK_SECONDS = 0.2
_TROUBLE = (DockerException, RequestException, OSError)


# --- build


def build(
    host: Host,
    *,
    context: Path,
    tag: str | None = None,
    stopping: StopSignal | None = None,
    say: Say,
) -> str:
    """The name of the image built from a checkout; `mainrun:<commit>` without a `tag`.

    Raises UserError where Docker or the checkout is missing, RunFailed with the reason, Stopped.
    """
    if not (context / "docker" / "Dockerfile").is_file():
        raise UserError(f"{context} is no checkout of mainrun: there is no docker/Dockerfile")
    if shutil.which("docker") is None:
        raise UserError("the program `docker` is not on PATH: install Docker's command line")
    client = containers.connect()
    commit = commit_of(context)
    name = image_name(tag or commit or "local")
    command = build_command(host, context=context, name=name, target=target(host), commit=commit)
    with contextlib.nullcontext(stopping) if stopping else listening() as stop:
        builder.run(client, command, stop, say)
    # Somebody's first image; later ones, and those of workflows, are promoted when they were tried.
    return name


def build_command(
    host: Host, *, context: Path, name: str, target: Literal["cpu", "cuda"], commit: str | None
) -> list[str]:
    """The command line client's arguments. Nothing secret can be among them: none is asked for."""
    arguments = {"DEVICE": _DEVICES[target], "COMMIT": commit or "unknown"}
    if host.base_image is not None:
        arguments["BASE_IMAGE"] = host.base_image
    return [
        "docker", "build",
        "--force-rm",  # a failed step leaves no container (builders before BuildKit)
        f"--file={context / 'docker' / 'Dockerfile'}",
        f"--target={target}",
        *(f"--build-arg={key}={value}" for key, value in arguments.items()),
        f"--tag={name}",
        str(context),
    ]  # fmt: skip


def target(host: Host) -> Literal["cpu", "cuda"]:
    """What `target: auto` means on this machine: cuda where there is an NVIDIA driver."""
    if host.target != "auto":
        return host.target
    return "cuda" if Path("/dev/nvidiactl").exists() or gpu.gpu_indices() else "cpu"


def commit_of(context: Path) -> str | None:
    """The commit that a checkout stands at, with `-dirty` where it differs; None without git.

    In a workflow it is GITHUB_SHA: what was dispatched, whatever the steps before left in the tree.
    """
    if sha := os.environ.get("GITHUB_SHA"):
        return sha
    sha = git(context, "rev-parse", "HEAD")
    if sha is None:
        return None
    return f"{sha}-dirty" if git(context, "status", "--porcelain") else sha


def image_name(tag: str) -> str:
    """`mainrun:TAG`, or the name itself where it has a repository. Raises UserError for no name."""
    name = tag if ":" in tag else f"{REPOSITORY}:{tag}"
    if not re.fullmatch(r"[a-z0-9][a-z0-9._/-]*:\w[\w.-]{0,127}", name, re.ASCII):
        raise UserError(f"--tag {tag!r} is no name for an image: for example mainrun:trial-2")
    return name


# --- try


def smoke_test(
    client: docker.DockerClient, image: str, *, stopping: StopSignal | None = None
) -> None:
    """Trains a tiny model for some steps in the image, as a job would, and keeps nothing of it.

    On the CPU, whatever the image is for: the GPUs belong to jobs. Raises RunFailed where the
    training does not end well, UserError where there is no such image, Stopped.
    """
    with contextlib.nullcontext(stopping) if stopping else listening() as stop:
        stop.check()
        try:
            container = client.containers.create(**smoke_options(image))
        except _TROUBLE as error:
            raise UserError(containers.plain_words(error, image)) from None
        try:
            container.start()
            code = _exit_code(client, str(container.id), stop)
            last = container.logs(tail=20).decode(errors="replace").strip().splitlines()
        except _TROUBLE as error:
            raise RunFailed(
                f"{image} could not be tried: {containers.plain_words(error)}"
            ) from None
        finally:
            containers.remove(client, str(container.id))
    if code != 0:
        said = last[-1] if last else "it said nothing"
        raise RunFailed(f"{image} failed its smoke test with exit code {code}: {said}")


def smoke_options(image: str) -> dict[str, Any]:
    """What Docker is asked for: the rights of a job, no network, and no folder of the machine."""
    return {
        "image": image,
        "command": ["task", "-x", "train", "--", *_TINY],
        "labels": {SMOKE: "true"},
        "environment": {"HOME": "/tmp", "JAX_PLATFORMS": "cpu", "MAINRUN_GPUS": "none"},
        "user": f"{os.getuid()}:{os.getgid()}",
        "init": True,
        "read_only": True,
        "tmpfs": {"/tmp": "rw,nosuid,nodev,mode=1777", "/app/runs": "rw,nosuid,nodev,mode=1777"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "mem_limit": _SMOKE_MEMORY,
        "memswap_limit": _SMOKE_MEMORY,
        "pids_limit": 4096,
        "network_mode": "none",
    }


def _exit_code(client: docker.DockerClient, container_id: str, stop: StopSignal) -> int:
    until = time.monotonic() + _SMOKE_SECONDS
    while True:
        state = client.api.inspect_container(container_id)["State"]
        if state["Status"] in ("exited", "dead"):
            return int(state["ExitCode"])
        stop.check()
        if time.monotonic() > until:
            raise RunFailed(f"the smoke test did not end within {_SMOKE_SECONDS // 60} minutes")
        time.sleep(_LOOK_SECONDS)


# --- name and remove


def update(host: Host, *, context: Path, stopping: StopSignal | None = None, say: Say) -> list[str]:
    """Builds, tries and promotes the checkout's image, removes old ones; what was done, in words.

    A failed build or smoke test raises, and every name stays where it was.
    """
    with contextlib.nullcontext(stopping) if stopping else listening() as stop:
        name = build(host, context=context, stopping=stop, say=say)
        client = containers.connect()
        smoke_test(client, name, stopping=stop)
        stop.check()
        done = [f"built and tried {name}", promote(client, name)]
        return done + [f"removed {image}" for image in prune(client, host.keep_images)]


def promote(client: docker.DockerClient, image: str, *, repository: str = REPOSITORY) -> str:
    """Makes it `current`, and what was current `previous`; says so. UserError without the image."""
    new = _find(client, image)
    if new is None:
        raise UserError(f"the image {image} is not on this machine: `mainrun image build` makes it")
    before = _find(client, f"{repository}:current")
    if before is not None and before.id == new.id:
        return f"{repository}:current is {image} already"
    if before is not None:
        before.tag(repository, "previous")
    new.tag(repository, "current")
    return f"{repository}:current is now {image}{f', after {_sha(before)}' if before else ''}"


def rollback(client: docker.DockerClient, *, repository: str = REPOSITORY) -> str:
    """Swaps `current` and `previous`; says so. UserError where there is nothing to go back to."""
    current = _find(client, f"{repository}:current")
    previous = _find(client, f"{repository}:previous")
    if previous is None or (current is not None and current.id == previous.id):
        raise UserError(
            f"no image to go back to: {repository}:previous is "
            f"{'not there' if previous is None else 'the current one'}"
        )
    previous.tag(repository, "current")
    if current is not None:
        current.tag(repository, "previous")
    return f"{repository}:current is back at {_sha(previous)}"


def prune(
    client: docker.DockerClient, keep_days: int, *, repository: str = REPOSITORY
) -> list[str]:
    """Removes images of ours that nobody needs; returns their names, or ids where they have none.

    Needed are `current`, `previous`, what a container uses, and what was named in the last
    `keep_days`: an image that was built again from the cache is as old as its layers.
    """
    for entry in client.api.containers(all=True, filters={"label": SMOKE, "status": "exited"}):
        if time.time() - entry["Created"] >= _DANGLING_SECONDS:  # its test was killed
            containers.remove(client, entry["Id"])
    used = {entry["ImageID"] for entry in client.api.containers(all=True)}
    used |= {
        image.id
        for tag in ("current", "previous")
        if (image := _find(client, f"{repository}:{tag}")) is not None
    }
    removed = []
    for entry in client.api.images(filters={"label": SHA}):
        names = [name for name in entry["RepoTags"] or [] if name != "<none>:<none>"]
        age_seconds = time.time() - _last_touched(client, entry)
        keep_seconds = keep_days * 86400 if names else _DANGLING_SECONDS
        if entry["Id"] in used or age_seconds < keep_seconds:
            continue
        ours = [name for name in names if name.startswith(f"{repository}:")]
        removed += [name for name in (ours if names else [entry["Id"]]) if _remove(client, name)]
    return removed


def _last_touched(client: docker.DockerClient, entry: dict[str, Any]) -> float:
    """Seconds since the epoch: when it was made or last named, whichever is later."""
    try:
        named = client.api.inspect_image(entry["Id"])["Metadata"]["LastTagTime"]
    except NotFound:
        return time.time()  # gone meanwhile: nothing to remove
    return max(float(entry["Created"]), _seconds(named))


def _seconds(timestamp: str) -> float:
    """`2026-11-23T05:14:07.123456789Z`, or with an offset; the year 1 stands for never."""
    found = re.match(r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.\d+)?(Z|[+-]\d\d:\d\d)", timestamp)
    if found is None or found[1].startswith("0001"):
        return 0.0
    return datetime.fromisoformat(found[1] + found[2].replace("Z", "+00:00")).timestamp()


def _remove(client: docker.DockerClient, name: str) -> bool:
    """Whether it went; what a container has begun to use meanwhile stays."""
    try:
        client.api.remove_image(name)
    except NotFound:
        return False
    except APIError as error:
        if error.status_code == 409:
            return False
        raise
    return True


def _find(client: docker.DockerClient, name: str) -> Image | None:
    try:
        return client.images.get(name)
    except ImageNotFound:
        return None


def _sha(image: Image) -> str:
    """The commit it was made of, or its id where it is none of ours."""
    return str(image.labels.get(SHA) or image.short_id)
