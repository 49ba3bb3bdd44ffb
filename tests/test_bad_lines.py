"""Lines of a record that are no events: every reader goes on without them."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mainrun import cli, folder
from mainrun.analysis import report, run_folder, scaling_runs
from mainrun.errors import UserError
from mainrun.plots import write_plots
from mainrun.record import metrics, read_events
from mainrun.sota import evidence
from mainrun.summary import write_summary
from mainrun.sweep import sweep_folder
from mainrun.sweep.metric import Metric

BAD = ["garbage", "5", "null", "{}", '{"event": "evaluation"}']


@pytest.fixture
def damaged(tmp_path: Path, finished_run: Path) -> Path:
    """A finished run with a bad line before every line, and one behind the last."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    path = run_dir / "events.jsonl"
    lines = path.read_text().splitlines()
    bad = [BAD[number % len(BAD)] for number in range(len(lines) + 1)]
    together = [x for pair in zip(bad, [*lines, ""], strict=True) for x in pair][:-1]
    path.write_text("\n".join(together) + "\n")
    return run_dir


READERS: dict[str, Callable[[Path], Any]] = {
    "metrics": lambda run_dir: metrics(read_events(run_dir / "events.jsonl")),
    "is_finished": folder.is_finished,
    "summary": lambda run_dir: {**write_summary(run_dir), "run_dir": "", "name": ""},
    "plots": write_plots,
    "report": lambda run_dir: len(report.report([run_dir], run_dir / "r.html").read_text()) > 1000,
    "rows": lambda run_dir: run_folder.read(run_dir).rows,
    "outcome": lambda run_dir: sweep_folder.outcome_of(run_dir, Metric("val/loss", "minimize")),
    "evidence": lambda run_dir: evidence.read([run_dir])[0].measured.value,
    "scaling": lambda run_dir: scaling_runs.read([run_dir]).runs[0].last,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_a_reader_says_the_same_with_bad_lines_as_without(
    name: str, damaged: Path, tmp_path: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (damaged / "events.jsonl").read_bytes()
    whole = shutil.copytree(finished_run, tmp_path / "whole")
    assert READERS[name](damaged) == READERS[name](whole)
    assert "events.jsonl: lines 1, 3, 5, 7, 9 and " in capsys.readouterr().err
    assert (damaged / "events.jsonl").read_bytes() == before


def test_a_run_goes_on_behind_bad_lines_and_keeps_them(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (damaged / "events.jsonl").read_bytes()
    assert cli.main(["resume", str(damaged), "training.max_steps=44"]) == 0
    assert "are no events: skipped" in capsys.readouterr().err
    assert (damaged / "events.jsonl").read_bytes().startswith(before)
    assert metrics(read_events(damaged / "events.jsonl"))[-1]["step"] == 44
    assert cli.main(["evaluate", str(damaged)]) == 0


def without(run_dir: Path, event: str, field: str | None = None) -> None:
    """Takes a field of these events out of the record, or the events whole."""
    path = run_dir / "events.jsonl"
    kept = []
    for line in map(json.loads, path.read_text().splitlines()):
        if line["event"] == event:
            if field is None:
                continue
            line.pop(field, None)
        kept.append(json.dumps(line))
    path.write_text("\n".join(kept) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("field", [None, "val_tokens", "steps_per_epoch", "train_tokens"])
def test_a_run_whose_beginning_is_lost_is_no_evidence_and_no_point(
    tmp_path: Path, finished_run: Path, field: str | None
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    without(run_dir, "run_started", field)
    assert write_summary(run_dir)["status"] == "finished"
    report.report([run_dir], None)
    with pytest.raises(UserError, match=field or "val_tokens"):
        evidence.read([run_dir])
    if field != "val_tokens":
        found = scaling_runs.read([run_dir])
        assert (found.runs, [name for name, _ in found.left_out]) == ([], ["run"])


@pytest.mark.slow
def test_no_field_of_an_event_is_worth_a_traceback(tmp_path: Path, finished_run: Path) -> None:
    events = [json.loads(x) for x in (finished_run / "events.jsonl").read_text().splitlines()]
    fields = {(e["event"], name) for e in events for name in e}
    assert len(fields) > 40
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    for event, field in sorted(fields):
        shutil.copy(finished_run / "events.jsonl", run_dir / "events.jsonl")
        without(run_dir, event, field)
        write_summary(run_dir)
        folder.is_finished(run_dir)
        sweep_folder.outcome_of(run_dir, Metric("val/loss", "minimize"))
        run_folder.read(run_dir)
        scaling_runs.read([run_dir])
        with contextlib.suppress(UserError):
            evidence.read([run_dir])
