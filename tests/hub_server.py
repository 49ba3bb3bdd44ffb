"""A stand-in for the Hugging Face hub: the requests that its client makes for a data set's files.

Real protocol on a loopback port: the data set's description with commit and files, the `resolve`
address with ETag and X-Repo-Commit, and for large-file (LFS) formats the redirect to a second
address with X-Linked-ETag and X-Linked-Size. `asked` is the log of requests, to count them. A test
sends the client here with `use_endpoint`.
"""

import dataclasses
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

import pytest


@dataclasses.dataclass
class HubServer:
    """Data sets by name: their commits, oldest first, each a mapping of file names to bytes."""

    datasets: dict[str, dict[str, dict[str, bytes]]] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)

    def add(self, name: str, **files: bytes) -> str:
        """A new commit of the data set; returns its 40 hex digits. `__` in a name is a dot."""
        named = {file.replace("__", "."): body for file, body in files.items()}
        commits = self.datasets.setdefault(name, {})
        commit = hashlib.sha1(f"{name} {len(commits)}".encode()).hexdigest()
        commits[commit] = named
        return commit

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        handler = type("Handler", (_Handler,), {"served": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """From now on connections are refused."""
        self._server.shutdown()
        self._server.server_close()


def use_endpoint(endpoint: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HUB_CACHE would have done before the client was imported."""
    from huggingface_hub import constants

    resolve = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + resolve)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub_cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class _Handler(BaseHTTPRequestHandler):
    served: HubServer

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self) -> None:
        path = urlsplit(self.path).path
        self.served.asked.append(f"{self.command} {path}")
        match path.strip("/").split("/"):
            case ["api", "datasets", owner, name]:
                self.describe(f"{owner}/{name}", "main")
            case ["api", "datasets", owner, name, "revision", revision]:
                self.describe(f"{owner}/{name}", unquote(revision))
            case ["datasets", owner, name, "resolve", revision, *file]:
                self.resolve(f"{owner}/{name}", unquote(revision), unquote("/".join(file)))
            case ["lfs", digest]:
                bodies = (
                    body
                    for commits in self.served.datasets.values()
                    for files in commits.values()
                    for body in files.values()
                )
                body = next(b for b in bodies if hashlib.sha256(b).hexdigest() == digest)
                self.send(200, body, ETag=f'"{digest}"')
            case _:
                self.send(404, b"Not Found")

    def describe(self, name: str, revision: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        commit, files = found
        siblings = [
            {"rfilename": file, "size": len(body), "blobId": hashlib.sha1(body).hexdigest()}
            for file, body in files.items()
        ]
        description = {"id": name, "sha": commit, "private": False, "siblings": siblings}
        self.send(200, json.dumps(description).encode(), **{"Content-Type": "application/json"})

    def resolve(self, name: str, revision: str, file: str) -> None:
        if (found := self.find(name, revision)) is None:
            return
        commit, files = found
        if file not in files:
            self.send(404, b"", **{"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        body = files[file]
        digest = hashlib.sha256(body).hexdigest()
        if file.endswith(".parquet"):
            headers = {
                # Another host, as the real one's: the client takes the headers of the first.
                "Location": f"http://localhost:{self.served.port}/lfs/{digest}",
                "X-Linked-ETag": f'"{digest}"',
                "X-Linked-Size": str(len(body)),
            }
            self.send(302, b"", **headers, **{"X-Repo-Commit": commit})
        else:
            etag = f'"{hashlib.sha1(body).hexdigest()}"'
            self.send(200, body, **{"ETag": etag, "X-Repo-Commit": commit})

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        commits = self.served.datasets.get(name)
        if commits is None:  # the real hub says 401, so as not to tell who has private ones
            self.send(401, b"", **{"X-Error-Code": "RepoNotFound"})
            return None
        if revision == "main":
            revision = list(commits)[-1]
        if revision not in commits:
            self.send(404, b"", **{"X-Error-Code": "RevisionNotFound"})
            return None
        return revision, commits[revision]

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
