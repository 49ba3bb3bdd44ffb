"""What cannot be written, or named, is found before any work: one line, and nothing is touched."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mainrun import cli, config
from mainrun.record import Record
from mainrun.sweep import sweep_file, sweep_folder
from tests.conftest import REPOSITORY, Disk

LONG = "x" * 300
QUICKSTART = REPOSITORY / "config" / "sweep" / "quickstart.yaml"

Refusal = Callable[..., str]


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Refusal:
    """The one line that a mistake is answered with, before a word of any work; `reading`: but
    that it reads."""

    def refused(*words: object, reading: bool = False) -> str:
        assert cli.main([str(word) for word in words]) == 2
        lines = capsys.readouterr().err.splitlines()
        (line,) = [x for x in lines if not (reading and x.startswith("reading "))]
        return line

    return refused


@pytest.fixture
def reading(disk: Disk, finished_run: Path, tiny: list[str]) -> Path:
    """A disk that only reads, with a run, and a sweep that has not begun."""
    shutil.copytree(finished_run, disk.path / "run")
    (disk.path / "tiny.yaml").write_text(config.to_yaml(config.load(None, tiny)))
    (disk.path / "search.yaml").write_text(
        "method: grid\nparameters: {seed: {values: [1, 2]}}\n"
        f"command: [mainrun, train, {disk.path}/tiny.yaml, '${{args_no_hyphens}}']\n"
    )
    source = disk.path / "search.yaml"
    sweep_folder.open_folder(source, sweep_file.read(source), disk.path / "sweep")
    disk.remount("ro")
    return disk.path


def test_a_run_folder_that_cannot_be_made(
    tmp_path: Path,
    reading: Path,
    tiny: list[str],
    refusal: Refusal,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_text("")
    train = ["train", *tiny]
    for run_dir, reason in (
        (tmp_path / "file" / "run", "Not a directory"),
        (tmp_path / LONG, "File name too long"),
        (reading / "new", "Read-only file system"),
        (reading / "new" / "run", "Read-only file system"),
    ):
        expected = f"mainrun: {run_dir}: cannot be made ({reason}); see --run-dir"
        assert refusal(*train, "--run-dir", run_dir) == expected
        assert refusal(*train, "--run-dir", run_dir, "--dry-run") == expected
    monkeypatch.setenv("MAINRUN_RUNS_DIR", str(reading / "runs"))
    assert "cannot be made (Read-only file system)" in refusal(*train)
    assert "cannot be made (Read-only file system)" in refusal(
        "sweep", reading / "search.yaml", "--backend", "local"
    )


def test_a_run_or_a_sweep_that_cannot_go_on(reading: Path, refusal: Refusal) -> None:
    run = refusal("resume", reading / "run", "training.max_steps=44")
    assert run.startswith(f"mainrun: {reading}/run cannot be written (Read-only file system)")
    sweep = refusal("sweep", reading / "sweep")
    assert sweep.startswith(f"mainrun: {reading}/sweep cannot be written (Read-only file system)")


@pytest.mark.parametrize("disk", ["size=3m"], indirect=True)
def test_a_run_on_a_full_disk(disk: Disk, finished_run: Path, refusal: Refusal) -> None:
    run_dir = shutil.copytree(finished_run, disk.path / "run")
    (disk.path / "ballast").write_bytes(bytes(shutil.disk_usage(disk.path).free))
    said = refusal("resume", run_dir, "training.max_steps=44")
    assert "cannot be written (No space left on device)" in said


def test_a_run_that_is_being_written(tmp_path: Path, finished_run: Path, refusal: Refusal) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    record = Record(run_dir / "events.jsonl", resume=True)
    try:
        said = refusal("resume", run_dir, "training.max_steps=44")
    finally:
        record.close()
    assert "is being written by another process" in said


def test_a_result_that_has_no_place(
    reading: Path, finished_run: Path, tiny: list[str], refusal: Refusal
) -> None:
    for place, reason in ((reading / "new", "Read-only file"), (Path(LONG), "File name too long")):
        export = ["export", finished_run, "--format", "safetensors"]
        assert f"cannot be made ({reason}" in refusal(*export, "--output", place)
        page = place.with_suffix(".html")
        assert f"cannot be written ({reason}" in refusal("report", finished_run, "--output", page)
        assert f"cannot be written ({reason}" in refusal(
            "report", "--scaling", finished_run, "--output", page
        )
        picture = place.with_suffix(".png")
        assert f"cannot be written ({reason}" in refusal("find-lr", *tiny, "--output", picture)
        assert f"cannot be made ({reason}" in refusal("profile", *tiny, "--output", place)
    assert "cannot be written (Read-only file" in refusal("report", reading / "run")


def test_names_that_no_file_can_have(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, finished_run: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["train", f"{LONG}.yaml"],
        ["config", f"{LONG}.yaml"],
        ["resume", LONG],
        ["evaluate", LONG],
        ["generate", LONG],
        ["export", LONG, "--format", "safetensors", "--output", "new"],
        ["report", LONG],
        ["report", "--scaling", LONG],
        ["promote", LONG, "name"],
        ["promote", finished_run, LONG],
        ["sweep", f"{LONG}.yaml"],
        ["sweep", QUICKSTART, "--run-dir", LONG, "--count", "1"],
        ["find-lr", f"{LONG}.yaml"],
        ["memory", f"{LONG}.yaml"],
        ["profile", f"{LONG}.yaml"],
    ):
        assert LONG in refusal(*words)
    for words in (
        ["train", f"data.source=file:{LONG}"],
        ["train", f"training.init_from={LONG}"],
        ["evaluate", finished_run, "--data", f"file:{LONG}"],
    ):
        assert LONG in refusal(*words, reading=True)
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_meant_by_a_tilde(
    tmp_path: Path, refusal: Refusal, monkeypatch: pytest.MonkeyPatch, tiny: list[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    said = refusal("train", *tiny, "--run-dir=~/runs")
    assert said == f"mainrun: {tmp_path}/home/runs exists: choose another --run-dir, or resume it"
    assert f"{tmp_path}/home/runs is no run folder" in refusal("resume", "~/runs")
    init = refusal("train", *tiny, "training.init_from=~/runs", reading=True)
    assert f"training.init_from={tmp_path}/home/runs is no run folder" in init
    monkeypatch.setenv("MAINRUN_RUNS_DIR", "~no-such-user/runs")
    assert "~no-such-user/runs: there is no such user" in refusal("train", *tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["home"]


def test_sweeps_lie_where_runs_lie(
    tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MAINRUN_RUNS_DIR", "~/all/runs")
    (tmp_path / "tiny.yaml").write_text(config.to_yaml(config.load(None, tiny)))
    source = tmp_path / "search.yaml"
    source.write_text(
        "method: grid\nparameters: {seed: {values: [1, 2]}}\n"
        f"command: [mainrun, train, {tmp_path}/tiny.yaml, '${{args_no_hyphens}}']\n"
    )
    made = [sweep_folder.open_folder(source, sweep_file.read(source), None) for _ in range(2)]
    assert {one.folder.parent for one in made} == {tmp_path / "all" / "runs"}
    assert all(one.folder.name.rstrip("-2").endswith("-search") for one in made)
