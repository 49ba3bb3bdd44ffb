"""A task in its container: what it may do, how it ends, and that nothing stays behind.

The flags and the words are tested without an Engine; the rest is the real one, with an image of
this tree on the base image that `tests/engine.sh` makes.
"""

import dataclasses
import getpass
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mainrun import launch
from mainrun.errors import UserError
from mainrun.host import Host
from mainrun.launch import Request
from tests.conftest import COMMAND

REQUEST = Request(
    task="train",
    words=("config/base/quickstart.yaml", "--run-dir", "runs/a"),
    label="12-1",
    image="mainrun:abc",
    run="a",
    url="https://github.example/ada/mainrun/actions/runs/12",
    by="ada",
)
CANARY = "canary-0123456789-canary"


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    return Host(runs=str(tmp_path / "runs"), cache=str(tmp_path / "cache"), gpus="none")


def test_a_container_has_a_users_rights_and_no_more(machine: Host):
    options = launch.container_options(REQUEST, machine)
    assert options["user"] == f"{os.getuid()}:{os.getgid()}"
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges:true"]
    assert options["read_only"] is True
    assert options["init"] is True
    assert options["pids_limit"] > 0
    assert options["mem_limit"] == options["memswap_limit"] > 0
    assert not {"privileged", "ipc_mode", "pid_mode", "cap_add", "devices"} & options.keys()


def test_a_container_sees_runs_and_caches_and_no_other_folder(machine: Host, tmp_path: Path):
    mounts = launch.container_options(REQUEST, machine)["mounts"]
    assert {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in mounts} == {
        "/app/runs": (str(tmp_path / "runs"), False),
        "/cache": (str(tmp_path / "cache"), False),
    }


def test_data_can_be_read_only(machine: Host, tmp_path: Path):
    with_data = dataclasses.replace(machine, data=str(tmp_path))
    mounts = launch.container_options(REQUEST, with_data)["mounts"]
    assert [mount["ReadOnly"] for mount in mounts if mount["Target"] == "/app/data"] == [True]


def test_no_secret_is_in_what_docker_records(machine: Host):
    options = launch.container_options(REQUEST, machine, passed={"WANDB_API_KEY": CANARY})
    assert CANARY not in repr(options)
    assert options["stdin_open"] is True
    assert options["environment"]["MAINRUN_SECRETS"] == "stdin"


def test_the_command_is_a_task_with_its_words_untouched(machine: Host):
    request = dataclasses.replace(REQUEST, words=("$(id)", "a b", "x=;rm"))
    command = launch.container_options(request, machine)["command"]
    assert command == ["task", "-x", "train", "--", "$(id)", "a b", "x=;rm"]


def test_without_gpus_jax_is_told_to_use_the_cpu(machine: Host):
    options = launch.container_options(REQUEST, machine)
    assert options["environment"]["JAX_PLATFORMS"] == "cpu"
    assert options["environment"]["MAINRUN_GPUS"] == "none"
    assert options["device_requests"] == []


def test_with_gpus_those_are_given_and_jax_may_use_nothing_else(machine: Host):
    options = launch.container_options(dataclasses.replace(REQUEST, gpus=(1, 3)), machine)
    assert options["environment"]["JAX_PLATFORMS"] == "cuda"
    assert options["environment"]["MAINRUN_GPUS"] == "2"
    (devices,) = options["device_requests"]
    assert devices["DeviceIDs"] == ["1", "3"]
    assert devices["Capabilities"] == [["gpu"]]
    assert options["labels"]["mainrun.gpus"] == "1,3"


def test_limits_are_settings(machine: Host):
    limited = dataclasses.replace(machine, memory="60g", shm_size="16g", cpus=7.5, memlock=True)
    options = launch.container_options(REQUEST, limited)
    assert options["mem_limit"] == 60 * 2**30
    assert options["shm_size"] == 16 * 2**30
    assert options["nano_cpus"] == 7_500_000_000
    assert [limit["Name"] for limit in options["ulimits"]] == ["memlock"]


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, "finished"), (1, "failed"), (2, "refused"), (75, "stopped"), (143, "stopped"),
     (137, "killed"), (7, "failed")],
)  # fmt: skip
def test_every_exit_code_has_a_kind_and_a_sentence(code: int, kind: str):
    found = launch.ending(code, [])
    assert (found.kind, found.exit_code) == (kind, code)
    assert found.sentence
    assert found.remedy or code == 0


def test_the_reason_is_the_commands_own_last_word():
    log = [
        "mainrun: failed: the disk is full",
        'task: Failed to run task "train": exit status 1',
    ]
    assert launch.ending(1, log).sentence == "the disk is full"


def test_out_of_memory_is_told_from_a_kill():
    found = launch.ending(137, [], out_of_memory=True, memory_bytes=3 * 2**30)
    assert found.kind == "out_of_memory"
    assert "3.0 GiB" in found.sentence
    assert "training.batch_size" in found.remedy


def test_a_finished_run_is_finished_also_where_a_child_was_out_of_memory():
    assert launch.ending(0, [], out_of_memory=True, memory_bytes=1).kind == "finished"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_come_whole_however_the_stream_is_cut(size: int):
    text = "first\nzweite ä\r\n\nlast € without end"
    data = text.encode()
    chunks = [data[i : i + size] for i in range(0, len(data), size)]
    assert list(launch.lines_of(chunks)) == ["first", "zweite ä", "", "last € without end"]


def test_at_a_terminal_a_run_is_named_after_time_and_config(machine: Host):
    request = launch.request_here("train", ["config/base/baseline.yaml", "seed=1"], machine)
    assert request.run.endswith("-baseline")
    assert request.words[-2:] == ("--run-dir", f"runs/{request.run}")
    assert request.by == getpass.getuser()


def test_at_a_terminal_a_run_may_be_named(machine: Host):
    request = launch.request_here("train", ["--run-dir", "runs/mine"], machine)
    assert (request.run, request.words) == ("mine", ("--run-dir", "runs/mine"))


def test_a_run_folder_of_this_machine_is_the_same_in_the_container(machine: Host, tmp_path: Path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    request = launch.request_here("resume", [str(tmp_path / "runs" / "mine"), "seed=1"], machine)
    assert request.words == ("runs/mine", "seed=1")
    with pytest.raises(UserError, match="other is not in"):
        launch.request_here("resume", ["runs/other"], machine)


def test_a_template_of_tasks_is_refused(machine: Host):
    """`task` fills templates in its arguments too: measured with 3.54."""
    from mainrun.stop import StopSignal

    request = dataclasses.replace(REQUEST, words=("tracking.name={{.CLI_ARGS}}",))
    with pytest.raises(UserError, match="cannot be handed to a task"):
        launch.launch(request, machine, stopping=StopSignal(), output=print)


def test_unknown_task_is_answered_with_those_there_are(machine: Host):
    with pytest.raises(UserError, match="'tain' is no task of a container: there are train"):
        launch.request_here("tain", [], machine)


def test_gpus_are_refused_where_there_are_none():
    assert launch.chosen_gpus("none") == ()
    if launch.chosen_gpus("auto"):
        pytest.skip("this machine has GPUs")
    with pytest.raises(UserError, match="no NVIDIA driver answers"):
        launch.chosen_gpus("all")


# ---------------------------------------------------------------------------------------------
# With the real Engine


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
    run_mainrun(settings, "launch", "--stop", label)
    assert process.wait() == 75


@pytest.mark.docker
def test_a_job_that_takes_more_memory_than_it_may_says_so(start: Launcher, tmp_path: Path):
    process = start("--memory", "300m", *TINY)
    out, _ = process.communicate()
    assert process.returncode == 137, out
    assert "took more than its 0.3 GiB of memory" in out
    assert_nothing_is_left(tmp_path)


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
    if said.startswith("NVIDIA") and launch.chosen_gpus("auto"):
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
