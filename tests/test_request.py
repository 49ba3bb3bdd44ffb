"""What a container may do, and what a person at a terminal may ask for. No Engine is needed."""

import dataclasses
import getpass
import os
from pathlib import Path

import pytest

from mainrun.errors import UserError
from mainrun.host import Host
from mainrun.request import Request, check_words, chosen_gpus, container_options, request_here

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
    options = container_options(REQUEST, machine)
    assert options["user"] == f"{os.getuid()}:{os.getgid()}"
    assert options["cap_drop"] == ["ALL"]
    assert options["security_opt"] == ["no-new-privileges:true"]
    assert options["read_only"] is True
    assert options["init"] is True
    assert options["pids_limit"] > 0
    assert options["mem_limit"] == options["memswap_limit"] > 0
    assert not {"privileged", "ipc_mode", "pid_mode", "cap_add", "devices"} & options.keys()


def test_a_container_sees_runs_and_caches_and_no_other_folder(machine: Host, tmp_path: Path):
    mounts = container_options(REQUEST, machine)["mounts"]
    assert {mount["Target"]: (mount["Source"], mount["ReadOnly"]) for mount in mounts} == {
        "/app/runs": (str(tmp_path / "runs"), False),
        "/cache": (str(tmp_path / "cache"), False),
    }


def test_data_can_be_read_only(machine: Host, tmp_path: Path):
    with_data = dataclasses.replace(machine, data=str(tmp_path))
    mounts = container_options(REQUEST, with_data)["mounts"]
    assert [mount["ReadOnly"] for mount in mounts if mount["Target"] == "/app/data"] == [True]


def test_no_secret_is_in_what_docker_records(machine: Host):
    options = container_options(REQUEST, machine, passed={"WANDB_API_KEY": CANARY})
    assert CANARY not in repr(options)
    assert options["stdin_open"] is True
    assert options["environment"]["MAINRUN_SECRETS"] == "stdin"


def test_the_command_is_a_task_with_its_words_untouched(machine: Host):
    request = dataclasses.replace(REQUEST, words=("$(id)", "a b", "x=;rm"))
    command = container_options(request, machine)["command"]
    assert command == ["task", "-x", "train", "--", "$(id)", "a b", "x=;rm"]


def test_without_gpus_jax_is_told_to_use_the_cpu(machine: Host):
    options = container_options(REQUEST, machine)
    assert options["environment"]["JAX_PLATFORMS"] == "cpu"
    assert options["environment"]["MAINRUN_GPUS"] == "none"
    assert options["device_requests"] == []


def test_with_gpus_those_are_given_and_jax_may_use_nothing_else(machine: Host):
    options = container_options(dataclasses.replace(REQUEST, gpus=(1, 3)), machine)
    assert options["environment"]["JAX_PLATFORMS"] == "cuda"
    assert options["environment"]["MAINRUN_GPUS"] == "2"
    (devices,) = options["device_requests"]
    assert devices["DeviceIDs"] == ["1", "3"]
    assert devices["Capabilities"] == [["gpu"]]
    assert options["labels"]["mainrun.gpus"] == "1,3"


def test_limits_are_settings(machine: Host):
    limited = dataclasses.replace(machine, memory="60g", shm_size="16g", cpus=7.5, memlock=True)
    options = container_options(REQUEST, limited)
    assert options["mem_limit"] == 60 * 2**30
    assert options["shm_size"] == 16 * 2**30
    assert options["nano_cpus"] == 7_500_000_000
    assert [limit["Name"] for limit in options["ulimits"]] == ["memlock"]


def test_at_a_terminal_a_run_is_named_after_time_and_config(machine: Host):
    request = request_here("train", ["config/base/baseline.yaml", "seed=1"], machine)
    assert request.run.endswith("-baseline")
    assert request.words[-2:] == ("--run-dir", f"runs/{request.run}")
    assert request.by == getpass.getuser()


def test_at_a_terminal_a_run_may_be_named(machine: Host):
    request = request_here("train", ["--run-dir", "runs/mine"], machine)
    assert (request.run, request.words) == ("mine", ("--run-dir", "runs/mine"))


def test_a_named_run_may_be_named_in_one_word(machine: Host):
    request = request_here("train", ["--run-dir=mine"], machine)
    assert (request.run, request.words) == ("mine", ("--run-dir", "runs/mine"))


def test_a_sweep_of_this_machine_is_gone_on_with(machine: Host, tmp_path: Path):
    (tmp_path / "runs" / "lr").mkdir(parents=True)
    request = request_here("sweep", ["runs/lr", "--count", "9"], machine)
    assert (request.run, request.words) == ("lr", ("runs/lr", "--count", "9"))
    new = request_here("sweep", ["config/sweep/quickstart.yaml"], machine)
    assert new.words[-2:] == ("--run-dir", f"runs/{new.run}")


def test_a_run_folder_of_this_machine_is_the_same_in_the_container(machine: Host, tmp_path: Path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    request = request_here("resume", [str(tmp_path / "runs" / "mine"), "seed=1"], machine)
    assert request.words == ("runs/mine", "seed=1")
    with pytest.raises(UserError, match="other is not in"):
        request_here("resume", ["runs/other"], machine)


@pytest.mark.parametrize("task", ["resume", "evaluate", "generate", "report"])
def test_at_a_terminal_a_link_is_no_run_folder_either(machine: Host, tmp_path: Path, task: str):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to("/etc")
    with pytest.raises(UserError, match="link is not in"):
        request_here(task, ["runs/link"], machine)


def test_what_writes_a_file_does_so_where_the_container_may(machine: Host, tmp_path: Path):
    """Its root is read-only; `runs/` is not."""
    for task, ending in (("profile", "-profile"), ("find-lr", "-find-lr.png")):
        *words, option, place = request_here(task, ["config/base/gpt.yaml"], machine).words
        assert (words, option) == (["config/base/gpt.yaml"], "--output")
        assert place.startswith("runs/")
        assert place.endswith(ending)
        for named in (["--output", "runs/mine"], ["--output=runs/mine"]):
            assert request_here(task, named, machine).words == tuple(named)
    for name in ("a", "b"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert request_here("report", ["runs/a"], machine).words == ("runs/a",)
    several = request_here("report", ["runs/a", "runs/b"], machine).words
    assert several[:3] == ("runs/a", "runs/b", "--output")
    assert several[3].endswith("-report.html")


def test_unknown_task_is_answered_with_those_there_are(machine: Host):
    with pytest.raises(UserError, match="'tain' is no task of a container: there are train"):
        request_here("tain", [], machine)


def test_gpus_are_refused_where_there_are_none():
    assert chosen_gpus("none") == ()
    if chosen_gpus("auto"):
        pytest.skip("this machine has GPUs")
    with pytest.raises(UserError, match="no NVIDIA driver answers"):
        chosen_gpus("all")


def test_a_template_of_tasks_is_refused():
    """`task` fills templates in its arguments too: measured with 3.54."""
    check_words(["tracking.name={.CLI_ARGS}"])
    with pytest.raises(UserError, match="cannot be handed to a task"):
        check_words(["tracking.name={{.CLI_ARGS}}"])
