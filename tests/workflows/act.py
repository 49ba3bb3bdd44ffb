"""Runs a workflow file by act, on this machine itself, with stand-ins for the actions.

    source = act.Source(tmp_path / "source", files={".ci/run": "..."})
    done = act.run("train", source, inputs={"config": "quickstart"}, artifacts=tmp_path / "made")
    assert done.succeeded

What act leaves out is done by the stand-ins: the workspace of a job is empty, and its first step
clones the commit, so that nothing is there but what a fresh checkout has. act 0.2.89 does not know
`concurrency.queue`; that line, and it alone, is dropped from the copy that act reads.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
RUNNERS = ("self-hosted", "ubuntu-24.04")
ACTIONS = {
    "actions/checkout": "3d3c42e5aac5ba805825da76410c181273ba90b1",
    "actions/upload-artifact": "bbbca2ddaa5d8feaa63e36b76fdaad77386f024f",
    "actions/download-artifact": "3e5f45b2cfb9172054b4087a40e8e0b5a5461e7c",
}
DROPPED = "  queue: max\n"


class Source:
    """A git repository with one commit: the files of this tree as they are, and changes to them."""

    def __init__(self, folder: Path, files: Mapping[str, str | None] | None = None) -> None:
        self.folder = folder
        listed = _git(REPOSITORY, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
        for name in filter(None, listed.split("\0")):
            if (REPOSITORY / name).is_file():  # not one that is deleted and not yet committed
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(REPOSITORY / name, folder / name)
        for name, text in (files or {}).items():
            _replace(folder / name, text)
        _git(folder, "init", "--quiet", "--initial-branch=main")
        _git(folder, "add", "--all")
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        _git(folder, *identity, "commit", "--quiet", "--no-gpg-sign", "--message=As it is")
        self.sha = _git(folder, "rev-parse", "HEAD").strip()


def _replace(path: Path, text: str | None) -> None:
    if text is None:
        path.unlink()
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    path.write_text(text, encoding="utf-8")
    if is_new and text.startswith("#!"):
        path.chmod(0o755)


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return done.stdout


@dataclass(repr=False)
class Done:
    """What a run of a workflow has come to."""

    exit_code: int
    steps: dict[str, str] = field(default_factory=dict)
    """Name of each step that act speaks of, in their order: success, failure, skipped."""
    summary: str = ""
    """The page of the job: what its steps wrote to $GITHUB_STEP_SUMMARY."""
    log: str = ""
    """What the steps printed."""
    messages: str = ""
    """What act said itself: commands such as ::error::, and how steps ended."""

    def has_run(self, *names: str) -> bool:
        """Whether all of these steps have run, well or not."""
        return all(self.steps.get(name, "skipped") != "skipped" for name in names)

    def is_well(self, *names: str) -> bool:
        """Whether all of these steps have run, and well."""
        return all(self.steps.get(name) == "success" for name in names)

    @property
    def succeeded(self) -> bool:
        return self.exit_code == 0

    def __repr__(self) -> str:
        return f"{self.exit_code} {self.steps}\n{self.log[-3000:]}\n{self.messages[-1500:]}"


class Running:
    """A workflow that runs; leaving the `with` block ends what is left of it."""

    def __init__(
        self,
        workflow: str,
        source: Source,
        *,
        event: str = "workflow_dispatch",
        inputs: Mapping[str, str] | None = None,
        artifacts: Path,
        secrets: Mapping[str, str] | None = None,
        environment: Mapping[str, str] | None = None,
        run_id: int = 1,
        attempt: int = 1,
    ) -> None:
        self._scratch = Path(tempfile.mkdtemp(prefix="act-"))
        artifacts.mkdir(parents=True, exist_ok=True)
        file = self._scratch / f"{workflow}.yml"
        text = (source.folder / ".github" / "workflows" / file.name).read_text(encoding="utf-8")
        file.write_text(text.replace(DROPPED, ""), encoding="utf-8")
        secret_file = self._scratch / "secrets"
        secret_file.write_text(
            "".join(f"{k}={json.dumps(v)}\n" for k, v in (secrets or {}).items())
        )
        (self._scratch / "event.json").write_text(json.dumps({"inputs": dict(inputs or {})}))
        command = [
            binary("act"), event, "--workflows", str(file), "--directory", str(source.folder),
            "--no-skip-checkout", "--action-cache-path", str(self._scratch / "cache"), "--rm",
            "--no-cache-server", "--pull=false", "--json", "--secret-file", str(secret_file),
            "--env-file", os.devnull, "--var-file", os.devnull, "--input-file", os.devnull,
        ]  # fmt: skip
        for runner in RUNNERS:
            command += ["--platform", f"{runner}=-self-hosted"]
        for action, commit in ACTIONS.items():
            stand_in = HERE / "actions" / action.partition("/")[2]
            command += ["--local-repository", f"{action}@{commit}={stand_in}"]
        for name, value in (inputs or {}).items():
            command += ["--input", f"{name}={value}"]
        own = {"GITHUB_RUN_ID": str(run_id), "GITHUB_RUN_ATTEMPT": str(attempt),
               "ARTIFACT_DIR": str(artifacts), "CHECKOUT_SOURCE": str(source.folder)}  # fmt: skip
        for name, value in own.items():
            command += ["--env", f"{name}={value}"]
        self.done = Done(-1)
        self._changed = threading.Condition()
        self._finished = False
        # A session of its own: a signal is for act alone, as GitHub's is for the runner's child.
        self.process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            cwd=source.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(timeout=10)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def cancel(self) -> None:
        """As somebody's click on *Cancel run*: the step ends, those that always run do."""
        self.process.send_signal(signal.SIGINT)

    def wait_for(self, text: str, timeout_seconds: float = 60) -> None:
        """Returns when a step has printed it."""
        with self._changed:
            arrived = self._changed.wait_for(
                lambda: text in self.done.log or self._finished, timeout_seconds
            )
        assert arrived, f"{text!r} did not come in {timeout_seconds} s:\n{self.done}"
        assert text in self.done.log, f"{text!r} never came:\n{self.done}"

    def wait(self, timeout_seconds: float = 120) -> Done:
        self.done.exit_code = self.process.wait(timeout_seconds)
        self._reader.join(timeout=10)
        print(self.done)  # pytest shows it where a test fails
        return self.done

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            try:
                record = json.loads(line)
            except ValueError:
                record = {"msg": line}
            with self._changed:
                self._take(record)
                self._changed.notify_all()
        with self._changed:
            self._finished = True
            self._changed.notify_all()

    def _take(self, record: Mapping[str, Any]) -> None:
        is_step = record.get("stage") == "Main" and len(record.get("stepID", [])) == 1
        if is_step and "stepResult" in record:
            self.done.steps[record["step"]] = record["stepResult"]
        if record.get("command") == "summary":
            self.done.summary += record["content"]
        elif record.get("raw_output"):
            self.done.log += record["msg"]
        else:
            self.done.messages += record["msg"].rstrip("\n") + "\n"


def run(workflow: str, source: Source, *, timeout_seconds: float = 120, **options: Any) -> Done:
    """The workflow, from its start to its end."""
    with Running(workflow, source, **options) as running:
        return running.wait(timeout_seconds)


def binary(name: str) -> str:
    """The program beside this Python, or on PATH."""
    found = shutil.which(name, path=Path(sys.executable).parent) or shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: `task dev`")
    return found
