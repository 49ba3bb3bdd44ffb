"""A task in a container, from the request to the end of it, with nothing left behind.

The container is started, its output passed on, a stop request handed to it once; then it is
removed, and how it ended is said in words. Locks are held meanwhile, one per GPU and one for the
job, so what runs without a holder is a stray (its launcher was killed), and may be stopped by
whoever finds it.
"""

import codecs
import contextlib
import json
import os
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import docker
from docker.errors import DockerException, NotFound
from requests.exceptions import RequestException

from mainrun import containers, locks
from mainrun.containers import Container
from mainrun.ending import Ending, ending_of
from mainrun.environment import secret_values, without_secrets
from mainrun.errors import RunFailed, UserError
from mainrun.host import Host
from mainrun.request import Request, check_words, container_options
from mainrun.stop import StopSignal

STOP_SECONDS = 165
"""From a stop request to the kill by Docker: more than the entrypoint's own grace, less than the
workflow's step Stop has, whose end leaves its container behind."""

_LOOK_SECONDS = 0.2
_TAIL_LINES = 60
_TROUBLE = (DockerException, RequestException, OSError)


def launch(
    request: Request, host: Host, *, stopping: StopSignal, output: Callable[[str], None]
) -> Ending:
    """Runs the task to its end; its lines go to `output`, without secrets.

    Nobody may be listening any more (a closed terminal, a runner that was killed): OSError from
    `output` does not end the job before it has saved.

    Raises UserError where it cannot be started, Stopped for a stop before it was.
    """
    check_words(request.words)
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
            _stop_stray(client, stray, host, tell)
        stopping.check()
        options = container_options(request, host, passed=_passed(host))
        container_id = _create(client, request, options)
        try:
            return _run(client, container_id, host, stopping, secrets, tell)
        finally:
            with contextlib.suppress(*_TROUBLE):  # the Engine is gone: then it is a stray, later
                containers.remove(client, container_id)


def stop(
    host: Host, label: str, *, say: Callable[[str], None]
) -> list[tuple[Container, Ending | None]]:
    """Stops what runs under this label and waits until it has saved.

    A stray is removed, and how it ended comes back with it; one that is watched over is removed by
    its launcher, which tells the same.
    """
    client = containers.connect()
    stopped: list[tuple[Container, Ending | None]] = []
    for found in containers.ours(client, label):
        if containers.is_stray(found):
            stopped.append((found, _stop_stray(client, found, host, say)))
            continue
        say(f"stopping {found.name} ({found.task}), which may save first")
        with contextlib.suppress(NotFound):
            client.api.stop(found.id, timeout=STOP_SECONDS)
        stopped.append((found, None))
    return stopped


def reap(host: Host, *, say: Callable[[str], None]) -> list[Container]:
    """Stops and removes all containers of ours that no living job watches over."""
    client = containers.connect()
    strays = [found for found in containers.ours(client) if containers.is_stray(found)]
    for stray in strays:
        _stop_stray(client, stray, host, say)
    return strays


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
    return ending_of(
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


def _stop_stray(
    client: docker.DockerClient, found: Container, host: Host, say: Callable[[str], None]
) -> Ending | None:
    """How it ended; None where somebody else was just removing it too."""
    say(f"stopping {found.name} ({found.task}): what started it is gone; it may save first")
    secrets = secret_values()
    try:
        client.api.stop(found.id, timeout=STOP_SECONDS)
        state = client.api.inspect_container(found.id)["State"]
        log = client.api.logs(found.id, tail=_TAIL_LINES)
    except NotFound:
        return None
    except _TROUBLE as error:
        raise RunFailed(containers.plain_words(error)) from None
    containers.remove(client, found.id)
    locks.forget(Path(found.locks), locks.job(found.job))
    result = ending_of(
        int(state["ExitCode"]),
        [str(without_secrets(line, secrets)) for line in lines_of([log])],
        out_of_memory=bool(state["OOMKilled"]),
        memory_bytes=host.memory_bytes,
    )
    say(f"{found.name}: {result.sentence}")
    return result
