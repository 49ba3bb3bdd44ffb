"""The settings of a machine: stated once, checked, and never a job's to change."""

import dataclasses
from pathlib import Path

import pytest

from mainrun import host, yaml12
from mainrun.errors import UserError
from mainrun.host import Host
from tests.conftest import REPOSITORY


def test_host_yaml_states_every_setting_with_its_default():
    stated, _ = yaml12.read(REPOSITORY / "config" / "host.yaml")
    defaults = dataclasses.asdict(Host())
    assert stated == {**defaults, "environment": list(defaults["environment"])}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "host.yaml"
    monkeypatch.setenv("MAINRUN_HOST_CONFIG", str(path))
    return path


def test_a_machine_states_its_differences(settings: Path):
    settings.write_text("memory: 60g\ngpus: 0,1\n")
    assert host.load() == Host(memory="60g", gpus="0,1")


def test_what_does_not_fit_is_told_with_its_place(settings: Path, subtests: pytest.Subtests):
    cases = [
        ("memry: 60g", r"unknown setting `memry`; did you mean `memory`\? .*host\.yaml:1"),
        ("memory: 60q", "'60q' is no size"),
        ("gpus: every", "'every' names no GPUs"),
        ("grace: 400", "grace=400: must be at most 150"),
        ("pids: many", "pids='many': a whole number is expected"),
    ]
    for text, said in cases:
        with subtests.test(text=text):
            settings.write_text(text + "\n")
            with pytest.raises(UserError, match=said):
                host.load()


def test_a_named_file_that_is_not_there_is_no_default(settings: Path):
    with pytest.raises(UserError, match="cannot read"):
        host.load()


def test_sizes_are_powers_of_two(subtests: pytest.Subtests):
    for size, expected in [("1", 1), ("2k", 2048), ("1.5G", 3 * 2**29), ("3tb", 3 * 2**40)]:
        with subtests.test(size=size):
            assert host.num_bytes(size) == expected


def test_a_job_leaves_memory_to_what_watches_over_it():
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert Host().memory_bytes < total
    assert Host(memory="1g").memory_bytes == 2**30


def test_runs_of_a_workflow_lie_outside_of_its_checkout(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert Host().runs_dir == Path("runs")
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    assert Host().runs_dir.is_absolute()
    assert not Host().runs_dir.is_relative_to(Path.cwd())
