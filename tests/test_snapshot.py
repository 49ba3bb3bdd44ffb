"""A copy by handles holds what was in the folder, and nothing that a link in it points at.

Whoever writes the folder is an adversary: here it plants links, devices, fifos and names, and
changes one thing for another while the copy is made.
"""

import os
import shutil
import socket
from pathlib import Path

import pytest

from mainrun import snapshot
from mainrun.errors import UserError
from mainrun.snapshot import Bounds, Copy
from tests.adversary import KEY, exchange, planted_key, swapped_without_end, swapping


@pytest.fixture
def key(tmp_path: Path) -> Path:
    return planted_key(tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    path = tmp_path / "runs" / "a"
    (path / "checkpoints" / "40").mkdir(parents=True)
    (path / "checkpoints" / "40" / "array").write_bytes(b"x" * 3_000_000)
    (path / "events.jsonl").write_text("{}\n")
    return path


def copied(run: Path, **bounds: float) -> Copy:
    target = run.parent.parent / "out" / run.name
    target.parent.mkdir(exist_ok=True)
    return snapshot.copy(run.parent, run.name, target, Bounds(**bounds))


def in_copy(run: Path) -> dict[str, bytes]:
    """The files by their path; opened as they are, so a link among them would be seen through."""
    target = run.parent.parent / "out" / run.name
    files = [path for path in target.rglob("*") if not path.is_dir()]
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in files}


WHOLE = {"checkpoints/40/array": b"x" * 3_000_000, "events.jsonl": b"{}\n"}


def test_a_copy_has_every_byte_and_shares_none_of_them(run: Path):
    (run / "empty").mkdir()
    assert copied(run) == Copy()
    assert in_copy(run) == WHOLE
    out = run.parent.parent / "out"
    assert (out / "a" / "empty").is_dir()
    inodes = {path.stat().st_ino for path in run.rglob("*")}
    assert inodes.isdisjoint(path.stat().st_ino for path in out.rglob("*"))
    assert [path.name for path in out.iterdir()] == ["a"]


# -------------------------------------------------------------------------------------------
# Things that are no files


def test_no_link_is_followed_to_a_file_a_folder_or_through_a_chain(run: Path, key: Path):
    (run / "summary.md").symlink_to(key)
    (run / "logs").symlink_to(key.parent)
    (run / "chain").symlink_to("summary.md")
    (run / "checkpoints" / "relative").symlink_to("../../../home/.ssh/id_ed25519")
    (run / "environ").symlink_to("/proc/self/environ")
    (run / "root").symlink_to("/proc/self/root")
    (run / "itself").symlink_to("itself")
    result = copied(run)
    assert in_copy(run) == WHOLE
    assert (result.num_left_out, len(result.left_out)) == (7, 5)
    assert result.left_out[0] == "chain (a link)"


def test_a_run_folder_that_is_a_link_is_refused(run: Path, key: Path, tmp_path: Path):
    (run.parent / "link").symlink_to(key.parent)
    (run.parent / "file").write_text("")
    for name in ("link", "file", "link/x", "a/../../home"):
        with pytest.raises(UserError) as error:
            snapshot.copy(run.parent, name, tmp_path / "b")
        assert str(error.value).isprintable()
    with pytest.raises(FileNotFoundError):
        snapshot.copy(run.parent, "absent", tmp_path / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home", "runs"]


def test_the_folder_of_all_runs_may_be_a_link_that_the_keeper_has_made(run: Path, tmp_path: Path):
    (tmp_path / "disk").symlink_to(run.parent)
    snapshot.copy(tmp_path / "disk", "a", tmp_path / "b")
    assert (tmp_path / "b" / "events.jsonl").read_text() == "{}\n"


def test_fifos_sockets_and_devices_are_never_opened(run: Path, monkeypatch: pytest.MonkeyPatch):
    os.mkfifo(run / "fifo")
    monkeypatch.chdir(run)  # the path of a socket is short
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
    number = 2
    if os.geteuid() == 0:
        os.mknod(run / "zero", 0o20666, os.makedev(1, 5))
        os.mknod(run / "disk", 0o60666, os.makedev(7, 0))
        number = 4
    with swapping("fifo", lambda: pytest.fail("it was opened")):
        result = copied(run)
    assert in_copy(run) == WHOLE
    assert result.num_left_out == number
    assert "fifo (neither a file nor a folder)" in result.left_out


def test_what_cannot_be_read_is_left_out(run: Path):
    for name in ("file", "folder"):
        (run / name).mkdir() if name == "folder" else (run / name).write_text("x")
        (run / name).chmod(0)
    result = copied(run)
    if os.geteuid() != 0:  # root reads anything
        assert result.left_out == ["file (Permission denied)", "folder (Permission denied)"]
    assert in_copy(run).items() >= WHOLE.items()


def test_a_hard_link_is_the_file_that_it_is(run: Path):
    os.link(run / "events.jsonl", run / "again")
    assert copied(run) == Copy()
    assert in_copy(run) == WHOLE | {"again": b"{}\n"}


# -------------------------------------------------------------------------------------------
# Names and sizes


@pytest.mark.parametrize(
    "name",
    [b"line\nbreak", b"return\rhere", b"\x1b[31mred", b"not\xffutf8", b"null\xc2\x80", b"a\\..\\b",
     b"..\xe2\x80\xae", b"a:b", b"what?", b"a|b", b"<b>", b'"q"', b"*"],
)  # fmt: skip
def test_names_that_no_upload_takes_are_left_out(run: Path, name: bytes):
    (run / os.fsdecode(name)).write_text("x")
    os.mkdir(os.path.join(os.fsencode(run), b"d" + name))
    assert copied(run).num_left_out == 2
    assert in_copy(run) == WHOLE


@pytest.mark.parametrize("name", ["...", "..a", "-rf", "~", "$(id)", "é", " ", "%2e%2e%2f"])
def test_names_that_only_look_odd_are_names(run: Path, name: str):
    (run / name).write_text("x")
    assert copied(run) == Copy()
    assert in_copy(run) == WHOLE | {name: b"x"}


def test_a_sparse_file_counts_as_long_as_it_says_it_is(run: Path):
    with (run / "sparse").open("wb") as file:
        file.truncate(10 * 2**30)
    result = copied(run)
    assert result.left_out == ["sparse (10.0 GiB, and there is no room for it)"]
    assert in_copy(run) == WHOLE


def test_all_files_together_are_bounded_and_those_nearer_the_top_come_first(run: Path):
    (run / "z.json").write_bytes(b"z" * 2000)
    result = copied(run, all_bytes=2_999_999)
    assert result.left_out == ["checkpoints/40/array (0.0 GiB, and there is no room for it)"]
    assert set(in_copy(run)) == {"events.jsonl", "z.json"}


def test_a_copy_takes_no_more_than_half_of_the_room_there_is(
    run: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = type("usage", (), {"free": 5_000_000})
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: usage)
    assert copied(run).num_left_out == 1
    assert set(in_copy(run)) == {"events.jsonl"}


def test_files_and_folders_are_counted(run: Path):
    (run / "many").mkdir()
    for number in range(50):
        (run / "many" / f"{number}").write_text("")
    result = copied(run, entries=20)
    assert result.left_out == ["many/… (too many files)", "checkpoints/40/… (too many files)"]
    assert len(list((run.parent.parent / "out" / "a").rglob("*"))) == 20


def test_deep_folders_end_somewhere(run: Path):
    place = run
    for _ in range(60):
        place /= "d"
        place.mkdir()
    (place / "file").write_text("x")
    result = copied(run, depth=10)
    assert result.left_out == [f"{'/'.join('d' * 12)} (too deep)"]
    assert in_copy(run) == WHOLE


def test_long_paths_end_somewhere(run: Path):
    place = run
    for _ in range(8):
        place /= "w" * 200
        place.mkdir()
    assert copied(run).num_left_out == 1
    assert in_copy(run) == WHOLE
    longest = max(len(str(path)) for path in (run.parent.parent / "out").rglob("*"))
    assert longest < 1000 + len(str(run))


def test_when_the_time_is_over_folders_are_there_and_files_are_not(run: Path):
    result = copied(run, seconds=-1.0)
    assert result.num_left_out == 2
    assert in_copy(run) == {}
    assert (run.parent.parent / "out" / "a" / "checkpoints" / "40").is_dir()


# -------------------------------------------------------------------------------------------
# Changes while it is copied


@pytest.mark.parametrize("name", ["events.jsonl", "checkpoints", "40", "array"])
def test_a_link_put_in_the_place_of_what_was_looked_at_is_not_followed(
    run: Path, key: Path, name: str
):
    (path,) = run.rglob(name)
    link = run.parent / "link"
    link.symlink_to(key if path.is_file() else key.parent)
    with swapping(name, lambda: exchange(path, link)):
        result = copied(run)
    assert path.is_symlink(), "the swap was made"
    assert result.num_left_out == 1
    assert KEY.encode() not in b"".join(in_copy(run).values())


def test_a_fifo_put_in_the_place_of_a_file_is_not_waited_for(run: Path):
    os.mkfifo(run.parent / "fifo")
    with swapping("events.jsonl", lambda: exchange(run / "events.jsonl", run.parent / "fifo")):
        result = copied(run)
    assert result.left_out == ["events.jsonl (neither a file nor a folder)"]


def test_a_run_folder_that_becomes_a_link_is_refused(run: Path, key: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(key.parent)
    with (
        swapping("a", lambda: exchange(run, tmp_path / "link")),
        pytest.raises(UserError, match="a is a link"),
    ):
        copied(run)


def test_a_file_that_grows_is_copied_as_long_as_it_was(run: Path):
    def grow() -> None:
        with (run / "checkpoints" / "40" / "array").open("ab") as file:
            file.write(b"y" * 1000)

    with swapping("array", grow, time=2):  # the second one is the copy's
        copied(run)
    assert in_copy(run) == WHOLE


def test_a_copy_where_others_write_does_not_write_through_their_links(run: Path, tmp_path: Path):
    """An artifact's run is copied among the machine's runs, which belong to containers."""
    shared, victim = tmp_path / "shared", tmp_path / "victim"
    shared.mkdir()
    victim.mkdir()

    def steal() -> None:
        (partial,) = shared.iterdir()
        exchange(partial, link)

    link = tmp_path / "link"
    link.symlink_to(victim)
    names = iter(["f" * 16, "0" * 16])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(snapshot.secrets, "token_hex", lambda _: next(names))
        with swapping(f".b.{'f' * 16}", steal), pytest.raises(NotADirectoryError):
            snapshot.copy(run.parent, "a", shared / "b")
    assert list(victim.iterdir()) == []
    assert not (shared / "b").exists()


def test_somebody_who_swaps_as_fast_as_can_be_wins_nothing(run: Path, key: Path):
    """A real race, of a bounded number of copies."""
    (run / "spare").mkdir()
    target = run.parent.parent / "b"
    late = 0
    with swapped_without_end(run / "events.jsonl", run / "spare", key):
        for _ in range(300):
            late += snapshot.copy(run.parent, "a", target).num_left_out > 0
            for path in target.rglob("*"):
                assert not path.is_symlink()
                assert path.is_dir() or KEY.encode() not in path.read_bytes()
            shutil.rmtree(target)
    assert late > 0, "links were there"
