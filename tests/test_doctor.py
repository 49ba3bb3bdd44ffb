"""Is this machine ready: a laptop is no patient, a machine for jobs must have all it needs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mainrun import doctor, runners
from mainrun.doctor import Check
from mainrun.gpu import Gpus, GpuStatus
from mainrun.host import Host
from mainrun.machine import Disk
from mainrun.runners import Runner, Unit
from tests.test_machine import BUSY, CARD

SECRET = "a-key-that-nobody-may-see"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Settings of a machine with no Docker Engine and no key."""
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(runners, "FOLDER", tmp_path / "runners")
    places = {name: str(tmp_path / name) for name in ("runs", "cache", "locks")}
    return Host(free_disk="1k", **places)


def named(checks: list[Check], name: str) -> Check:
    (check,) = (check for check in checks if check.name == name)
    return check


def test_a_laptop_without_gpu_and_docker_is_told_that_training_works(host: Host):
    checks = doctor.examine(host)
    assert not doctor.has_problems(checks)
    assert named(checks, "Docker").state == "absent"
    assert named(checks, "GitHub runners").state == "absent"
    assert named(checks, "folders").state == "ok"
    text = doctor.table(checks)
    assert "Training works here. Jobs in containers need Docker." in text
    assert "Traceback" not in text
    assert max(map(len, text.splitlines())) <= 100


def test_the_same_lack_is_a_problem_where_runners_are_installed(host: Host, tmp_path: Path):
    (tmp_path / "runners" / "gpu").mkdir(parents=True)
    checks = doctor.examine(host)
    assert doctor.has_problems(checks)
    assert named(checks, "Docker").state == "problem"
    assert named(checks, "runner gpu").finding == "not registered"
    assert named(checks, "runner gpu-ops").state == "problem"
    assert all(
        check.remedy or check.name == "Docker" for check in checks if check.state == "problem"
    )
    assert "not ready" in doctor.table(checks)


def test_what_only_an_admin_can_see_is_listed(host: Host):
    found = doctor.as_dict(doctor.examine(host))
    assert found["ready"] is True
    assert len(found["github_settings"]) >= 7
    for setting in found["github_settings"]:
        assert setting in doctor.table(doctor.examine(host))


def test_a_key_is_found_and_never_shown(host: Host, monkeypatch: pytest.MonkeyPatch):
    assert named(doctor.examine(host), "W&B key").state == "absent"
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    checks = doctor.examine(host)
    assert named(checks, "W&B key").state == "ok"
    assert SECRET not in doctor.table(checks) + json.dumps(doctor.as_dict(checks))


def test_folders_that_cannot_be_written_are_named(host: Host, tmp_path: Path):
    (tmp_path / "a-file").touch()
    check = named(doctor.examine(replace(host, runs=str(tmp_path / "a-file" / "runs"))), "folders")
    assert check.state == "warning"
    assert str(tmp_path / "a-file" / "runs") in check.finding


def test_a_data_folder_that_is_not_there_is_a_problem(host: Host, tmp_path: Path):
    checks = doctor.examine(replace(host, data=str(tmp_path / "nowhere")))
    assert named(checks, "data").state == "problem"
    assert named(doctor.examine(replace(host, data=str(tmp_path))), "data").state == "ok"


def test_too_little_disk_and_too_much_memory_asked_are_seen(host: Host):
    checks = doctor.examine(replace(host, free_disk="9000t", memory="9000t"))
    assert {check.state for check in checks if check.name == "disk"} == {"warning"}
    assert named(checks, "memory").state == "problem"


HOOK_FOLDER = Path(__file__).parent.parent / ".github" / "runner" / "hooks"
HOOKS = tuple(str(HOOK_FOLDER / name) for name in ("started.sh", "completed.sh"))
RUNNERS = tuple(
    Runner(label, f"/srv/{label}", f"box-{label}", "https://github.com/ada/m", True, False, HOOKS)
    for label in runners.LABELS
)
UNITS = (Unit("mainrun-prune.timer", "active"), Unit("mainrun-metadata.service", "active"))
READY = replace(BUSY, runners=RUNNERS, units=UNITS)
"""The state of a machine that has all it needs."""


@pytest.fixture
def our_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks are looked for in this checkout."""
    monkeypatch.setattr(doctor, "HOOK_FOLDER", str(HOOK_FOLDER))


@pytest.mark.usefixtures("our_hooks")
def test_a_machine_that_has_everything_is_ready(host: Host):
    checks = doctor.checks(READY, host)
    states = {check.name: check.state for check in checks}
    assert not doctor.has_problems(checks)
    for name in ("GPU", "Docker", "Container Toolkit", "image", "runner gpu", "prune timer"):
        assert states[name] == "ok", named(checks, name)
    assert states["Docker rights"] == "warning", "who may use Docker is root"
    assert "This machine is ready." in doctor.table(checks)


def test_each_fault_of_a_machine_for_jobs_has_a_remedy(host: Host, subtests: pytest.Subtests):
    cases = [
        ({"gpus": replace(BUSY.gpus, driver_version="520.1")}, "GPU", "problem", "525 or newer"),
        ({"gpus": replace(BUSY.gpus, driver_version="550.1")}, "GPU", "ok", "for CUDA 12"),
        ({"gpus": Gpus(reason="not loaded")}, "GPU", "problem", "not loaded"),
        ({"gpus": Gpus(cards=(GpuStatus(0, fault="lost"),), driver_version="580.1")},
         "GPU", "problem", "lost"),
        ({"gpus": replace(BUSY.gpus, cards=(replace(CARD, ecc_uncorrected=1),))},
         "GPU", "problem", "1 memory error"),
        ({"toolkit": None}, "Container Toolkit", "problem", "nvidia-ctk is not there"),
        ({"toolkit": "1.17.4"}, "Container Toolkit", "warning", "From 1.18"),
        ({"engine": replace(BUSY.engine, gives_gpus=False)}, "Container Toolkit", "problem",
         "nvidia-ctk runtime configure"),
        ({"engine": replace(BUSY.engine, version="20.10.24+dfsg1")}, "Docker", "warning", "24"),
        ({"engine": replace(BUSY.engine, limits_memory=False)}, "Docker", "warning", "memory"),
        ({"engine": replace(BUSY.engine, is_rootless=True)}, "Docker rights", "ok", "rootless"),
        ({"images": ()}, "image", "absent", "no mainrun:current"),
        ({"disks": (Disk(("runs",), "/", 1, 10**12, 99.9),)}, "disk", "problem", "make room"),
    ]  # fmt: skip
    for changes, name, state, says in cases:
        with subtests.test(changes=changes, name=name, state=state):
            check = named(doctor.checks(replace(READY, **changes), host), name)
            assert check.state == state
            assert says in f"{check.finding} {check.remedy}"


@pytest.mark.usefixtures("our_hooks")
def test_a_runner_that_is_not_whole_is_a_problem(host: Host, subtests: pytest.Subtests):
    cases = [
        ({"name": ""}, "not registered"),
        ({"is_listening": False}, "does not listen"),
        ({"hooks": HOOKS[:1]}, "lacks our job hooks"),
        ({"hooks": ("/tmp/started.sh", "/tmp/completed.sh")}, "lacks our job hooks"),
    ]
    for changes, says in cases:
        with subtests.test(changes=changes):
            state = replace(READY, runners=(replace(RUNNERS[0], **changes), RUNNERS[1]))
            checks = doctor.checks(state, host)
            assert named(checks, "runner gpu").state == "problem"
            assert says in named(checks, "runner gpu").finding
            assert named(checks, "runner gpu").remedy
            assert named(checks, "runner gpu-ops").state == "ok"


def test_services_that_do_not_run_are_warned_of(host: Host, subtests: pytest.Subtests):
    cases = [
        (None, {"services"}),
        ((), {"prune timer", "metadata block"}),
        ((Unit("mainrun-prune.timer", "inactive"), UNITS[1]), {"prune timer"}),
    ]
    for units, warned in cases:
        with subtests.test(units=units, warned=warned):
            checks = doctor.checks(replace(READY, units=units), host)
            services = {"services", "prune timer", "metadata block"}
            assert {c.name for c in checks if c.state == "warning"} & services == warned
