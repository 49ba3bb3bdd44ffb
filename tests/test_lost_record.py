"""A run without its record goes on, and is used, by what its checkpoints hold."""

import json
import shutil
from pathlib import Path

import pytest

from mainrun import cli, trained
from mainrun.record import metrics, read_events
from mainrun.summary import write_summary
from mainrun.training.checkpoint import Checkpoints


@pytest.fixture
def without_record(tmp_path: Path, finished_run: Path) -> Path:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    (run_dir / "events.jsonl").unlink()
    return run_dir


def best(run_dir: Path) -> tuple[int, float]:
    """Step and `val/loss`, by the record."""
    rows = [row for row in metrics(read_events(run_dir / "events.jsonl")) if "val/loss" in row]
    row = min(rows, key=lambda row: row["val/loss"])
    return int(row["step"]), float(row["val/loss"])


def step_of(run_dir: Path) -> int:
    return trained.load(run_dir).step


def remember_another_best(run_dir: Path, step: int) -> None:
    """As if the newest checkpoint knew the best at this step."""
    with Checkpoints(run_dir / "checkpoints", read_only=True) as saved:
        newest = saved.steps()[-1]
    path = run_dir / "checkpoints" / str(newest) / "record" / "metadata"
    record = json.loads(path.read_text())
    record["progress"]["best_step"] = step
    path.write_text(json.dumps(record))


def test_the_best_checkpoint_is_the_one_that_the_newest_knows(
    without_record: Path, finished_run: Path
) -> None:
    assert step_of(without_record) == best(finished_run)[0]
    steps = sorted(int(path.name) for path in (without_record / "checkpoints").iterdir())
    remember_another_best(without_record, steps[0])
    assert step_of(without_record) == steps[0]
    remember_another_best(without_record, 1)  # which is no longer kept
    assert step_of(without_record) == steps[-1]


def test_a_value_that_is_no_number_is_never_the_best(tmp_path: Path, finished_run: Path) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    line = {"event": "evaluation", "timestamp": "2026-01-01T00:00:00Z", "step": steps[0]}
    text = json.dumps({**line, "val/loss": "NaN"}) + "\n"
    path = run_dir / "events.jsonl"
    path.write_text(path.read_text() + text)
    expected, _ = best(finished_run)
    assert step_of(run_dir) == (steps[-1] if expected == steps[0] else expected)


def test_commands_take_a_run_without_a_record_or_say_what_to_do(
    without_record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = str(without_record)
    output = ["--format", "safetensors", "--output", str(tmp_path / "exported")]
    assert cli.main(["evaluate", run_dir, "--json"]) == 0
    assert cli.main(["generate", run_dir]) == 0
    assert cli.main(["export", run_dir, *output]) == 0
    capsys.readouterr()
    assert cli.main(["report", run_dir]) == 2
    assert f"`mainrun resume {run_dir}` begins another" in capsys.readouterr().err
    for command in (["promote", run_dir, "name"], ["report", "--scaling", run_dir]):
        assert cli.main(command) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_resumed_run_begins_a_record_with_what_its_checkpoint_holds(
    without_record: Path, finished_run: Path
) -> None:
    table = (without_record / "metrics.csv").read_bytes()
    assert cli.main(["resume", str(without_record)]) == 0
    assert best(without_record) == best(finished_run)
    now, before = (write_summary(run_dir) for run_dir in (without_record, finished_run))
    for name in ("status", "steps", "total_steps", "parameters", "tokens_seen", "device"):
        assert now[name] == before[name], name
    assert now["val/loss"]["best"]["value"] == before["val/loss"]["best"]["value"]
    assert (without_record / "metrics.lost.csv").read_bytes() == table
    assert cli.main(["report", str(without_record)]) == 0
