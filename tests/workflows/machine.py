"""A machine that jobs are dispatched to, in a test: its folders, its Engine, what came of it.

`dispatch` runs a workflow file by act; `steps` runs the same steps here in the test's process, for
what does not depend on the file.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mainrun import jobs, locks
from mainrun.errors import RunFailed, Stopped, UserError
from tests.workflows import act
from tests.workflows.engine_server import Engine

BASE_IMAGE = "mainrun-base:test"
SECRET = "canary-0123456789-canary"
HERE = Path(__file__).parent
GITHUB = {
    "GITHUB_ACTIONS": "true",
    "GITHUB_RUN_ID": "1",
    "GITHUB_RUN_ATTEMPT": "1",
    "GITHUB_SERVER_URL": "https://github.example",
    "GITHUB_REPOSITORY": "ada/mainrun",
    "GITHUB_ACTOR": "ada",
    "INPUT_TASK": "train",
}


@dataclass
class Machine:
    folder: Path
    source: act.Source
    engine: Engine
    environment: dict[str, str]
    """Of the runner."""

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def artifacts(self) -> Path:
        return self.folder / "artifacts"

    @property
    def called(self) -> list[str]:
        """What was called beside mainrun: `docker …` and `python3 requirements/install.py …`."""
        log = self.folder / "called"
        return log.read_text().splitlines() if log.exists() else []

    def dispatch(self, workflow: str, *, run_id: int = 1, **inputs: str) -> act.Done:
        with self.started(workflow, run_id=run_id, inputs=inputs) as running:
            return running.wait()

    def started(
        self,
        workflow: str,
        *,
        event: str = "workflow_dispatch",
        run_id: int = 1,
        inputs: dict[str, str] | None = None,
    ) -> act.Running:
        return act.Running(
            workflow, self.source, event=event, inputs=inputs, run_id=run_id,
            artifacts=self.artifacts, environment=self.environment,
            secrets={"WANDB_API_KEY": SECRET},
        )  # fmt: skip

    def variables(self, **inputs: str) -> dict[str, str]:
        """The environment of a step of train.yml."""
        page = {"GITHUB_STEP_SUMMARY": str(self.folder / "page.md")}
        own = {"GITHUB_SHA": self.source.sha, "MAINRUN_JOB_DIR": str(self.folder / "out")}
        typed = {f"INPUT_{name.upper()}": value for name, value in inputs.items()}
        return self.environment | GITHUB | page | own | typed

    def steps(self, monkeypatch: pytest.MonkeyPatch, **inputs: str) -> tuple[str, dict[str, Any]]:
        """The page and the record of a job: its steps in this process, as train.yml has them."""
        (self.folder / "page.md").touch()
        monkeypatch.chdir(self.source.folder)
        for name, value in self.variables(**inputs).items():
            monkeypatch.setenv(name, value)
        with contextlib.suppress(UserError, RunFailed, Stopped):
            jobs.check()
            jobs.image()
            jobs.run()
        with contextlib.suppress(UserError, RunFailed):
            jobs.stop()
        jobs.summary()
        record = json.loads((self.folder / "out" / "job.json").read_text())
        return (self.folder / "page.md").read_text(), record

    def artifact(self, name: str = "train-1-1") -> dict[str, str]:
        """Path and text of each file of an artifact."""
        folder = self.artifacts / name
        return {
            path.relative_to(folder).as_posix(): path.read_text(errors="replace")
            for path in folder.rglob("*")
            if path.is_file()
        }

    def job(self, name: str = "train-1-1") -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.artifact(name)["job.json"])
        return record

    def left_behind(self) -> list[str]:
        """Containers, and locks that are held; the file of one whose holder was killed is none."""
        left = [process.name for process in self.engine.processes.values()]
        folder = self.folder / "locks"
        return left + [lock.name for lock in folder.iterdir() if locks.is_held(folder, lock.name)]


@contextlib.contextmanager
def at(folder: Path, source: act.Source) -> Iterator[Machine]:
    """A machine whose folders lie there, without GPUs."""
    names = ("runs", "cache", "locks", "home")
    for name in names:
        (folder / name).mkdir()
    runs, cache, lock_folder, home = (folder / name for name in names)
    settings = folder / "host.yaml"
    settings.write_text(
        f"runs: {runs}\ncache: {cache}\nlocks: {lock_folder}\nbase_image: {BASE_IMAGE}\n"
        "gpus: none\ntarget: cpu\nfree_disk: 1m\nmemory: 1g\ngrace: 20\n"
    )
    with Engine() as engine:
        engine.add_image(BASE_IMAGE)
        yield Machine(
            folder, source, engine,
            {
                "DOCKER_HOST": engine.url,
                "HOME": str(home),
                "MAINRUN_HOST_CONFIG": str(settings),
                "PATH": f"{HERE / 'bin'}:{os.environ['PATH']}",
                "STAND_IN_LOG": str(folder / "called"),
                "TEST_PYTHON": sys.executable,
            },
        )  # fmt: skip
