"""What NVML says, through a stand-in library with its ABI: healthy cards, sick ones, none."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mainrun import gpu
from tests import fake_nvml

PROGRAM = """
import dataclasses, json
from mainrun import gpu
found = gpu.read()
print(json.dumps({**dataclasses.asdict(found), "indices": gpu.gpu_indices()}))
"""

Read = Callable[..., dict]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_nvml.build(tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session")
def old_driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_nvml.build(tmp_path_factory.mktemp("old"), "-DOLD_DRIVER")


def read(folder: Path, plays: str, **more: object) -> dict:
    """`gpu.read()` in a process of its own: the loader looks for libraries once, at the start."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=fake_nvml.environment(folder, plays, **more),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_healthy_card_tells_everything(driver: Path):
    found = read(driver, "healthy", FAKE_NVML_PROCESSES="4123:1073741824,4124:5")
    assert found["driver_version"] == "580.95.05"
    assert found["cuda_version"] == "13.0"
    assert found["reason"] == ""
    assert found["indices"] == [0, 1]
    assert found["cards"][0] == {
        "index": 0,
        "uuid": "GPU-00000000-0000-0000-0000-000000000000",
        "name": "NVIDIA H200",
        "used_bytes": 61 * 2**30,
        "total_bytes": 141 * 2**30,
        "utilisation_percent": 97,
        "temperature_celsius": 61,
        "power_watts": 512.5,
        "power_limit_watts": 700.0,
        "ecc_uncorrected": 0,
        "throttling": ["power limit"],
        "processes": [{"pid": 4123, "used_bytes": 2**30}, {"pid": 4124, "used_bytes": 5}],
        "fault": "",
    }
    assert found["cards"][1]["processes"] == []


def test_a_sick_card_says_what_ails_it_and_a_lost_one_hides_no_other(driver: Path):
    found = read(driver, "sick")
    hot, lost = found["cards"]
    assert hot["ecc_uncorrected"] == 3
    assert hot["temperature_celsius"] == 92
    assert hot["throttling"] == ["hardware slowdown", "too hot"]
    assert set(hot["throttling"]) <= gpu.FAULTY_THROTTLING
    assert lost["fault"] == "a GPU has fallen off the bus: reboot"
    assert found["indices"] == [0]


def test_what_a_card_cannot_tell_is_none(driver: Path):
    (card,) = read(driver, "bare")["cards"]
    told = {name for name, value in card.items() if value not in (None, "")}
    assert told == {"index", "uuid", "name", "temperature_celsius"}


def test_a_driver_older_than_a_question_is_asked_the_older_one(old_driver: Path):
    card = read(old_driver, "healthy", FAKE_NVML_PROCESSES="7:9")["cards"][0]
    assert card["processes"] == [{"pid": 7, "used_bytes": 9}]
    assert card["used_bytes"] == 62 * 2**30  # with what the driver keeps: it cannot say it apart


def test_a_driver_that_does_not_answer_is_a_reason_and_no_traceback(
    driver: Path, subtests: pytest.Subtests
):
    cases = [
        ("not_loaded", "installed but not loaded"),
        ("no_permission", "may not use the NVIDIA driver"),
        ("mismatch", "reboot"),
        ("unknown", "the NVIDIA driver does not answer: Unknown Error"),
    ]
    for plays, says in cases:
        with subtests.test(plays=plays):
            found = read(driver, plays)
            assert says in found["reason"]
            assert (found["cards"], found["indices"]) == ([], [])


def test_the_library_is_closed_as_often_as_it_is_opened(
    driver: Path, tmp_path: Path, subtests: pytest.Subtests
):
    for plays in ["healthy", "sick", "bare"]:
        with subtests.test(plays=plays):
            log = tmp_path / plays
            read(driver, plays, FAKE_NVML_LOG=log)
            assert log.read_text().split() == ["init", "shutdown"] * 2


def test_without_a_driver_there_is_a_calm_reason(monkeypatch: pytest.MonkeyPatch):
    found = gpu.read()
    if found.cards:
        pytest.skip("this machine has a GPU")
    assert found.reason
    assert gpu.count() == 0
    assert gpu.gpu_indices() == ()
