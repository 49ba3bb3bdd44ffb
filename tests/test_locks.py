"""GPU and job locks: between processes, released by death, never left behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun import locks
from mainrun.errors import UserError
from tests.adversary import swapping

HOLDER = """
import sys
from pathlib import Path
from mainrun import locks
with locks.held(Path(sys.argv[1]), sys.argv[2:], who="job 7 by ada"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Starts processes that hold locks until their stdin closes."""
    started: list[subprocess.Popen] = []

    def hold(*names: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path), *names],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.communicate()


def test_second_taker_is_refused_and_told_by_whom(tmp_path: Path, holder):
    holder("gpu-0")
    with (
        pytest.raises(UserError, match=r"gpu-0 is in use by job 7 by ada: .*--wait"),
        locks.held(tmp_path, ["gpu-0"], who="me"),
    ):
        pass


def test_other_gpus_are_free(tmp_path: Path, holder):
    holder("gpu-0")
    with locks.held(tmp_path, [locks.gpu(1)], who="me"):
        assert locks.is_held(tmp_path, "gpu-0")
        assert locks.is_held(tmp_path, "gpu-1")


def test_nothing_is_kept_when_one_of_several_is_taken(tmp_path: Path, holder):
    holder("gpu-1")
    with pytest.raises(UserError), locks.held(tmp_path, ["gpu-0", "gpu-1", "gpu-2"], who="me"):
        pass
    assert not locks.is_held(tmp_path, "gpu-0")
    assert not locks.is_held(tmp_path, "gpu-2")


def test_killed_holder_lets_go(tmp_path: Path, holder):
    process = holder("gpu-0", "job-a")
    assert locks.is_held(tmp_path, "job-a")
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not locks.is_held(tmp_path, "job-a")
    with locks.held(tmp_path, ["gpu-0"], who="me"):
        assert (tmp_path / "gpu-0").read_text() == "me"


def test_waiting_ends_when_the_holder_does(tmp_path: Path, holder):
    process = holder("gpu-0")
    holders = []

    def let_go(holder: str) -> None:
        holders.append(holder)
        process.communicate()

    with locks.held(tmp_path, ["gpu-0"], who="me", wait_seconds=60.0, waiting=let_go):
        assert holders == ["gpu-0 is in use by job 7 by ada"]


def test_waiting_can_be_given_up(tmp_path: Path, holder):
    holder("gpu-0")

    def give_up(_: str) -> None:
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        locks.held(tmp_path, ["gpu-0"], who="me", wait_seconds=60.0, waiting=give_up),
    ):
        pass


def test_no_file_is_left_behind(tmp_path: Path):
    with locks.held(tmp_path, ["gpu-0", "job-a"], who="me"):
        assert len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_removed_file_is_not_a_lock(tmp_path: Path, holder):
    """Who opened the file before its holder removed it must not believe to hold the new one."""
    first = holder("gpu-0")

    def another_takes_it() -> None:
        first.communicate()
        holder("gpu-0")

    with (
        swapping("fcntl.flock", another_takes_it),
        pytest.raises(UserError, match="gpu-0 is in use by job 7"),
        locks.held(tmp_path, ["gpu-0"], who="me"),
    ):
        pass
    assert locks.is_held(tmp_path, "gpu-0")


def test_folder_that_cannot_be_made_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="folder of locks cannot be made"),
        locks.held(tmp_path / "file" / "locks", ["gpu-0"], who="me"),
    ):
        pass


def test_the_file_of_a_dead_holder_can_be_forgotten_and_that_of_a_living_one_not(
    tmp_path: Path, holder
):
    dead, _ = holder("job-a"), holder("job-b")
    dead.kill()
    dead.wait()
    for name in ("job-a", "job-b", "job-c"):
        locks.forget(tmp_path, name)
    assert [path.name for path in tmp_path.iterdir()] == ["job-b"]
