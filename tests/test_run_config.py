"""What a run was told at a resume holds from then on, and everything said of the run says so."""

import contextlib
import io
import json
import shlex
import shutil
from pathlib import Path

import pytest

import mainrun
from mainrun import cli
from mainrun.summary import write_summary


def call(*words: object, code: int = 0) -> str:
    """What the command says, in this process, which has JAX already."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        assert cli.main([str(word) for word in words]) == code, said.getvalue()
    return said.getvalue()


@pytest.fixture(scope="module")
def longer(tmp_path_factory: pytest.TempPathFactory, finished_run: Path) -> Path:
    """The run of 40 steps, resumed with 4 more. Read it, do not change it."""
    run_dir = shutil.copytree(finished_run, tmp_path_factory.mktemp("runs") / "longer")
    call("resume", run_dir, "training.max_steps=44", "training.num_samples=0")
    return run_dir


@pytest.fixture
def killed(longer: Path, tmp_path: Path) -> Path:
    """The same, as if killed at its first step after the resume."""
    run_dir = shutil.copytree(longer, tmp_path / "killed")
    shutil.rmtree(run_dir / "checkpoints" / "44")
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    last = next(n for n, line in enumerate(lines) if '"event": "resumed"' in line)
    (run_dir / "events.jsonl").write_text("".join(lines[: last + 1]))
    return run_dir


def test_the_command_that_is_printed_after_a_hard_kill_goes_on_with_what_was_said(
    killed: Path, longer: Path
) -> None:
    command = write_summary(killed)["resume_command"]
    said = call(*shlex.split(command)[1:])
    assert "finished: 44 of 44 steps" in said
    assert "is finished" in call(*shlex.split(command)[1:])


def test_the_config_of_a_run_is_that_of_its_last_resume(longer: Path, finished_run: Path) -> None:
    settings = mainrun.load(longer).config.training
    assert (settings.max_steps, settings.num_samples) == (44, 0)
    assert mainrun.load(finished_run).config.training.max_steps == 40


def test_later_words_win_and_those_before_them_stay(killed: Path) -> None:
    call("resume", killed, "training.max_steps=42")
    settings = mainrun.load(killed).config.training
    assert (settings.max_steps, settings.num_samples) == (42, 0)


def test_the_config_of_the_first_day_stays_as_it_was_written(
    longer: Path, finished_run: Path
) -> None:
    assert (longer / "config.yaml").read_bytes() == (finished_run / "config.yaml").read_bytes()


def test_summary_and_report_say_what_a_resume_changed(longer: Path) -> None:
    result = json.loads((longer / "summary.json").read_text())
    words = ["training.max_steps=44", "training.num_samples=0"]
    assert (result["steps"], result["total_steps"]) == (44, 44)
    assert result["changes"] == [{"step": 40, "overrides": words}]
    said = (longer / "summary.md").read_text()
    assert "44 of 44" in said
    assert "| changed on resume | training.max_steps=44 training.num_samples=0 from step 40 |" in (
        said.replace("\\", "")
    )
    call("report", longer)
    report = (longer / "report.md").read_text()
    assert "44 of 44" in report
    again = f"mainrun train {longer}/config.yaml {' '.join(words)}"
    assert again in report
    settings = next(line for line in report.splitlines() if "| `training.max_steps`" in line)
    assert "44" in settings
