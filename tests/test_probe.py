"""What cannot be written is found before the work, and a probe leaves nothing."""

import errno
from pathlib import Path

import pytest

from mainrun import probe
from tests.conftest import Disk


def refused(path: Path) -> int | None:
    with pytest.raises(OSError) as caught:
        probe.check(path)
    return caught.value.errno


def test_a_place_that_can_be_written_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / "new", Path("new"), Path("a/b/c"), tmp_path / "there", Path("..")):
        probe.check(path)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there", "mine")]


def test_names_and_paths_that_are_too_long_are_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / ("x" * 300)) == errno.ENAMETOOLONG
    assert refused(tmp_path / ("é" * 150)) == errno.ENAMETOOLONG
    assert refused(tmp_path / ("x" * 300) / "run") == errno.ENAMETOOLONG
    assert refused(tmp_path.joinpath(*["x" * 100] * 60)) == errno.ENAMETOOLONG


def test_a_file_among_the_folders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refused(tmp_path / "file" / "run") == errno.ENOTDIR
    assert refused(tmp_path / "file" / "a" / "run") == errno.ENOTDIR


def test_a_disk_that_only_reads_is_refused(disk: Disk) -> None:
    (disk.path / "there").mkdir()
    disk.remount("ro")
    for path in (disk.path / "new", disk.path / "there", disk.path / "there" / "a" / "b"):
        assert refused(path) == errno.EROFS


@pytest.mark.parametrize("disk", ["nr_inodes=1"], indirect=True)
def test_a_disk_without_inodes_is_refused(disk: Disk) -> None:
    assert refused(disk.path / "run") == errno.ENOSPC


@pytest.mark.parametrize("disk", ["size=4k"], indirect=True)
def test_a_full_disk_is_refused_and_stays_empty_of_probes(disk: Disk) -> None:
    (disk.path / "ballast").write_bytes(bytes(4096))
    assert refused(disk.path / "run") == errno.ENOSPC
    assert [path.name for path in disk.path.iterdir()] == ["ballast"]
