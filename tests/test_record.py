"""The record survives what happens to a process, and the table is its faithful view."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun.errors import UserError
from mainrun.record import WALL_CLOCK, Record, Table, columns, metrics, read_events, write_csv


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


def written(path: Path, *events: tuple[str, int | None, dict[str, Any]]) -> Path:
    record = Record(path, resume=True)
    for event in events:
        record.append(*event)
    record.close()
    return path


def in_another_process(program: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_line_is_an_object_that_begins_with_event_time_and_step(path: Path):
    written(path, ("evaluation", 7, {"val/loss": 1.5, "note": "a\nb ü \u2028"}))
    lines = path.read_bytes().split(b"\n")
    assert lines[1:] == [b""]
    event = json.loads(lines[0])
    assert list(event) == ["event", "timestamp", "step", "val/loss", "note"]
    assert event["timestamp"].endswith("Z")
    assert (event["step"], event["val/loss"], event["note"]) == (7, 1.5, "a\nb ü \u2028")


def test_numbers_that_json_lacks_are_valid_json_and_read_back(path: Path):
    values = {"train/loss": math.nan, "train/a": math.inf, "train/b": -math.inf}
    written(path, ("train_step", 1, {**values, "deep": [{"x": math.nan}]}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (event,) = read_events(path)
    assert math.isnan(event["train/loss"])
    assert (event["train/a"], event["train/b"]) == (math.inf, -math.inf)


def test_text_that_is_no_unicode_is_written_and_read_back(path: Path):
    written(path, ("warning", None, {"message": "file \udcff"}))
    assert read_events(path)[0]["message"] == "file \udcff"


@pytest.mark.parametrize("torn", [b'{"event": "train_st', b'{"event": "x"}', b"\0\0\0"])
def test_a_half_written_last_line_is_no_event_and_is_cut_off_at_resume(path: Path, torn: bytes):
    written(path, ("train_step", 1, {}), ("train_step", 2, {}))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert [e["step"] for e in read_events(path)] == [1, 2]
    written(path, ("resumed", 1, {}))
    assert path.read_bytes().startswith(whole + b'{"event": "resumed"')
    assert [e["event"] for e in read_events(path)] == ["train_step", "train_step", "resumed"]


AT = b'"timestamp": "2026-01-01T00:00:00Z"'
NO_EVENTS = [
    b"garbage",
    b"5",
    b"null",
    b"{}",
    b"[]",
    b"",
    b"\0\0\0",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"event": "warning"}',
    b'{"event": "warning", "timestamp": "yesterday"}',
    b'{"event": "warning", "timestamp": "2026-01-01"}',
    b'{"event": 5, %s}' % AT,
    b"{%s}" % AT,
    b'{"event": "train_step", %s}' % AT,
    b'{"event": "train_step", %s, "step": null}' % AT,
    b'{"event": "warning", %s, "step": "1"}' % AT,
    b'{"event": "warning", %s, "step": true}' % AT,
    b'{"event": "samples", %s, "step": 1}' % AT,
    b'{"event": "stopped_early", %s, "step": 1}' % AT,
]


@pytest.mark.parametrize("line", NO_EVENTS, ids=lambda line: str(line[:60]))
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_line_that_is_no_event_is_told_with_its_number_and_costs_itself_alone(
    path: Path, line: bytes, place: int, capsys: pytest.CaptureFixture[str]
):
    written(path, ("train_step", 1, {}), ("train_step", 2, {}))
    lines = path.read_bytes().splitlines()
    damaged = b"".join(x + b"\n" for x in [*lines[:place], line, *lines[place:]])
    path.write_bytes(damaged)
    assert [e["step"] for e in read_events(path)] == [1, 2]
    assert capsys.readouterr().err == f"warning: {path}: line {place + 1} is no event: skipped\n"
    written(path, ("resumed", 1, {}))
    assert path.read_bytes().startswith(damaged + b'{"event": "resumed"')
    assert [e["event"] for e in read_events(path)] == ["train_step", "train_step", "resumed"]
    assert capsys.readouterr().err == ""  # once is enough


def test_of_many_lines_that_are_no_events_the_first_few_are_told(
    path: Path, capsys: pytest.CaptureFixture[str]
):
    path.write_bytes(b"5\n" * 1000)
    assert read_events(path) == []
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("lines 1, 2, 3, 4, 5 and 995 more are no events: skipped")


def test_a_folder_without_a_record_is_the_users_mistake(path: Path):
    with pytest.raises(UserError, match="not a run folder"):
        read_events(path)


def test_a_new_run_does_not_write_into_an_old_record(path: Path):
    written(path, ("run_started", None, {}))
    before = path.read_bytes()
    with pytest.raises(UserError, match="mainrun resume"):
        Record(path, resume=False)
    assert path.read_bytes() == before


def test_a_second_process_is_refused_until_the_first_is_gone_however_it_went(path: Path):
    program = """
        import sys, time
        from pathlib import Path
        from mainrun.record import Record
        record = Record(Path(sys.argv[1]), resume=True)
        print("open", flush=True)
        time.sleep(60)
    """
    with in_another_process(program, path) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "open\n"
            with pytest.raises(UserError, match="written by another process"):
                Record(path, resume=True)
        finally:
            holder.send_signal(signal.SIGKILL)
    written(path, ("resumed", 0, {}))
    assert os.listdir(path.parent) == ["events.jsonl"]


def test_a_full_disk_fails_with_file_and_reason_and_leaves_whole_lines(path: Path):
    """The limit on a file's size stands for the disk: it too takes the first part of a line."""
    program = """
        import resource, sys
        from pathlib import Path
        from mainrun.errors import RunFailed
        from mainrun.record import Record
        record = Record(Path(sys.argv[1]), resume=False)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            for step in range(100):
                record.append("train_step", step, {"train/loss": 1.0})
        except RunFailed as error:
            print(step, error)
    """
    with in_another_process(program, path) as process:
        output, _ = process.communicate()
    step, _, message = output.partition(" ")
    assert str(path) in message
    assert "File too large" in message
    assert path.read_bytes().endswith(b"}\n")
    assert [e["step"] for e in read_events(path)] == list(range(int(step)))


def test_resumed_voids_later_steps_and_the_last_value_of_a_step_wins():
    events = [
        {"event": "train_step", "step": s, "train/loss": float(s), "perf/step_ms": 9}
        for s in range(6)
    ]
    again = {"event": "train_step", "step": 4, "train/loss": 40.0}
    rows = metrics([*events, {"event": "resumed", "step": 3}, again])
    assert [(row["step"], row["train/loss"]) for row in rows] == [
        (0, 0.0), (1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0),
    ]  # fmt: skip
    assert "perf/step_ms" not in rows[4]


def test_only_fields_with_a_slash_and_elapsed_seconds_are_metrics():
    event = {
        "event": "evaluation", "step": 1, "timestamp": "…", "val/loss": 2.0, "val/kind": "words",
        "val/good": True, "elapsed_seconds": 3.0, "parameters": 5,
    }  # fmt: skip
    assert metrics([event]) == [{"step": 1, "val/loss": 2.0, "elapsed_seconds": 3.0}]


def test_columns_stand_in_one_order_whatever_came_first():
    names = ["perf/b", "elapsed_seconds", "other/x", "val/loss", "step", "train/loss", "perf/a"]
    expected = ["step", "train/loss", "val/loss", "perf/a", "perf/b", "other/x", "elapsed_seconds"]
    assert columns(names) == columns(reversed(names)) == expected


def test_wall_clock_columns_are_those_that_a_clock_decides():
    names = ["perf/step_ms", "val/seconds", "elapsed_seconds", "val/loss", "train/loss", "step"]
    assert [n for n in names if n.startswith(WALL_CLOCK)] == names[:3]


METRICS = st.dictionaries(
    st.sampled_from(["train/loss", "val/loss", "noise/scale_tokens", "elapsed_seconds"]),
    st.floats() | st.integers(0, 2**40),
)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["train_step", "train_step", "train_step", "evaluation", "resumed"]),
        st.integers(0, 5),
        METRICS,
    ),
    max_size=12,
)


@settings(deadline=None)  # a busy disk is no mistake
@given(EVENTS)
def test_the_live_table_is_at_every_moment_the_one_made_from_the_record(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, dict[str, float]]]
):
    folder = tmp_path_factory.mktemp("live")
    record = Record(folder / "events.jsonl", resume=False)
    table = Table(folder / "metrics.csv", record.path)
    expected: dict[int, dict[str, float]] = {}
    for event, step, fields in events:
        fields = {} if event == "resumed" else fields
        record.append(event, step, fields)
        table.add(event, step, fields)
        if event == "resumed":
            expected = {s: row for s, row in expected.items() if s <= step}
        elif fields:
            expected.setdefault(step, {}).update(fields)
        if not table.path.exists():
            assert not expected
            continue
        with table.path.open(newline="") as file:
            rows = [
                {name: float(cell) for name, cell in row.items() if cell != ""}
                for row in csv.DictReader(file)
            ]
        assert spelt(rows) == spelt([{"step": s, **expected[s]} for s in sorted(expected)])
    record.close()


def spelt(rows: list[dict[str, float]]) -> list[list[tuple[str, str]]]:
    """Comparable also where a value is nan."""
    return [sorted((name, repr(float(value))) for name, value in row.items()) for row in rows]


def test_a_table_is_complete_or_as_before(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    write_csv(path, [{"step": 0, "val/loss": 2.5}, {"step": 1, "train/loss": 1}])
    assert path.read_text() == "step,train/loss,val/loss\n0,,2.5\n1,1,\n"
    with pytest.raises(KeyError):
        write_csv(path, [{"step": 0}, Broken()])
    assert path.read_text() == "step,train/loss,val/loss\n0,,2.5\n1,1,\n"


class Broken(dict[str, float]):
    """A row that fails when it is read."""

    def __contains__(self, name: object) -> bool:
        raise KeyError(name)
