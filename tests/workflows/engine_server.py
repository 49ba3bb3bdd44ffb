"""A Docker Engine without containers: its HTTP API on a socket, a Python function as the program.

As much of the API as mainrun uses through docker-py. What a test gives as `program` runs in a
thread for every container that is started: it reads what was written to stdin, writes files where
the mounts point, says lines, sees signals, and returns the exit code. `created` holds the bodies
that containers were asked for with, which is what the rules for containers are checked on.
"""

import contextlib
import hashlib
import json
import re
import shutil
import socketserver
import struct
import tempfile
import threading
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from types import TracebackType
from typing import Any, Self

GONE = "exited"


class OutOfMemory(Exception):
    """Raised by a program: the kernel kills it for taking more than its limit."""


class Killed(Exception):
    """Raised in a program that waits while SIGKILL arrives."""


@dataclass
class Process:
    """A container as the program sees it from inside, and as the test sees it from outside."""

    id: str
    name: str
    body: dict[str, Any]
    state: str = "created"
    exit_code: int = 0
    out_of_memory: bool = False
    signals: list[str] = field(default_factory=list)
    output: list[bytes] = field(default_factory=list)
    created: float = field(default_factory=time.time)
    changed: threading.Condition = field(default_factory=threading.Condition)
    attached: bool = False
    stdin: bytes | None = None
    """All that was written to it, once that is at its end."""

    @property
    def command(self) -> list[str]:
        return list(self.body["Cmd"])

    @property
    def environment(self) -> dict[str, str]:
        return dict(entry.partition("=")[::2] for entry in self.body["Env"])

    @property
    def mounts(self) -> dict[str, Path]:
        """Where the container's folders lie on this machine."""
        return {m["Target"]: Path(m["Source"]) for m in self.body["HostConfig"]["Mounts"]}

    @property
    def run_dir(self) -> Path:
        """The run folder that the command is about."""
        (name,) = [word for word in self.command if word.startswith("runs/")]
        return self.mounts["/app/runs"] / Path(name).name

    def say(self, line: str) -> None:
        with self.changed:
            self.output.append(f"{line}\n".encode())
            self.changed.notify_all()

    def read_stdin(self, timeout_seconds: float = 30) -> str:
        with self.changed:
            if not self.changed.wait_for(lambda: self.stdin is not None, timeout_seconds):
                raise TimeoutError("nobody has closed the container's stdin")
            return (self.stdin or b"").decode()

    def wait_for_stop(self, timeout_seconds: float = 60) -> str:
        """The first signal. Raises Killed for SIGKILL, and TimeoutError where none comes."""
        with self.changed:
            if not self.changed.wait_for(lambda: self.signals, timeout_seconds):
                raise TimeoutError("the container was not stopped")
            if "SIGKILL" in self.signals:
                raise Killed
            return self.signals[0]

    def wait_for_end(self, timeout_seconds: float = 60) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: self.state == GONE, timeout_seconds)

    def deliver(self, signal: str) -> None:
        with self.changed:
            self.signals.append(signal)
            self.changed.notify_all()

    def run(self, program: Callable[["Process"], int]) -> None:
        try:
            code = program(self)
        except OutOfMemory:
            code, self.out_of_memory = 137, True
        except Killed:
            code = 137
        except Exception as error:
            self.say(f"the test's program failed: {error!r}")
            code = 99
        with self.changed:
            self.exit_code, self.state = code, GONE
            self.changed.notify_all()

    def inspected(self) -> dict[str, Any]:
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "Created": time.strftime("%Y-%m-%dT%H:%M:%S.0Z", time.gmtime(self.created)),
            "Image": "sha256:" + "0" * 64,
            "Config": {"Tty": False, **self.body},
            "HostConfig": self.body["HostConfig"],
            "State": {
                "Status": self.state, "Running": self.state == "running", "Pid": 0,
                "ExitCode": self.exit_code, "OOMKilled": self.out_of_memory, "Error": "",
            },
        }  # fmt: skip

    def listed(self) -> dict[str, Any]:
        return {
            "Id": self.id, "Names": [f"/{self.name}"], "Image": self.body["Image"],
            "ImageID": "", "Labels": self.body.get("Labels") or {}, "Created": int(self.created),
            "State": self.state, "Status": "Up 2 minutes" if self.state == "running" else "Exited",
        }  # fmt: skip


def finishes(process: Process) -> int:
    """The program that does nothing, and is done."""
    process.say("nothing to do")
    return 0


class Engine:
    """The server; in a `with` block it answers at `url`."""

    def __init__(self, program: Callable[[Process], int] = finishes) -> None:
        self.program = program
        self.processes: dict[str, Process] = {}
        self.created: list[dict[str, Any]] = []
        self.built: list[str] = []
        self.images: dict[str, dict[str, str]] = {}
        """Name and tag of each image, and its labels."""
        self.refusals: dict[str, tuple[int, str]] = {}
        """Status and message of the answer to a call: create, start, kill, stop, build."""
        self.held: set[str] = set()
        """Calls, of the same names, that are not answered as long as the Engine lives."""
        self._arrived: list[str] = []
        self._closing = threading.Event()
        self._changed = threading.Condition()
        # Not under pytest's folder: the path of a socket has at most 107 characters.
        self._folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.socket = self._folder / "s"

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def __enter__(self) -> Self:
        engine = self

        class Handler(_Handler):
            pass

        Handler.engine = engine
        self._server = _Server(str(self.socket), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._closing.set()
        for process in self.processes.values():
            process.deliver("SIGKILL")  # a program that waits is a thread that never ends
        self._server.shutdown()
        self._server.server_close()
        shutil.rmtree(self._folder)

    def add_image(self, name: str, **labels: str) -> None:
        self.images[name] = labels

    def place(self, labels: dict[str, str], *, program: Callable[[Process], int]) -> Process:
        """A container that runs already, as if somebody before had started it."""
        body = {"Image": "mainrun:old", "Labels": labels, "Env": [], "Cmd": [],
                "HostConfig": {"Mounts": []}}  # fmt: skip
        process = self.add(f"mainrun-{labels.get('mainrun.job', 'other')}", body)
        self.start(process, program)
        return process

    def add(self, name: str, body: dict[str, Any]) -> Process:
        with self._changed:
            process = Process(f"{len(self.created) + len(self.processes) + 1:064x}", name, body)
            self.processes[process.id] = process
            self._changed.notify_all()
        return process

    def start(self, process: Process, program: Callable[[Process], int] | None = None) -> None:
        with process.changed:
            process.state = "running"
            process.changed.notify_all()
        thread = threading.Thread(target=process.run, args=(program or self.program,), daemon=True)
        thread.start()

    def wait_for_container(self, timeout_seconds: float = 60) -> Process:
        """The newest container, as soon as there is one that runs or ran."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.processes, timeout_seconds)
            process = list(self.processes.values())[-1]
        with process.changed:
            assert process.changed.wait_for(lambda: process.state != "created", timeout_seconds)
        return process

    def wait_for_call(self, call: str, timeout_seconds: float = 60) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: call in self._arrived, timeout_seconds), call

    def arrived(self, call: str) -> None:
        with self._changed:
            self._arrived.append(call)
            self._changed.notify_all()
        if call in self.held:
            self._closing.wait()

    def find(self, name: str) -> Process | None:
        by_name = [p for p in self.processes.values() if name in (p.name, p.id, p.id[:12])]
        return by_name[0] if by_name else None

    def remove(self, process: Process) -> None:
        process.deliver("SIGKILL")
        with self._changed:
            self.processes.pop(process.id, None)


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed in the middle


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    engine: Engine

    def log_message(self, *_: object) -> None:
        pass

    def address_string(self) -> str:
        return "socket"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_DELETE(self) -> None:
        self._answer()

    def _answer(self) -> None:
        url = urllib.parse.urlsplit(self.path)
        path = re.sub(r"^/v1\.\d+", "", urllib.parse.unquote(url.path))
        query = {key: values[0] for key, values in urllib.parse.parse_qs(url.query).items()}
        body = self._body()
        for method, pattern, handler in _ROUTES:
            found = re.fullmatch(pattern, path)
            if found and method in (self.command, "*"):
                handler(self, query, body, *found.groups())
                return
        self.refuse(404, f"page not found: {self.command} {path}")

    def _body(self) -> Any:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                self.rfile.read(size + 2)
            self.rfile.readline()
            return None
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        is_json = self.headers.get("Content-Type", "").startswith("application/json")
        return json.loads(text) if text and is_json else None

    def send(self, value: Any = None, status: int = 200) -> None:
        text = b"" if value is None else json.dumps(value).encode()
        self.send_response(204 if value is None else status)
        self.send_header("Api-Version", "1.41")
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)

    def refuse(self, status: int, message: str) -> None:
        self.send({"message": message}, status)

    def is_refused(self, call: str) -> bool:
        self.engine.arrived(call)
        if call in self.engine.refusals:
            self.refuse(*self.engine.refusals[call])
        return call in self.engine.refusals

    def process(self, name: str) -> Process | None:
        found = self.engine.find(name)
        if found is None:
            self.refuse(404, f"No such container: {name}")
        return found

    # -- the Engine itself

    def ping(self, query: dict[str, str], body: Any) -> None:
        self.send("OK")

    def version(self, query: dict[str, str], body: Any) -> None:
        self.send({"Version": "28.0.0", "ApiVersion": "1.41", "MinAPIVersion": "1.24"})

    def info(self, query: dict[str, str], body: Any) -> None:
        self.send({
            "ServerVersion": "28.0.0", "Runtimes": {"runc": {}}, "SecurityOptions": [],
            "CgroupDriver": "systemd", "CgroupVersion": "2", "DockerRootDir": "/tmp",
            "Driver": "overlay2", "NCPU": 2, "MemTotal": 8 * 2**30, "Warnings": None,
        })  # fmt: skip

    def usage(self, query: dict[str, str], body: Any) -> None:
        self.send({"LayersSize": 0, "Images": [], "Containers": [], "Volumes": [],
                   "BuildCache": []})  # fmt: skip

    def nothing(self, query: dict[str, str], body: Any) -> None:
        self.send([])

    # -- containers

    def list_containers(self, query: dict[str, str], body: Any) -> None:
        filters = json.loads(query.get("filters", "{}"))
        found = [
            process.listed()
            for process in self.engine.processes.values()
            if query.get("all") in ("1", "true", "True") or process.state == "running"
        ]
        self.send([entry for entry in found if _has_labels(entry["Labels"], filters)])

    def create(self, query: dict[str, str], body: Any) -> None:
        if self.is_refused("create"):
            return
        if body["Image"] not in self.engine.images:
            self.refuse(404, f"No such image: {body['Image']}")
            return
        name = query.get("name", f"some_name_{len(self.engine.created)}")
        if self.engine.find(name):
            self.refuse(409, f'Conflict. The container name "/{name}" is already in use')
            return
        self.engine.created.append(body)
        self.send({"Id": self.engine.add(name, body).id, "Warnings": []}, 201)

    def attach(self, query: dict[str, str], body: Any, name: str) -> None:
        if (process := self.process(name)) is None:
            return
        process.attached = True
        self.send_response_only(101, "UPGRADED")
        self.send_header("Content-Type", "application/vnd.docker.raw-stream")
        self.send_header("Connection", "Upgrade")
        self.send_header("Upgrade", "tcp")
        self.end_headers()
        self.wfile.flush()
        text = b""
        while part := self.connection.recv(65536):
            text += part
        with process.changed:
            process.stdin = text
            process.changed.notify_all()
        self.close_connection = True

    def start(self, query: dict[str, str], body: Any, name: str) -> None:
        if self.is_refused("start"):
            return
        if process := self.process(name):
            self.engine.start(process)
            self.send()

    def inspect(self, query: dict[str, str], body: Any, name: str) -> None:
        if process := self.process(name):
            self.send(process.inspected())

    def logs(self, query: dict[str, str], body: Any, name: str) -> None:
        if (process := self.process(name)) is None:
            return
        self.send_response(200)
        self.send_header("Content-Type", "application/vnd.docker.multiplexed-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        lines = process.output
        sent = max(len(lines) - int(query["tail"]), 0) if query.get("tail", "all") != "all" else 0
        follow = query.get("follow") == "1"
        while True:
            with process.changed:
                while follow and sent == len(process.output) and process.state != GONE:
                    process.changed.wait()
                parts, is_over = process.output[sent:], not follow or process.state == GONE
            for part in parts:
                self.wfile.write(struct.pack(">BxxxL", 1, len(part)) + part)
            self.wfile.flush()
            sent += len(parts)
            if is_over and not parts:
                break
        self.close_connection = True

    def wait(self, query: dict[str, str], body: Any, name: str) -> None:
        if process := self.process(name):
            process.wait_for_end(3600)
            self.send({"StatusCode": process.exit_code})

    def kill(self, query: dict[str, str], body: Any, name: str) -> None:
        if self.is_refused("kill") or (process := self.process(name)) is None:
            return
        if process.state != "running":
            self.refuse(409, f"Container {process.id} is not running")
            return
        process.deliver(query.get("signal", "SIGKILL"))
        self.send()

    def stop(self, query: dict[str, str], body: Any, name: str) -> None:
        if self.is_refused("stop") or (process := self.process(name)) is None:
            return
        if process.state == "running":
            process.deliver("SIGTERM")
            if not process.wait_for_end(float(query.get("t", 10))):
                process.deliver("SIGKILL")
                process.wait_for_end(30)
        self.send()

    def delete(self, query: dict[str, str], body: Any, name: str) -> None:
        if process := self.process(name):
            self.engine.remove(process)
            self.send()

    # -- images

    def list_images(self, query: dict[str, str], body: Any) -> None:
        filters = json.loads(query.get("filters", "{}"))
        found: dict[str, dict[str, Any]] = {}
        for name, labels in self.engine.images.items():
            if _has_labels(labels, filters):
                entry = found.setdefault(_image_id(name, labels), _image(name, labels))
                entry["RepoTags"] = [*dict.fromkeys([*entry["RepoTags"], name])]
        self.send(list(found.values()))

    def build(self, query: dict[str, str], body: Any) -> None:
        if self.is_refused("build"):
            return
        self.engine.built.append(query["t"])
        self.engine.add_image(query["t"], **json.loads(query.get("labels", "{}")))
        self.send({"stream": "Successfully built 0123456789ab\n"})

    def labels_of(self, name: str) -> tuple[str, dict[str, str]] | None:
        """A name of the image that has this name or id, and its labels."""
        for known, labels in self.engine.images.items():
            if name in (known, _image_id(known, labels)):
                return known, labels
        self.refuse(404, f"No such image: {name}")
        return None

    def inspect_image(self, query: dict[str, str], body: Any, name: str) -> None:
        if found := self.labels_of(name):
            self.send(_image(*found))

    def tag_image(self, query: dict[str, str], body: Any, name: str) -> None:
        if found := self.labels_of(name):
            self.engine.add_image(f"{query['repo']}:{query['tag']}", **found[1])
            self.send({}, 201)

    def delete_image(self, query: dict[str, str], body: Any, name: str) -> None:
        with contextlib.suppress(KeyError):
            del self.engine.images[name]
        self.send([{"Untagged": name}])

    def image_history(self, query: dict[str, str], body: Any, name: str) -> None:
        self.send([{"Id": name, "Size": 1000, "Created": int(time.time()), "Tags": None}])


_ROUTES: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("*", r"/_ping", _Handler.ping),
    ("GET", r"/version", _Handler.version),
    ("GET", r"/info", _Handler.info),
    ("GET", r"/system/df", _Handler.usage),
    ("GET", r"/networks|/volumes", _Handler.nothing),
    ("GET", r"/containers/json", _Handler.list_containers),
    ("POST", r"/containers/create", _Handler.create),
    ("POST", r"/containers/([^/]+)/attach", _Handler.attach),
    ("POST", r"/containers/([^/]+)/start", _Handler.start),
    ("GET", r"/containers/([^/]+)/json", _Handler.inspect),
    ("GET", r"/containers/([^/]+)/logs", _Handler.logs),
    ("POST", r"/containers/([^/]+)/wait", _Handler.wait),
    ("POST", r"/containers/([^/]+)/kill", _Handler.kill),
    ("POST", r"/containers/([^/]+)/stop", _Handler.stop),
    ("DELETE", r"/containers/([^/]+)", _Handler.delete),
    ("GET", r"/images/json", _Handler.list_images),
    ("POST", r"/build", _Handler.build),
    ("GET", r"/images/(.+)/history", _Handler.image_history),
    ("GET", r"/images/(.+)/json", _Handler.inspect_image),
    ("POST", r"/images/(.+)/tag", _Handler.tag_image),
    ("DELETE", r"/images/(.+)", _Handler.delete_image),
)


def _has_labels(labels: dict[str, str], filters: dict[str, Any]) -> bool:
    for wanted in filters.get("label", []):
        key, equals, value = wanted.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


def _image_id(name: str, labels: dict[str, str]) -> str:
    """One for all names of the same commit."""
    return f"sha256:{hashlib.sha256(labels.get('mainrun.sha', name).encode()).hexdigest()}"


def _image(name: str, labels: dict[str, str]) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {
        "Id": _image_id(name, labels), "Metadata": {"LastTagTime": now},
        "RepoTags": [name], "RepoDigests": [], "Created": int(time.time()), "Size": 1000,
        "VirtualSize": 1000, "Labels": labels, "Config": {"Labels": labels, "Env": []},
        "ParentId": "", "SharedSize": -1, "Containers": -1,
    }  # fmt: skip
