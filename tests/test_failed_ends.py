"""How a failed run ends: exit code 1 and the reason as the last line, whatever else had a say."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mainrun.errors import RunFailed, reason_of
from mainrun.record import read_events
from tests.conftest import COMMAND, Disk

BLIND = [
    sys.executable,
    "-c",
    "import sys; from mainrun.training.checkpoint import Checkpoints; "
    "Checkpoints._check_space = lambda *_: None; from mainrun.cli import main; sys.exit(main())",
]
"""The command, which does not look for room before it saves: as if that were taken in between."""


@pytest.fixture
def long(tiny: list[str]) -> list[str]:
    return ["train", *tiny, "training.max_steps=100000", "--run-dir"]


def output(process: subprocess.Popen[str]) -> list[str]:
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 1, told
    return told.splitlines()


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def events(run_dir: Path) -> list[str]:
    path = run_dir / "events.jsonl"
    return [event["event"] for event in read_events(path)] if path.is_file() else []


def wait_until(process: subprocess.Popen[str], happened: Callable[[], bool]) -> None:
    """Looks between two lines of what the process says."""
    assert process.stdout is not None
    while not happened():
        assert process.stdout.readline(), process.wait()


@pytest.mark.parametrize("disk", ["nr_inodes=90"], indirect=True)
def test_a_disk_without_inodes_is_told_before_anything_is_written_to_it(
    disk: Disk, long: list[str]
) -> None:
    told = output(start(*COMMAND, *long, disk.path / "run"))
    assert told[-1].startswith("mainrun: failed: no space left for the checkpoint of step 6")
    assert "room for 82 files, and 100 are needed" in told[-1]
    assert "Traceback" not in "\n".join(told)
    assert list((disk.path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["nr_inodes=12", "nr_inodes=50"], indirect=True)
def test_nothing_is_said_or_waited_for_behind_the_reason_though_the_writers_go_on(
    disk: Disk, long: list[str]
) -> None:
    """With 12 inodes Orbax waits for itself, with 50 it tells of each array."""
    told = output(start(*BLIND, *long, disk.path / "run"))
    assert told[-1].startswith("mainrun: failed: the checkpoint of step ")
    assert told[-1].endswith("could not be written: No space left on device")


def test_a_run_folder_that_is_moved_away_is_the_end_of_its_run(
    tmp_path: Path, long: list[str]
) -> None:
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    process = start(*COMMAND, *long, run_dir)
    wait_until(process, lambda: "evaluation" in events(run_dir))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    run_dir.rename(moved)
    process.send_signal(signal.SIGCONT)
    told = output(process)
    reason = f"{run_dir}/events.jsonl is gone: it was moved or removed while the run went on"
    assert told[-1] == f"mainrun: failed: {reason}"
    assert "\n".join(told).count(reason) == 1
    failed = [e for e in read_events(moved / "events.jsonl") if e["event"] == "failed"]
    assert [event["reason"] for event in failed] == [reason]
    assert not (run_dir / "events.jsonl").exists()


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_is_the_last_line(
    tmp_path: Path, long: list[str]
) -> None:
    run_dir = tmp_path / "run"
    process = start(*COMMAND, *long, run_dir)
    wait_until(process, lambda: "checkpoint" in events(run_dir))
    process.send_signal(signal.SIGSTOP)
    os.waitpid(process.pid, os.WUNTRACED)
    (run_dir / "checkpoints").rename(run_dir / "others")
    (run_dir / "checkpoints").write_text("a file")
    process.send_signal(signal.SIGCONT)
    told = output(process)
    assert told[-1].startswith("mainrun: failed: the checkpoint of step ")
    assert events(run_dir)[-1] == "failed"


def test_what_a_disk_or_a_right_is_to_blame_for_is_one_line() -> None:
    assert reason_of(OSError(28, "No space left on device", "f")) == "f: No space left on device"
    assert reason_of(OSError(5, "Input/output error")) == "Input/output error"
    assert reason_of(FileNotFoundError(2, "No such file")) is None
    assert reason_of(RunFailed("why")) == "why"


def test_a_result_that_a_full_disk_does_not_take_is_a_failure() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "config"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "mainrun: failed: No space left on device\n"
