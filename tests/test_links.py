"""Nothing that a container plants in a run folder makes the host read or publish a file of its own.

The steps of a job, with a key of the machine's beside its runs: on the page, in `out/`, in the log
and in what is printed it must never be found.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import docker
import pytest

from mainrun import artifact, containers, jobs
from mainrun.errors import UserError
from mainrun.host import Host
from mainrun.request import Request, container_options
from tests.adversary import SWAPS, exchange, planted_key, swapped_without_end, swapping
from tests.test_summary import Log

NAME = "quickstart-77-1"


@pytest.fixture
def key(workspace: Path) -> Path:
    return planted_key(workspace)


@pytest.fixture
def run(workspace: Path) -> Path:
    """The run folder of a job that was killed at step 3; its checkpoint is that of step 2."""
    (workspace / "disk").mkdir()
    log = Log(workspace / "disk" / NAME)
    log.start()
    log.train(1, 2, 3)
    (log.run_dir / "checkpoints" / "2").mkdir(parents=True)
    (log.run_dir / "checkpoints" / "2" / "array").write_text("numbers")
    return log.run_dir


def page_of(workspace: Path, task: str = "train") -> str:
    """The page that the job's last step writes; the page of a step before it is gone."""
    (workspace / "page.md").unlink(missing_ok=True)
    with jobs._step("run") as record:
        record |= {"run": f"runs/{NAME}", "task": task, "label": "77-1"}
    jobs.summary()
    return (workspace / "page.md").read_text()


def assert_key_is_nowhere(workspace: Path, printed: str) -> None:
    assert "planted-canary" not in printed
    for path in [*workspace.glob("page.md"), *(workspace / "out").rglob("*")]:
        assert not path.is_symlink(), path
        assert path.is_dir() or b"planted-canary" not in path.read_bytes(), path


def replaced(path: Path, target: Path) -> None:
    """A link in the place of a file or folder."""
    if path.exists():
        path.rename(path.parent.parent / f"was {path.name}")
    path.symlink_to(target)


PLANTS: dict[str, Callable[[Path, Path], object]] = {
    "record": lambda run, key: replaced(run / "events.jsonl", key),
    "sweep's summary": lambda run, key: replaced(run / "summary.md", key),
    "sweep's result": lambda run, key: replaced(run / "summary.json", key),
    "config": lambda run, key: replaced(run / "config.yaml", key),
    "folder": lambda run, key: replaced(run / "plots", key.parent),
    "checkpoints": lambda run, key: replaced(run / "checkpoints", key.parent),
    "checkpoint": lambda run, key: replaced(run / "checkpoints" / "2", key.parent),
    "run folder": lambda run, key: replaced(run, key.parent),
    "chain": lambda run, key: (
        replaced(run / "summary.md", Path("next")),
        replaced(run / "next", Path("../../home/.ssh/id_ed25519")),
    ),
    "environ": lambda run, key: replaced(run / "summary.md", Path("/proc/self/environ")),
    "everything": lambda run, key: replaced(run / "root", Path("/proc/self/root")),
    "fifo": lambda run, key: ((run / "events.jsonl").unlink(), os.mkfifo(run / "events.jsonl")),
    "fifo of a sweep": lambda run, key: os.mkfifo(run / "summary.json"),
}  # fmt: skip


@pytest.mark.parametrize("task", ["train", "sweep"])
@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_what_a_container_plants_is_neither_shown_nor_uploaded(
    workspace: Path, run: Path, key: Path, plant: Callable[[Path, Path], object], task: str,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    plant(run, key)
    page = page_of(workspace, task)
    assert "PATH=" not in page
    assert_key_is_nowhere(workspace, "".join(capfd.readouterr()))
    assert "**Not in the artifact:**" in page


def test_a_run_folder_that_is_a_link_is_refused_in_one_line(workspace: Path, run: Path, key: Path):
    replaced(run, key.parent)
    page = page_of(workspace)
    (line,) = [line for line in page.splitlines() if "Not in the artifact" in line]
    assert line.endswith(r"quickstart-77-1 is a link, or no folder\: nothing of it is read.")
    assert list((workspace / "out" / "runs").iterdir()) == []


def test_the_page_is_made_of_the_copy_whatever_becomes_of_the_run_folder(
    workspace: Path, run: Path, key: Path
):
    """The next job's container may write before this one's page is done."""
    (workspace / "link").symlink_to(key.parent)
    with swapping("array", lambda: exchange(run / "events.jsonl", workspace / "link")):
        page = page_of(workspace)
    assert (run / "events.jsonl").is_symlink()
    assert "It came to step 3 of 10" in page
    assert "step 2, so 1 step will be done again" in page
    assert "Not in the artifact" not in page


@pytest.mark.parametrize("parent", ["home/.ssh/id_ed25519", "fifo", "/dev/zero"])
def test_a_runs_config_names_no_file_of_the_hosts_for_it_to_read(
    workspace: Path, run: Path, key: Path, parent: str
):
    os.mkfifo(workspace / "fifo")
    (run / "config.yaml").write_text(f"extends: {workspace / parent}\n")
    with swapping(str(workspace / parent), lambda: pytest.fail("it was opened")):
        assert "It came to step 3 of 10" in page_of(workspace)


def test_what_is_left_out_is_named_and_its_name_does_nothing(workspace: Path, run: Path):
    for name in ("[log in](https:evil.example)", "<details open>", "@ada", "line\n# break", "`a`"):
        (run / name).symlink_to("/etc/hostname")
    page = page_of(workspace)
    assert "5 files are left out" in page
    assert "# break" not in page.splitlines()
    for markup in ("[log in](", "<details open><", "@ada", "`a`"):
        assert markup not in page


def test_the_copy_is_no_part_of_what_containers_can_write(workspace: Path, run: Path):
    page_of(workspace)
    theirs = {path.stat().st_ino for path in (workspace / "disk").rglob("*")}
    ours = {path.stat().st_ino for path in (workspace / "out" / "runs" / NAME).rglob("*")}
    assert len(ours) == 4
    assert theirs.isdisjoint(ours)


def test_what_an_earlier_step_has_left_in_the_copys_place_is_not_shown(workspace: Path, run: Path):
    old = workspace / "out" / "runs" / NAME
    old.mkdir(parents=True)
    (old / "old").write_text("")
    page_of(workspace)
    assert not (old / "old").exists()
    assert (old / "events.jsonl").is_file()


def test_a_swap_at_any_time_shows_nothing(
    workspace: Path, run: Path, key: Path, capfd: pytest.CaptureFixture[str]
):
    (run / "plots").mkdir()
    with swapped_without_end(run / "events.jsonl", run / "plots", key):
        for _ in range(100):
            page_of(workspace)
            assert_key_is_nowhere(workspace, "".join(capfd.readouterr()))


def test_an_endless_line_of_the_log_is_not_read_to_its_end(workspace: Path, run: Path):
    (workspace / "out").mkdir()
    with (workspace / "out" / "job.log").open("wb") as log:
        log.truncate(10 * 2**30)
        log.seek(0, os.SEEK_END)
        log.write(b"\nthe end\n")
    assert "the end" in page_of(workspace)


def test_a_record_of_a_job_that_names_another_folder_opens_none(workspace: Path, run: Path):
    for name in ("..", "../../home", "/", "", "."):
        with jobs._step("run") as record:
            record |= {"run": name, "task": "train"}
        (workspace / "out" / "job.log").write_text("the end")
        jobs.summary()
        assert json.loads((workspace / "out" / "job.json").read_text())["ended"]
        assert (workspace / "out" / "job.log").is_file()
        assert list((workspace / "out").glob("runs/*")) == []


# -------------------------------------------------------------------------------------------
# What came in an artifact


@pytest.fixture
def fetched(workspace: Path) -> Path:
    """The run folder of another job, unpacked by the step before."""
    run = workspace / "in" / "train-5-1" / "runs" / "baseline-5-1"
    (run / "checkpoints" / "2").mkdir(parents=True)
    for file in ("config.yaml", "tokenizer.json", "checkpoints/2/array"):
        (run / file).write_text("{}")
    return run


def bring_in(workspace: Path) -> str:
    return artifact.bring_in(workspace / "in", workspace / "disk", say=print)


def test_links_and_odd_names_of_an_artifact_do_not_come_in(
    workspace: Path, fetched: Path, key: Path, capsys: pytest.CaptureFixture[str]
):
    (fetched / "events.jsonl").symlink_to(key)
    (fetched / "plots").symlink_to(key.parent)
    (fetched / "checkpoints" / "2" / "more").symlink_to("/proc/self/environ")
    (fetched / "line\n::error::break").write_text("")
    os.mkfifo(fetched / "fifo")
    assert bring_in(workspace) == "baseline-5-1"
    run = workspace / "disk" / "baseline-5-1"
    files = {path.name for path in run.rglob("*") if not path.is_dir()}
    assert files == {"config.yaml", "tokenizer.json", "array"}
    printed = capsys.readouterr().out
    assert "5 files are left out" in printed
    assert len(printed.splitlines()) == 1
    assert_key_is_nowhere(workspace, printed)


@pytest.mark.parametrize(
    "place", ["", "train-5-1", "train-5-1/runs", "train-5-1/runs/baseline-5-1"]
)
def test_an_artifact_that_is_a_link_anywhere_on_the_way_brings_nothing(
    workspace: Path, fetched: Path, place: str
):
    path = workspace / "in" / place
    path.rename(workspace / "real")
    path.symlink_to(workspace / "real")
    with pytest.raises(UserError, match="no artifact with a run folder"):
        bring_in(workspace)


@pytest.mark.parametrize("file", ["config.yaml", "tokenizer.json"])
def test_a_run_whose_own_files_are_links_is_none(workspace: Path, fetched: Path, file: str):
    replaced(fetched / file, Path("/etc/hostname"))
    with pytest.raises(UserError, match="no artifact with a run folder"):
        bring_in(workspace)


def test_a_run_hidden_inside_another_is_not_the_one_that_comes_in(workspace: Path, fetched: Path):
    shutil.copytree(fetched, fetched / "train-5-9" / "runs" / "evil-5-9")
    assert bring_in(workspace) == "baseline-5-1"


@pytest.mark.parametrize("target", ["home/.ssh", "absent"])
def test_a_link_in_the_place_where_a_run_would_come_is_not_written_through(
    workspace: Path, fetched: Path, key: Path, target: str
):
    (workspace / "disk").mkdir()
    (workspace / "disk" / "baseline-5-1").symlink_to(workspace / target)
    with pytest.raises(UserError, match="resume=baseline-5-1"):
        bring_in(workspace)
    assert list(key.parent.iterdir()) == [key]
    assert not (workspace / "absent").exists()


def test_a_container_that_swaps_the_half_copied_run_makes_us_write_nowhere_else(
    workspace: Path, fetched: Path, key: Path
):
    """Runs belong to containers, also while one comes in."""
    disk = workspace / "disk"

    def swap() -> None:
        for partial in disk.iterdir():
            replaced(partial, key.parent)

    with swapping("tokenizer.json", swap):
        bring_in(workspace)
    assert (disk / "baseline-5-1").is_symlink(), "theirs; it means something else in a container"
    assert list(key.parent.iterdir()) == [key]


# -------------------------------------------------------------------------------------------
# A real container

PLANTING = """
set -e
cd /app/runs/quickstart-77-1
ln -s "$KEY" summary.md
ln -s "${KEY%/*}" logs
ln -s summary.md chain
ln -s /proc/self/environ environ
ln -s "${KEY%/*}" ../link
ln events.jsonl hard
mkfifo fifo
truncate -s 10G sparse
touch "line
break" 'a:b' '...'
mkdir -p d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d/d
mknod zero c 1 5 && exit 3
ln /etc/hostname theirs && exit 4
exit 0
"""


@pytest.fixture
def engine(base_image: str) -> docker.DockerClient:
    return containers.connect()


@pytest.mark.docker
def test_a_real_container_may_plant_and_swap_as_it_likes_and_the_key_is_nowhere(
    engine: docker.DockerClient, base_image: str, workspace: Path, run: Path, key: Path,
    capfd: pytest.CaptureFixture[str],
):  # fmt: skip
    """With the rights and the folders that a job's container has."""
    (workspace / "cache").mkdir()
    (run / "plots").mkdir()
    machine = Host(runs=str(workspace / "disk"), cache=str(workspace / "cache"), gpus="none")
    request = Request(task="train", words=(), label="77-1", image=base_image)
    options = container_options(request, machine)
    options["environment"]["KEY"] = str(key)
    options["labels"] = {}  # it is no job, and nobody takes it for a stray
    engine.containers.run(**options | {"command": ["sh", "-c", PLANTING]}, remove=True)
    page = page_of(workspace)
    assert_key_is_nowhere(workspace, "".join(capfd.readouterr()))
    assert "9 files are left out" in page
    assert (workspace / "out" / "runs" / NAME / "hard").read_text() == (
        run / "events.jsonl"
    ).read_text()
    places = ["quickstart-77-1/events.jsonl", "quickstart-77-1/plots", key, "spare", "away"]
    words = [str(Path("/app/runs") / place) for place in places]
    adversary = engine.containers.run(
        **options | {"command": ["python3", "-c", SWAPS, *words]}, detach=True
    )
    try:
        next(adversary.logs(stream=True))
        for _ in range(100):
            page_of(workspace)
            assert_key_is_nowhere(workspace, "".join(capfd.readouterr()))
    finally:
        adversary.remove(force=True)
