"""A job cancelled at every moment, as the runner does it: nothing is lost, and nothing stays.

The steps are those of the workflow, the Engine and the image are real, and the runner is emulated
from its source (tests/runner_cancellation.py): SIGINT, 7.5 s, SIGTERM, 2.5 s, SIGKILL, then the
steps that always run.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mainrun import locks
from tests import runner_cancellation
from tests.conftest import COMMAND, REPOSITORY
from tests.test_run import assert_same_end

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

OVERRIDES = [
    "data.num_documents=600", "data.context_length=32", "tokenizer.vocab_size=320",
    "model.d_model=32", "model.num_layers=2", "model.mlp.hidden=64", "model.attention.num_heads=2",
    "training.batch_size=16", "training.max_steps=300", "training.evals_per_epoch=1",
    "training.num_samples=0", "training.checkpoint.every.steps=10",
]  # fmt: skip
SECRET = "canary-0123456789-canary"
SHA = "c" * 40
NAME = "quickstart-1-1"


@dataclass
class Machine:
    """A GPU machine without GPUs: its folders, and the jobs that were dispatched to it."""

    folder: Path
    jobs: int = 0
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        return self.folder / "runs" / NAME

    def dispatch(self, **inputs: str) -> "Job":
        self.jobs += 1
        workspace = self.folder / f"workspace-{self.jobs}"
        workspace.mkdir()
        given = {"CONFIG": "quickstart", "OVERRIDES": " ".join(OVERRIDES), "TRACKING": "offline"}
        given |= inputs
        environment = {
            "MAINRUN_HOST_CONFIG": str(self.folder / "host.yaml"),
            "MAINRUN_JOB_DIR": str(workspace / "out"),
            "GITHUB_ACTIONS": "true", "GITHUB_SHA": SHA,
            "GITHUB_RUN_ID": str(self.jobs), "GITHUB_RUN_ATTEMPT": "1",
            "GITHUB_REPOSITORY": "ada/mainrun", "GITHUB_SERVER_URL": "https://github.example",
            "GITHUB_ACTOR": "ada", "GITHUB_STEP_SUMMARY": str(workspace / "page.md"),
            **{f"INPUT_{name}": value for name, value in given.items()},
        }  # fmt: skip
        return Job(self, workspace, environment)

    def containers(self) -> list[str]:
        found = subprocess.run(
            ["docker", "ps", "-aq", "--filter", f"volume={self.folder}/runs"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return found.stdout.split()

    def assert_nothing_is_left(self) -> None:
        assert self.containers() == []
        folder = self.folder / "locks"
        assert not [path.name for path in folder.glob("*") if locks.is_held(folder, path.name)]
        assert {path.lstat().st_uid for path in self.folder.rglob("*")} == {os.getuid()}


@dataclass
class Job:
    machine: Machine
    workspace: Path
    environment: Mapping[str, str]

    def step(self, name: str) -> int:
        return self.begin(name).wait()

    def begin(self, name: str, *, runner: bool = False) -> subprocess.Popen[bytes]:
        start = runner_cancellation.start_runner if runner else runner_cancellation.start_step
        secret = {"WANDB_API_KEY": SECRET} if name == "run" else {}
        with (self.workspace / "log").open("ab") as log:
            return start(
                f"exec {COMMAND[0]} job {name}",
                cwd=REPOSITORY if name == "image" else self.workspace,
                output=log,
                environment={**self.environment, **secret},
            )

    def after(self) -> None:
        """The steps that always run."""
        assert self.step("stop") == 0, self.log
        assert self.step("summary") == 0, self.log

    @property
    def log(self) -> str:
        return (self.workspace / "log").read_text()

    @property
    def page(self) -> str:
        return (self.workspace / "page.md").read_text()

    @property
    def ending(self) -> dict:
        return json.loads((self.workspace / "out" / "job.json").read_text())["ending"]


Moment = Callable[[Job], bool]


def wait_until(job: Job, process: subprocess.Popen[bytes], moment: Moment) -> None:
    while not moment(job):
        assert process.poll() is None, f"it ended before the moment came:\n{job.log}"
        time.sleep(0.002)  # a poll; nothing depends on its length


def said(text: str) -> Moment:
    return lambda job: text in job.log


def recorded(event: str, times: int) -> Moment:
    needle = f'"event": "{event}"'.encode()

    def happened(job: Job) -> bool:
        record = job.machine.run / "events.jsonl"
        return record.is_file() and record.read_bytes().count(needle) >= times

    return happened


def saving(job: Job) -> bool:
    folder = job.machine.run / "checkpoints"
    return folder.is_dir() and any(folder.glob("*tmp*"))


@pytest.fixture
def machine(tmp_path: Path, job_image: str) -> Machine:
    subprocess.run(["docker", "tag", job_image, f"mainrun:{SHA}"], check=True)
    return made(tmp_path)


def made(folder: Path) -> Machine:
    settings = {
        "runs": str(folder / "runs"), "cache": str(folder.parent / "cache"), "gpus": "none",
        "locks": str(folder / "locks"), "base_image": "mainrun-base:test", "target": "cpu",
        "free_disk": "1g", "grace": 60,
    }  # fmt: skip
    (folder / "host.yaml").write_text(json.dumps(settings))
    return Machine(folder)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, job_image: str) -> Path:
    """The run folder of a job that nobody cancelled."""
    subprocess.run(["docker", "tag", job_image, f"mainrun:{SHA}"], check=True)
    machine = made(tmp_path_factory.mktemp("whole"))
    job = machine.dispatch()
    assert job.step("check") == 0, job.log
    assert job.step("run") == 0, job.log
    job.after()
    assert job.ending["kind"] == "finished"
    assert SECRET not in job.log
    machine.assert_nothing_is_left()
    return machine.run


def assert_resumed_ends_the_same(machine: Machine, expected: Path) -> None:
    job = machine.dispatch(RESUME=NAME, OVERRIDES="")
    assert job.step("check") == 0, job.log
    assert job.step("run") == 0, job.log
    job.after()
    assert "finished" in job.ending["kind"]
    assert_same_end(machine.run, expected)
    machine.assert_nothing_is_left()


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(said("compiling the training step"), id="in the first compile"),
        pytest.param(recorded("tracking_started", 1), id="in an evaluation"),
        pytest.param(recorded("train_step", 5), id="in a step"),
        pytest.param(saving, id="in a save"),
    ],
)
def test_a_cancelled_job_saves_and_its_resumption_ends_the_same(
    machine: Machine, uninterrupted: Path, moment: Moment
):
    job = machine.dispatch()
    process = job.begin("run")
    wait_until(job, process, moment)
    runner_cancellation.cancel(process)
    job.after()
    assert job.ending["kind"] == "stopped", job.ending
    assert f"`resume` = `{NAME}`" in job.page
    machine.assert_nothing_is_left()
    assert_resumed_ends_the_same(machine, uninterrupted)


def test_a_job_cancelled_twice_in_a_row_ends_the_same(machine: Machine, uninterrupted: Path):
    inputs: dict[str, str] = {}
    for steps in (5, 60):
        job = machine.dispatch(**inputs)
        process = job.begin("run")
        wait_until(job, process, recorded("train_step", steps))
        runner_cancellation.cancel(process)
        job.after()
        assert job.ending["kind"] == "stopped"
        inputs = {"RESUME": NAME, "OVERRIDES": ""}
    assert_resumed_ends_the_same(machine, uninterrupted)


def test_the_next_job_reaps_what_a_runner_that_was_killed_left(
    machine: Machine, uninterrupted: Path
):
    job = machine.dispatch()
    runner = job.begin("run", runner=True)
    wait_until(job, runner, recorded("train_step", 5))
    runner_cancellation.kill_tree(runner)
    assert len(machine.containers()) == 1
    assert_resumed_ends_the_same(machine, uninterrupted)


def test_a_job_whose_runner_alone_was_killed_stops_by_itself_and_saves(
    machine: Machine, uninterrupted: Path
):
    job = machine.dispatch()
    runner = job.begin("run", runner=True)
    wait_until(job, runner, recorded("train_step", 5))
    runner.kill()
    runner.wait()
    while machine.containers():
        time.sleep(0.1)  # a poll; pytest's time limit ends it
    summary = json.loads((machine.run / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert_resumed_ends_the_same(machine, uninterrupted)


def test_a_job_cancelled_in_the_build_leaves_no_container(machine: Machine):
    """Of the build too: a step of the builder is a container."""
    job = machine.dispatch()
    # Another base is another first layer: nothing of it is in the builder's cache.
    base = f"mainrun-base:{os.getpid()}"
    subprocess.run(
        ["docker", "build", "--quiet", "--tag", base, "-"],
        input=f"FROM mainrun-base:test\nLABEL uncached={os.getpid()}\n".encode(), check=True,
    )  # fmt: skip
    settings = json.loads((machine.folder / "host.yaml").read_text()) | {"base_image": base}
    (machine.folder / "host.yaml").write_text(json.dumps(settings))
    try:
        process = job.begin("image")
        wait_until(job, process, said("install.py train"))
        runner_cancellation.cancel(process)
        job.after()
        steps = ["docker", "ps", "-aq", "--filter", f"ancestor={base}"]
        left = subprocess.run(steps, check=True, capture_output=True, text=True).stdout
    finally:
        subprocess.run(["docker", "rmi", "--no-prune", base], check=True)
    assert job.ending["kind"] == "stopped"
    assert "while the image was built" in job.page
    assert left == ""
    machine.assert_nothing_is_left()


def test_the_secret_is_nowhere(machine: Machine):
    """Not in the log, the page, the artifact, the run folder or the image."""
    job = machine.dispatch(OVERRIDES=" ".join([*OVERRIDES, "training.max_steps=5"]))
    assert job.step("run") == 0, job.log
    job.after()
    for path in machine.folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path
    told = subprocess.run(
        ["docker", "image", "inspect", f"mainrun:{SHA}"], check=True, capture_output=True
    )
    history = subprocess.run(
        ["docker", "history", "--no-trunc", f"mainrun:{SHA}"], check=True, capture_output=True
    )
    assert SECRET.encode() not in told.stdout + history.stdout
