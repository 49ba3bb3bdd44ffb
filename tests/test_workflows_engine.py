"""The workflow files, run by act with a real Engine: from the button to the artifact.

Nothing is faked but GitHub itself: the checkout is a clone of this commit, the set-up installs
the host's packages, the image is built on mainrun-base:test, and the task trains in a container.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from mainrun import locks
from tests.workflows import act

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]

SECRET = "canary-0123456789-canary"
TINY = (
    "data.num_documents=600 data.context_length=32 tokenizer.vocab_size=320 model.d_model=32 "
    "model.num_layers=2 model.mlp.hidden=64 model.attention.num_heads=2 training.batch_size=16 "
    "training.num_samples=1"
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, job_image: str) -> act.Source:
    """This tree as one commit; `job_image` fills the builder's cache."""
    act.binary("act")
    return act.Source(tmp_path_factory.mktemp("source"))


@pytest.fixture
def dispatched(tmp_path: Path, source: act.Source):
    """Starts a workflow on a machine of its own."""
    settings = {
        "runs": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"),
        "locks": str(tmp_path / "locks"), "base_image": "mainrun-base:test", "target": "cpu",
        "gpus": "none", "free_disk": "1g", "grace": 60,
    }  # fmt: skip
    (tmp_path / "host.yaml").write_text(json.dumps(settings))

    def dispatch(workflow: str, run_id: int = 1, **inputs: str) -> act.Running:
        return act.Running(
            workflow, source, inputs=inputs, artifacts=tmp_path / "artifacts", run_id=run_id,
            secrets={"WANDB_API_KEY": SECRET},
            environment={"MAINRUN_HOST_CONFIG": str(tmp_path / "host.yaml")},
        )  # fmt: skip

    yield dispatch
    subprocess.run(["docker", "rmi", f"mainrun:{source.sha}"], capture_output=True)


def assert_nothing_is_left(folder: Path) -> None:
    listed = ["docker", "ps", "-aq", "--filter", f"volume={folder}/runs"]
    assert subprocess.run(listed, check=True, capture_output=True, text=True).stdout == ""
    held = [path.name for path in (folder / "locks").glob("*") if locks.is_held(*path_of(path))]
    assert held == []
    assert {path.lstat().st_uid for path in folder.rglob("*")} == {os.getuid()}


def path_of(path: Path) -> tuple[Path, str]:
    return path.parent, path.name


def assert_secret_is_nowhere(done: act.Done, folder: Path) -> None:
    assert SECRET not in done.log + done.messages + done.summary
    for path in folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_train_from_the_button_to_the_artifact(dispatched, tmp_path: Path):
    with dispatched(
        "train", overrides=f"{TINY} training.max_steps=40", tracking="offline"
    ) as running:
        done = running.wait(500)
    assert done.succeeded, done
    assert "Training finished" in done.summary
    assert "xychart-beta" in done.summary
    run = tmp_path / "artifacts" / "train-1-1" / "runs" / "quickstart-1-1"
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 40)
    assert (run / "checkpoints" / "40").is_dir()
    assert json.loads((run / "environment.json").read_text())["commit"] is not None
    assert_nothing_is_left(tmp_path)
    assert_secret_is_nowhere(done, tmp_path)


def test_cancelled_on_the_page_and_resumed_from_the_artifact(dispatched, tmp_path: Path):
    endless = f"{TINY} training.max_steps=100000 training.checkpoint.every.steps=500"
    with dispatched("train", overrides=endless) as running:
        running.wait_for("/100000  loss", 400)
        running.cancel()
        done = running.wait(200)
    assert not done.succeeded
    assert done.is_well("Stop", "Summary", "Upload"), done
    assert "`resume` = `quickstart-1-1`" in done.summary
    stopped = json.loads((tmp_path / "runs" / "quickstart-1-1" / "summary.json").read_text())
    assert stopped["status"] == "stopped"
    assert_nothing_is_left(tmp_path)
    (tmp_path / "runs" / "quickstart-1-1").rename(tmp_path / "runs" / "lost")
    with dispatched(
        "train", run_id=2, resume_artifact="1", config="",
        overrides=f"training.max_steps={stopped['steps'] + 5}",
    ) as running:  # fmt: skip
        done = running.wait(500)
    assert done.succeeded, done
    resumed = json.loads((tmp_path / "runs" / "quickstart-1-1" / "summary.json").read_text())
    assert (resumed["status"], resumed["steps"]) == ("finished", stopped["steps"] + 5)
    assert_nothing_is_left(tmp_path)


def test_a_sweep_has_its_trials_in_the_artifact(dispatched, tmp_path: Path):
    with dispatched(
        "sweep", sweep="quickstart", count="2", backend="local",
        overrides=f"{TINY} training.max_steps=10",
    ) as running:  # fmt: skip
        done = running.wait(500)
    assert done.succeeded, done
    sweep = tmp_path / "artifacts" / "sweep-1-1" / "runs" / "quickstart-1-1"
    assert json.loads((sweep / "summary.json").read_text())["trials"]["finished"] == 2
    assert (sweep / "trials" / "trial-002" / "summary.json").is_file()
    assert "trial" in done.summary
    assert_nothing_is_left(tmp_path)
    assert_secret_is_nowhere(done, tmp_path)


def test_gpu_status_is_calm_without_a_gpu(dispatched, tmp_path: Path):
    with dispatched("gpu-status") as running:
        done = running.wait(300)
    assert done.succeeded, done
    assert "GPU" in done.summary
    (status,) = (tmp_path / "artifacts").rglob("gpu-status.json")
    assert json.loads(status.read_text())["problems"] == []


def test_update_builds_tries_and_moves_the_name(dispatched, source: act.Source):
    with dispatched("update") as running:
        done = running.wait(500)
    assert done.succeeded, done
    current = subprocess.run(
        ["docker", "image", "inspect", "mainrun:current", "--format", "{{.Id}}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    built = subprocess.run(
        ["docker", "image", "inspect", f"mainrun:{source.sha}", "--format", "{{.Id}}"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert current.stdout == built.stdout
    subprocess.run(["docker", "rmi", "mainrun:current"], check=True, capture_output=True)
