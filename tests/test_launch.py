"""A task in its container, with a real Engine: how it ends, and that nothing stays behind.

The image is of this tree, on the base image that tests/engine.sh makes.
"""

import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mainrun import launch
from mainrun.request import chosen_gpus
from tests.conftest import COMMAND

CANARY = "canary-0123456789-canary"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_come_whole_however_the_stream_is_cut(size: int):
    text = "first\nzweite ä\r\n\nlast € without end"
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(launch.lines_of(chunks)) == ["first", "zweite ä", "", "last € without end"]


@pytest.fixture
def settings(tmp_path: Path, job_image: str) -> Path:
    """The machine's settings for these tests."""
    path = tmp_path / "host.yaml"
    text = {
        "image": job_image, "runs": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"),
        "locks": str(tmp_path / "locks"), "gpus": "none", "grace": 60, "free_disk": "1g",
    }  # fmt: skip
    path.write_text(json.dumps(text))
    return path


Launcher = Callable[..., subprocess.Popen]


@pytest.fixture
def start(settings: Path, tmp_path: Path) -> Iterator[Launcher]:
    """Starts `mainrun launch …`; afterwards nothing of it may be left."""
    started: list[subprocess.Popen] = []

    def go(*words: str, **environment: str) -> subprocess.Popen:
        env = os.environ | {"MAINRUN_HOST_CONFIG": str(settings)} | environment
        process = subprocess.Popen(
            [*COMMAND, "launch", *words],
            env=env, cwd=tmp_path, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        started.append(process)
        return process

    yield go
    for process in started:
        process.kill()
        process.wait()
    run_mainrun(settings, "launch", "--reap")


def run_mainrun(settings: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"MAINRUN_HOST_CONFIG": str(settings)}
    return subprocess.run([*COMMAND, *words], env=env, capture_output=True, text=True)


def engine(*words: str) -> str:
    return subprocess.run(["docker", *words], capture_output=True, text=True, check=True).stdout


def until(process: subprocess.Popen, said: str) -> list[str]:
    """Reads lines up to one that has `said`; a checkpoint or more is too late for it."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if said in line:
            return lines
        if len(lines) > 100:
            break
    raise AssertionError(f"never said {said!r}: {''.join(lines)[-2000:]}")


TINY = [
    "train", "config/base/quickstart.yaml", "data.num_documents=600", "data.context_length=16",
    "tokenizer.vocab_size=320", "model.d_model=16", "model.num_layers=2", "model.mlp.hidden=32",
    "model.attention.num_heads=2", "training.batch_size=8", "training.max_steps=60",
    "training.evals_per_epoch=1", "training.num_samples=0", "training.checkpoint.every.steps=20",
    "tracking.wandb=disabled",
]  # fmt: skip
ENDLESS = [*TINY, "training.max_steps=1000000"]


def left_of(tmp_path: Path) -> list[str]:
    """Containers of this test, by the folder that they write to."""
    return engine("ps", "-aq", "--filter", f"volume={tmp_path}/runs").split()


def assert_nothing_is_left(tmp_path: Path) -> None:
    assert left_of(tmp_path) == []
    assert list((tmp_path / "locks").iterdir()) == []
    owners = {path.lstat().st_uid for path in tmp_path.rglob("*")}
    assert owners == {os.getuid()}


@pytest.mark.docker
def test_a_task_runs_and_leaves_its_run_and_nothing_else(start: Launcher, tmp_path: Path):
    process = start(*TINY, "--run-dir", "runs/a", WANDB_API_KEY=CANARY)
    out, _ = process.communicate()
    assert process.returncode == 0, out
    assert CANARY not in out
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 60)
    assert_nothing_is_left(tmp_path)


@pytest.mark.docker
@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM]], ids=str)
def test_a_stop_is_passed_on_once_and_waited_for(
    start: Launcher, tmp_path: Path, signals: list[signal.Signals], settings: Path
):
    process = start(*ENDLESS, "--run-dir", "runs/a")
    until(process, "/1000000  loss")
    for number in signals:
        process.send_signal(number)
    out, _ = process.communicate()
    assert process.returncode == 75, out
    assert "saved a complete checkpoint" in out
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert_nothing_is_left(tmp_path)


@pytest.mark.docker
def test_secrets_reach_the_task_and_not_the_containers_description(start: Launcher, tmp_path: Path):
    process = start(*ENDLESS, "tracking.wandb=auto", WANDB_API_KEY=CANARY, WANDB_MODE="offline")
    until(process, "/1000000  loss")
    (name,) = left_of(tmp_path)
    assert CANARY not in engine("inspect", name)
    assert CANARY not in engine("logs", name)
    environ = engine("exec", name, "sh", "-c", "cat /proc/[0-9]*/environ | tr '\\0' '\\n'")
    assert f"WANDB_API_KEY={CANARY}" in environ
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75


@pytest.mark.docker
def test_a_killed_launcher_leaves_a_stray_that_saves_when_it_is_reaped(
    start: Launcher, tmp_path: Path, settings: Path
):
    process = start(*ENDLESS, "--run-dir", "runs/a")
    until(process, "/1000000  loss")
    process.kill()
    process.wait()
    assert len(left_of(tmp_path)) == 1
    done = run_mainrun(settings, "launch", "--reap")
    assert "1 strays removed" in done.stderr
    summary = json.loads((tmp_path / "runs" / "a" / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert_nothing_is_left(tmp_path)


@pytest.mark.docker
def test_a_watched_job_is_not_reaped_and_can_be_stopped_by_its_label(
    start: Launcher, settings: Path, tmp_path: Path
):
    process = start(*ENDLESS)
    until(process, "/1000000  loss")
    assert "0 strays" in run_mainrun(settings, "launch", "--reap").stderr
    (left,) = left_of(tmp_path)
    label = engine("inspect", "--format", '{{index .Config.Labels "mainrun.job"}}', left).strip()
    assert run_mainrun(settings, "launch", "--stop", label).returncode == 0
    assert process.wait() == 75
    assert_nothing_is_left(tmp_path)


@pytest.mark.docker
def test_a_job_that_takes_more_memory_than_it_may_says_so(start: Launcher, tmp_path: Path):
    process = start("--memory", "150m", *TINY)  # less than importing JAX takes
    out, _ = process.communicate()
    assert process.returncode == 137, out
    assert "took more than its 0.1 GiB of memory" in out
    assert_nothing_is_left(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[None]:
    """A disk of 600 KiB where runs lie."""
    (tmp_path / "runs").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(tmp_path / "runs")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root can mount a small disk")
    yield
    subprocess.run(["umount", str(tmp_path / "runs")], check=True)


@pytest.mark.docker
def test_a_full_disk_is_the_reason_that_is_given(start: Launcher, small_disk: None):
    process = start(*ENDLESS, "--run-dir", "runs/a")
    out, _ = process.communicate()
    assert process.returncode == 1
    last = out.splitlines()[-1]
    assert last.startswith("mainrun: train: ")
    assert "no space left" in last.lower()


@pytest.mark.docker
@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--image", "mainrun:absent"], {}, "the image mainrun:absent is not on this machine"),
        (["--gpus", "0"], {}, "NVIDIA Container Toolkit is missing"),
        ([], {"DOCKER_HOST": "unix:///nonexistent"}, "no Docker Engine answers"),
    ],
    ids=["image", "toolkit", "engine"],
)
def test_what_is_missing_is_said_in_plain_words(
    start: Launcher, tmp_path: Path, words: list[str], environment: dict[str, str], said: str
):
    if said.startswith("NVIDIA") and chosen_gpus("auto"):
        pytest.skip("this machine has GPUs")
    process = start(*words, *TINY, **environment)
    out, _ = process.communicate()
    assert process.returncode == 2
    assert said in out
    assert "Traceback" not in out
    assert len(out.strip().splitlines()) == 1
    assert not list((tmp_path / "runs").glob("*"))


@pytest.mark.docker
def test_a_mistake_in_the_config_is_the_containers_own_last_word(start: Launcher, tmp_path: Path):
    process = start("train", "optimizer.learning_rate=-1")
    out, _ = process.communicate()
    assert process.returncode == 2
    assert out.splitlines()[-1].startswith("mainrun: train: optimizer.learning_rate=-1")
    assert_nothing_is_left(tmp_path)


@pytest.mark.docker
def test_words_are_never_read_by_a_shell_or_a_template(start: Launcher, tmp_path: Path):
    names = ["$(touch runs/CANARY)", "`touch runs/CANARY`", "${HOME}", "';touch runs/CANARY'"]
    for name in names:
        process = start("config", f"tracking.name={json.dumps(name)}")
        out, _ = process.communicate()
        assert process.returncode == 0, out
        assert name.replace("'", "''") in out
    assert not (tmp_path / "runs" / "CANARY").exists()
