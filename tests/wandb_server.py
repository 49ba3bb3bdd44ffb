"""A stand-in for W&B's server, on loopback: the part of its protocol that sweeps and runs use.

Recorded from wandb 0.31: `/graphql` with named operations, `/files/<entity>/<project>/<run>/
file_stream` for history and end, PUTs for files. It hands out the trials it is given, one after
another, and keeps what it is told. What it does not know it answers with an empty object.
"""

import gzip
import http.server
import json
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

ENTITY = {"id": "RTox", "name": "me", "__typename": "Entity"}


@dataclass
class Told:
    """What the server was told of one run."""

    config: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


class WandbServer:
    """In a `with` block: listens at `url`, hands out `trials`, remembers `runs` and `sweeps`.

    A run named in `stopping` is told to stop at the next heartbeat of its agent.
    """

    def __init__(self, trials: Sequence[dict[str, Any]] = ()) -> None:
        self.trials = list(trials)
        self.given: list[str] = []
        self.sweeps: dict[str, str] = {}
        self.runs: dict[str, Told] = {}
        self.operations: list[str] = []
        self.stopping: set[str] = set()
        self._lock = threading.Lock()
        self._server = _QuietServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        """The `data` of a GraphQL answer."""
        project = {
            "id": "UHJvajox",
            "name": variables.get("projectName") or variables.get("project") or "p",
            "entity": ENTITY,
        }
        match operation:
            case "Viewer" | "GetViewer" | "GetDefaultEntity":
                return {"viewer": _viewer()}
            case "UpsertSweep":
                name = f"sweep{len(self.sweeps) + 1}"
                self.sweeps[name] = variables["config"]
                sweep = {"name": name, "project": project}
                return {"upsertSweep": {"sweep": sweep, "configValidationWarnings": []}}
            case "SweepWithRuns":
                return {"project": {"sweep": self._sweep(variables["sweep"])}}
            case "GetSweep" | "GetSweepLegacy":
                return {"project": {"sweep": self._sweep(variables["name"])}}
            case "CreateAgent":
                return {"createAgent": {"agent": {"id": "agent"}}}
            case "Heartbeat":
                running = json.loads(variables.get("runState") or "{}")
                commands = json.dumps(self._commands(running))
                return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": commands}}
            case "UpsertBucket":
                return {"upsertBucket": self._bucket(variables, project)}
            case "CreateRunFiles":
                folder = f"{self.url}/storage/{variables['run']}"
                files = [{"name": f, "uploadUrl": f"{folder}/{f}"} for f in variables["files"]]
                return {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
            case "OrganizationCoreWeaveOrganizationID":
                return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}
            case "ServerFeaturesQuery":
                return {"serverInfo": {"features": []}}
            case "ArtifactType":
                return {"project": {"artifact": None}}
            case "CreateArtifact":
                sequence = {"id": "QXJ0U2Vx", "latestArtifact": None}
                artifact = {"id": "QXJ0", "state": "PENDING", "artifactSequence": sequence}
                return {"createArtifact": {"artifact": artifact}}
            case "CreateArtifactManifest" | "UpdateArtifactManifest":
                return {
                    operation[0].lower() + operation[1:]: {"artifactManifest": self._manifest()}
                }
            case "CreateArtifactFiles":
                return {
                    "createArtifactFiles": {"files": {"edges": self._artifact_files(variables)}}
                }
            case "CommitArtifact":
                return {"commitArtifact": {"artifact": {"id": "QXJ0", "digest": "d"}}}
            case _:
                return {}

    def told(self, run: str, streamed: dict[str, Any]) -> None:
        """Keeps what a run sends while it goes on, and its exit code at the end."""
        lines = streamed.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        of_run = self.runs.setdefault(run, Told())
        of_run.history += map(json.loads, lines)
        if streamed.get("complete"):
            of_run.exit_code = streamed.get("exitcode")

    def _commands(self, running: dict[str, Any]) -> list[dict[str, Any]]:
        """For an agent with these runs: what it shall do."""
        if running:
            return [{"type": "stop", "run_id": run} for run in running if run in self.stopping]
        if len(self.given) == len(self.trials):
            return [{"type": "exit"}]
        run = f"trial{len(self.given) + 1}"
        values = self.trials[len(self.given)]
        self.given.append(run)
        arguments = {name: {"value": value} for name, value in values.items()}
        return [{"type": "run", "run_id": run, "args": arguments, "program": "mainrun"}]

    def _sweep(self, name: str) -> dict[str, Any] | None:
        if name not in self.sweeps:
            return None
        return {
            "id": "U3dlZXA", "name": name, "displayName": None, "method": "random",
            "state": "RUNNING", "description": None, "config": self.sweeps[name],
            "createdAt": "2026-01-01T00:00:00", "heartbeatAt": None, "updatedAt": None,
            "earlyStopJobRunning": False, "bestLoss": None, "controller": None, "scheduler": None,
            "runCount": 0, "runCountExpected": None, "runs": {"edges": []},
            "__typename": "Sweep",
        }  # fmt: skip

    def _bucket(self, variables: dict[str, Any], project: dict[str, Any]) -> dict[str, Any]:
        name = variables.get("name") or "run"
        of_run = self.runs.setdefault(name, Told())
        of_run.sweep = variables.get("sweep") or of_run.sweep
        if variables.get("config"):
            told = json.loads(variables["config"])
            of_run.config |= {key: item["value"] for key, item in told.items() if "value" in item}
        bucket = {
            "id": f"UnVu{name}", "name": name, "displayName": name, "description": None,
            "config": variables.get("config"), "sweepName": variables.get("sweep"),
            "project": project, "historyLineCount": 0, "__typename": "Run",
        }  # fmt: skip
        return {"bucket": bucket, "inserted": True, "__typename": "UpsertBucketPayload"}

    def _manifest(self) -> dict[str, Any]:
        name = "wandb_manifest.json"
        file = {"id": "f1", "name": name, "displayName": name, "uploadHeaders": []}
        return {"id": "TWFu", "file": {**file, "uploadUrl": f"{self.url}/storage/manifest"}}

    def _artifact_files(self, variables: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            {"node": {
                "id": f"F{number}", "name": file["name"], "displayName": file["name"],
                "uploadUrl": f"{self.url}/storage/artifact/{file['name']}", "uploadHeaders": [],
                "uploadMultipartUrls": None, "storagePath": file["name"],
                "artifact": {"id": "QXJ0"},
            }}
            for number, file in enumerate(variables["input"].get("artifactFiles") or [])
        ]  # fmt: skip

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply({})

            def do_PUT(self) -> None:
                self._body()
                self._reply({})

            def do_POST(self) -> None:
                body = self._body()
                if self.path.startswith("/graphql"):
                    asked = json.loads(body)
                    named = re.search(r"(?:query|mutation)\s+(\w+)", asked["query"])
                    operation = named[1] if named else ""
                    with server._lock:
                        server.operations.append(operation)
                        data = server.answer(operation, asked.get("variables") or {})
                    self._reply({"data": data})
                elif stream := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
                    with server._lock:
                        server.told(stream[1], json.loads(body))
                    self._reply({"limits": {}, "exitcode": None})
                else:
                    self._reply({})

            def log_message(self, *_: object) -> None:
                """Nothing on the tests' screen."""

            def _body(self) -> bytes:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                zipped = self.headers.get("Content-Encoding") == "gzip"
                return gzip.decompress(data) if zipped else data

            def _reply(self, content: dict[str, Any]) -> None:
                data = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        return Handler


class _QuietServer(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Clients hang up without a word; that is no news."""


def _viewer() -> dict[str, Any]:
    nobody = {"edges": []}
    return {
        "id": "VXNlcjox", "entity": "me", "username": "me", "name": "me", "email": "a@example.org",
        "flags": "{}", "teams": nobody, "apiKeys": nobody, "deletedAt": None, "admin": False,
        "__typename": "User",
    }  # fmt: skip
