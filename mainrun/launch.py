"""A task in a container, from the request to the end of it, with nothing left behind.

What the container may do is a pure function of request and host (`container_options`). It is
started, its output passed on, a stop request handed to it once; then it is removed, and how it
ended is said in words. Locks are held meanwhile, one per GPU and one for the job, so what runs
without a holder is a stray (its launcher was killed), and may be stopped by whoever finds it.
"""

import codecs
import contextlib
import getpass
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import docker
from docker.errors import DockerException, NotFound
from docker.types import DeviceRequest, LogConfig, Mount, Ulimit
from requests.exceptions import RequestException

from mainrun import containers, gpu, locks
from mainrun.containers import Container
from mainrun.environment import secret_values, without_secrets
from mainrun.errors import RunFailed, UserError
from mainrun.host import Host, num_bytes
from mainrun.stop import StopSignal

TASKS = ("train", "resume", "sweep", "evaluate", "generate", "config")
STOP_SECONDS = 165
"""From a stop request to the kill by Docker: more than the entrypoint's own grace, less than the
workflow's step Stop has, whose end leaves its container behind."""

_LOOK_SECONDS = 0.2
_TAIL_LINES = 60
_TROUBLE = (DockerException, RequestException, OSError)

Kind = Literal["finished", "failed", "stopped", "refused", "out_of_memory", "killed", "lost"]


@dataclass(frozen=True)
class Request:
    """One task to be run: what, in which image, with which GPUs, for whom."""

    task: str
    words: tuple[str, ...]
    label: str
    image: str
    gpus: tuple[int, ...] = ()
    """Indices on this machine; none: the task runs on the CPU."""
    run: str = ""
    """Name of the run folder; empty where the task writes none."""
    url: str = ""
    by: str = ""

    def who(self) -> str:
        """The job in words, for those who wait for it."""
        return f"job {self.label} ({self.task}{f' by {self.by}' if self.by else ''})"


@dataclass(frozen=True)
class Ending:
    """How a job ended: for programs (`kind`, `exit_code`) and for people."""

    kind: Kind
    exit_code: int
    sentence: str
    remedy: str = ""


def launch(
    request: Request, host: Host, *, stopping: StopSignal, output: Callable[[str], None]
) -> Ending:
    """Runs the task to its end; its lines go to `output`, without secrets.

    Nobody may be listening any more (a closed terminal, a runner that was killed): OSError from
    `output` does not end the job before it has saved.

    Raises UserError where it cannot be started, Stopped for a stop before it was.
    """
    _check_words(request.words)
    client = containers.connect()
    secrets = secret_values()
    holders: list[str] = []

    def tell(line: str) -> None:
        with contextlib.suppress(OSError):
            output(line)

    def waiting(holder: str) -> None:
        if holder not in holders[-1:]:
            tell(f"waiting: {holder}")
            holders.append(holder)
        stopping.check()

    names = [locks.job(request.label), *map(locks.gpu, request.gpus)]
    with locks.held(
        Path(host.locks), names, who=request.who(), wait_seconds=float(host.wait), waiting=waiting
    ):
        for stray in _in_the_way(client, request):
            tell(f"stopping {stray.name}: it was left behind by a job that is gone")
            containers.stop(client, stray, timeout_seconds=STOP_SECONDS)
        stopping.check()
        options = container_options(request, host, passed=_passed(host))
        container_id = _create(client, request, options)
        try:
            return _run(client, container_id, host, stopping, secrets, tell)
        finally:
            containers.remove(client, container_id)


def container_options(
    request: Request, host: Host, *, passed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What Docker is asked for: nothing but a user's rights, and only these folders.

    Values in `passed` are secrets and stay out of it: they go through the container's stdin, since
    its environment can be read by `docker inspect`.
    """
    environment = {
        "HOME": "/tmp",
        "MAINRUN_CACHE_DIR": "/cache",
        "HF_HOME": "/cache/huggingface",
        "MAINRUN_GRACE_SECONDS": str(host.grace),
        "MAINRUN_GPUS": str(len(request.gpus)) if request.gpus else "none",
        # Never both: a GPU that cannot be used is an error, and no silent run on the CPU.
        "JAX_PLATFORMS": "cuda" if request.gpus else "cpu",
    }
    if request.gpus:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(host.gpu_memory_fraction)
    if passed:
        environment["MAINRUN_SECRETS"] = "stdin"
    mounts = [
        Mount("/app/runs", str(host.runs_dir.resolve()), type="bind"),
        Mount("/cache", str(host.cache_dir.resolve()), type="bind"),
    ]
    if host.data is not None:
        data = Path(host.data).expanduser().resolve()
        mounts.append(Mount("/app/data", str(data), type="bind", read_only=True))
    # By index and not "all": a container sees the GPUs that it holds the locks of.
    devices = DeviceRequest(
        device_ids=[str(index) for index in request.gpus], capabilities=[["gpu"]]
    )
    return {
        "image": request.image,
        "command": ["task", "-x", request.task, "--", *request.words],
        "name": f"mainrun-{request.label}",
        "labels": {
            containers.JOB: request.label,
            containers.TASK: request.task,
            containers.GPUS: ",".join(map(str, request.gpus)),
            containers.RUN: request.run,
            containers.URL: request.url,
            containers.BY: request.by,
            containers.LOCKS: str(Path(host.locks).resolve()),
        },
        "environment": environment,
        "user": f"{os.getuid()}:{os.getgid()}",
        "init": True,
        "stdin_open": bool(passed),
        "read_only": True,
        "tmpfs": {"/tmp": f"rw,nosuid,nodev,mode=1777,size={num_bytes(host.tmp_size)}"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "mounts": mounts,
        "device_requests": [devices] if request.gpus else [],
        "mem_limit": host.memory_bytes,
        "memswap_limit": host.memory_bytes,  # no swap on top: it would hide the limit
        "nano_cpus": round(host.cpus * 1e9) if host.cpus else None,
        "shm_size": num_bytes(host.shm_size),
        "pids_limit": host.pids,
        "ulimits": [Ulimit(name="memlock", soft=-1, hard=-1)] if host.memlock else [],
        "network_mode": host.network,
        "log_config": LogConfig(type="local", config={"max-size": "20m", "max-file": "5"}),
    }


def request_here(task: str, words: Sequence[str], host: Host) -> Request:
    """The request of somebody at a terminal: named after the time, its run in `runs/`.

    Raises UserError for a run that this machine does not have.
    """
    if task not in TASKS:
        raise UserError(f"{task!r} is no task of a container: there are {', '.join(TASKS)}")
    label = f"{datetime.now():%Y%m%d-%H%M%S}"
    words, run = list(words), ""
    match task:
        case "train" | "sweep":
            stem = next((Path(word).stem for word in words if "=" not in word), "quickstart")
            words, run = _with_run_dir(words, default=f"{label}-{stem.lstrip('-')}")
        case "resume" | "evaluate" | "generate":
            run = Path(words[0]).name if words else ""
            if not run or not (host.runs_dir / run).is_dir():
                raise UserError(f"{task}: {run or 'no run'} is not in {host.runs_dir}")
            words[0] = f"runs/{run}"
    return Request(
        task=task,
        words=tuple(words),
        label=label,
        image=host.image,
        gpus=chosen_gpus(host.gpus),
        run=run,
        by=getpass.getuser(),
    )


def _with_run_dir(words: list[str], *, default: str) -> tuple[list[str], str]:
    """The words with a run folder under `runs/`, and its name."""
    if "--run-dir" not in words:
        return [*words, "--run-dir", f"runs/{default}"], default
    at = words.index("--run-dir") + 1
    run = Path(words[at]).name if at < len(words) else default
    return [*words[:at], f"runs/{run}", *words[at + 1 :]], run


def chosen_gpus(asked: str) -> tuple[int, ...]:
    """The GPUs that `auto`, `all`, `none` or `0,1` mean on this machine. UserError for others."""
    if asked == "none":
        return ()
    there = gpu.gpu_indices()
    if asked == "auto":
        return there
    if asked == "all":
        if not there:
            raise UserError(
                "gpus=all, but no NVIDIA driver answers on this machine: `mainrun doctor` says "
                "why; gpus=none runs on the CPU"
            )
        return there
    indices = tuple(sorted({int(index) for index in asked.split(",")}))
    if there and not set(indices) <= set(there):
        raise UserError(f"gpus={asked}: this machine has {', '.join(map(str, there))}")
    return indices


def stop(host: Host, label: str, *, say: Callable[[str], None]) -> list[tuple[Container, Ending]]:
    """Stops what runs under this label, waits until it has saved, and removes it."""
    client = containers.connect()
    return [(found, _stop(client, found, host, say)) for found in containers.ours(client, label)]


def reap(host: Host, *, say: Callable[[str], None]) -> list[Container]:
    """Stops and removes all containers of ours that no living job watches over."""
    client = containers.connect()
    strays = [found for found in containers.ours(client) if containers.is_stray(found)]
    for stray in strays:
        _stop(client, stray, host, say)
    return strays


def ending(
    exit_code: int, tail: Sequence[str], *, out_of_memory: bool = False, memory_bytes: int = 0
) -> Ending:
    """What an exit code means, with the reason that the last lines give."""
    said = _last_word(tail)
    if out_of_memory and exit_code not in (0, 75):
        return Ending(
            "out_of_memory",
            exit_code,
            f"the job took more than its {memory_bytes / 2**30:.1f} GiB of memory and was killed",
            "give it more (`memory` in the host's settings), or make training.batch_size, "
            "data.context_length or the model smaller",
        )
    match exit_code:
        case 0:
            return Ending("finished", 0, "the task is done")
        case 75:
            return Ending(
                "stopped", 75, "it was stopped on request and saved a complete checkpoint",
                "resume it: nothing is lost",
            )  # fmt: skip
        case 130 | 143:
            return Ending(
                "stopped", exit_code, "it was stopped before there was anything to save",
                "start it again",
            )  # fmt: skip
        case 2:
            return Ending("refused", 2, said or "the command was refused", "mend it and try again")
        case 137:
            return Ending(
                "killed", 137, "it was killed before it could save its last steps",
                "resume it: at most the steps since its last checkpoint are lost",
            )  # fmt: skip
        case _:
            return Ending(
                "failed",
                exit_code,
                said.removeprefix("failed: ") or f"the task ended with exit code {exit_code}",
                "the log says more; what was saved can be resumed",
            )


def _check_words(words: Sequence[str]) -> None:
    """UserError for what `task` would not hand on as it is: it fills templates in arguments."""
    for word in words:
        if "{{" in word:
            raise UserError(f"{word!r}: `{{{{` cannot be handed to a task: it is a template to it")


def _passed(host: Host) -> dict[str, str]:
    """The variables of our environment that the host lets into a job."""
    return {name: os.environ[name] for name in host.environment if os.environ.get(name)}


def _in_the_way(client: docker.DockerClient, request: Request) -> list[Container]:
    """Strays on our GPUs or under our label. UserError for one that is watched over elsewhere."""
    found = [
        container
        for container in containers.ours(client)
        if container.job == request.label or set(container.gpus) & set(request.gpus)
    ]
    for container in found:
        if container.job != request.label and not containers.is_stray(container):
            raise UserError(f"a GPU is in use by {container.name}, whose locks lie elsewhere")
    return found


def _create(client: docker.DockerClient, request: Request, options: dict[str, Any]) -> str:
    for mount in options["mounts"]:  # Docker would make what is missing, and as root
        _make_folder(Path(mount["Source"]), read_only=mount["ReadOnly"])
    try:
        created = client.containers.create(**options)
    except _TROUBLE as error:
        raise UserError(containers.plain_words(error, request.image)) from None
    return str(created.id)


def _make_folder(folder: Path, *, read_only: bool) -> None:
    try:
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.R_OK if read_only else os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise UserError(
            f"{folder}: a job needs this folder ({error.strerror}); "
            "the host's settings `runs`, `cache` and `data` name the folders"
        ) from error


def _run(
    client: docker.DockerClient,
    container_id: str,
    host: Host,
    stopping: StopSignal,
    secrets: Mapping[str, str],
    output: Callable[[str], None],
) -> Ending:
    tail: deque[str] = deque(maxlen=_TAIL_LINES)

    def tell(line: str) -> None:
        tail.append(line)
        output(line)

    try:
        _start(client, container_id, _passed(host))
    except _TROUBLE as error:
        raise UserError(containers.plain_words(error)) from None
    reader = threading.Thread(
        target=_follow, args=(client, container_id, secrets, tell), daemon=True
    )
    reader.start()
    state = _watch(client, container_id, stopping, host, output)
    reader.join(timeout=30)  # the last lines; a reader that hangs is not waited for
    return ending(
        int(state["ExitCode"]),
        list(tail),
        out_of_memory=bool(state["OOMKilled"]),
        memory_bytes=host.memory_bytes,
    )


def _start(client: docker.DockerClient, container_id: str, passed: Mapping[str, str]) -> None:
    if not passed:
        client.api.start(container_id)
        return
    # Attached before the start: what is written waits until the entrypoint reads it.
    stream = client.api.attach_socket(container_id, params={"stdin": 1, "stream": 1})
    try:
        client.api.start(container_id)
        connection = getattr(stream, "_sock", stream)
        connection.sendall(json.dumps(dict(passed)).encode())
        connection.shutdown(socket.SHUT_WR)  # the entrypoint reads to the end
    finally:
        getattr(stream, "_response", stream).close()  # the socket alone leaves its reader open


def _watch(
    client: docker.DockerClient,
    container_id: str,
    stopping: StopSignal,
    host: Host,
    output: Callable[[str], None],
) -> Mapping[str, Any]:
    """Waits for the end, hands the first stop request on, and returns the Engine's last word."""
    asked: float | None = None
    while True:
        state = _state(client, container_id)
        if state["Status"] not in ("created", "running", "paused", "restarting"):
            return state
        if stopping.requested() and asked is None:
            asked = time.monotonic()
            output("stopping: the task finishes its step and saves")
            _signal(client, container_id, "SIGTERM")
        elif asked is not None and time.monotonic() - asked > max(host.grace, 0) + 20:
            _signal(client, container_id, "SIGKILL")
        time.sleep(_LOOK_SECONDS)


def _state(client: docker.DockerClient, container_id: str) -> Mapping[str, Any]:
    """RunFailed where the container or the Engine is gone."""
    try:
        inspected: Mapping[str, Any] = client.api.inspect_container(container_id)
    except NotFound:
        raise RunFailed("the container was removed by somebody else") from None
    except _TROUBLE as error:
        raise RunFailed(containers.plain_words(error)) from None
    state: Mapping[str, Any] = inspected["State"]
    return state


def _signal(client: docker.DockerClient, container_id: str, name: str) -> None:
    try:
        client.api.kill(container_id, signal=name)
    except _TROUBLE:  # it has just ended, which the next look says
        return


def _follow(
    client: docker.DockerClient,
    container_id: str,
    secrets: Mapping[str, str],
    tell: Callable[[str], None],
) -> None:
    """Every line of the container's output, until it ends or the Engine goes away."""
    try:
        stream = client.api.logs(container_id, stream=True, follow=True)
        for line in lines_of(stream):
            tell(str(without_secrets(line, secrets)))
    except _TROUBLE:
        return


def lines_of(chunks: Iterable[bytes]) -> Iterable[str]:
    """Whole lines of a stream that comes in pieces."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    rest = ""
    for chunk in chunks:
        *lines, rest = (rest + decoder.decode(chunk)).split("\n")
        yield from (line.rstrip("\r") for line in lines)
    rest += decoder.decode(b"", final=True)
    if rest:
        yield rest


def _stop(
    client: docker.DockerClient, found: Container, host: Host, say: Callable[[str], None]
) -> Ending:
    say(f"stopping {found.name} ({found.task}), which may save first")
    secrets = secret_values()
    try:
        client.api.stop(found.id, timeout=STOP_SECONDS)
        state = _state(client, found.id)
        log = client.api.logs(found.id, tail=_TAIL_LINES)
        tail = [str(without_secrets(line, secrets)) for line in lines_of([log])]
    except _TROUBLE as error:
        raise RunFailed(containers.plain_words(error)) from None
    containers.remove(client, found.id)
    locks.forget(Path(found.locks), locks.job(found.job))
    result = ending(
        int(state["ExitCode"]),
        tail,
        out_of_memory=bool(state["OOMKilled"]),
        memory_bytes=host.memory_bytes,
    )
    say(f"{found.name}: {result.sentence}")
    return result


def _last_word(tail: Sequence[str]) -> str:
    """The reason a command of ours gave on its last line; what `task` says after it is none."""
    said = [line.removeprefix("mainrun: ") for line in tail if line.startswith("mainrun: ")]
    return said[-1] if said else ""
