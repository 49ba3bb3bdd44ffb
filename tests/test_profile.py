"""`mainrun profile`: which steps are timed and traced, what is told of them, and the command."""

import gzip
import json
from pathlib import Path
from typing import Any

import jax
import pytest
from jaxtyping import Array

from mainrun import profile
from mainrun.cli import main
from mainrun.data.batches import Batch
from mainrun.errors import UserError
from mainrun.profile import timing
from mainrun.profile.timing import WARM_UP, Chosen, Measured, Split
from mainrun.record import metrics, read_events
from mainrun.training.flops import Flops
from mainrun.training.step import TrainState
from tests.conftest import Mainrun
from tests.test_loop import state

# --- which steps ----------------------------------------------------------------------------------


class Numbered:
    """Gives a step the number of its batch."""

    most = 1

    def __init__(self) -> None:
        self.numbers: list[int] = []

    def __call__(self, index: int, count: int) -> int:
        self.numbers.append(index + 1)
        return index

    def batch_at(self, given: Any, step: Array) -> Batch:
        raise NotImplementedError


def run(state: TrainState, given: Any, count: Any) -> tuple[TrainState, Any]:
    return state, ()


@pytest.mark.slow
def test_as_many_steps_are_timed_wherever_the_traced_ones_lie(
    tmp_path: Path, subtests: pytest.Subtests
):
    for chosen in [None, "1-2", "2-5", "3-3", "4-4", "6-9", "8-9", "20-21"]:
        with subtests.test(chosen=chosen):
            feed = Numbered()
            alone = timing._OneAtATime(run, feed, state())
            steps, folder = 5, tmp_path / str(chosen)
            numbers = _range(chosen) if chosen else Chosen(steps).traced
            splits, trace = timing._walked(alone, steps, numbers, folder, lambda _: None)
            assert len(splits) == steps
            assert feed.numbers == list(range(1, len(feed.numbers) + 1))
            assert trace is not None
            assert [number for number, _ in trains(trace)] == list(numbers)
            if chosen is None:
                assert list(numbers) == [WARM_UP + 6, WARM_UP + 7, WARM_UP + 8]


def test_without_a_trace_steps_are_those_to_warm_up_and_those_that_are_timed(tmp_path: Path):
    feed = Numbered()
    alone = timing._OneAtATime(run, feed, state())
    splits, trace = timing._walked(alone, 5, range(0), None, lambda _: None)
    assert (len(splits), trace) == (5, None)
    assert feed.numbers == list(range(1, WARM_UP + 6))


def test_steps_that_warm_up_are_not_timed_nor_more_than_were_asked_for():
    found = {number: Split(float(number), 0.0, 0.0) for number in (1, 2, 3, 7, 8, 9, 10)}
    assert [split.input for split in timing._timed(found, 3)] == [7, 8, 9]


def _range(text: str) -> range:
    first, last = map(int, text.split("-"))
    return range(first, last + 1)


def trains(trace: Path) -> list[tuple[int, list[str]]]:
    """Every annotated step of a trace with the names of its parts."""
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    spans = [event for event in events if event.get("ph") == "X"]
    found = []
    for step in (span for span in spans if span["name"] == "train"):
        within = [
            span["name"]
            for span in spans
            if span["name"] in Split._fields
            and step["ts"] <= span["ts"] <= step["ts"] + step["dur"]
        ]
        found.append((int(step["args"]["step_num"]), within))
    return sorted(found)


# --- what is told ---------------------------------------------------------------------------------


def made(**changes: Any) -> Measured:
    """4,000 tokens a step in 2 seconds, 6 operations each."""
    fields: dict[str, Any] = {
        "splits": [Split(0.1, 0.2, 1.7), Split(0.1, 0.1, 1.9), Split(0.3, 0.2, 1.8)],
        "seconds": 2.0,
        "steps_per_dispatch": 1.5,
        "tokens_per_step": 4000,
        "micro_batches": 2,
        "parameters": 1234,
        "flops": Flops(weights=3e6, attention=1e6, head=2e6),
        "precision": "float32",
        "device": "a machine",
        "peak_flops": None,
        "measured_peak_flops": 24e9,
        "peak_memory_bytes": 2**30,
        "step_bytes": 2**29,
        "compile_seconds": 3.0,
        "traced": range(14, 17),
        "trace": Path("out/trace/plugins/profile/now/perfetto_trace.json.gz"),
    }
    return Measured(**fields | changes)


def test_utilisation_is_of_the_data_sheet_where_there_is_one():
    assert made().tokens_per_second == 2000
    assert made().utilisation == pytest.approx(2000 * 6e6 / 24e9)
    on_a_card = made(peak_flops=48e9)
    assert on_a_card.utilisation == pytest.approx(0.25)
    assert "25.0 % of 48.00 GFLOP/s by the data sheet, 50.0 % of 24.00" in profile.table(on_a_card)
    assert "50.0 % of 24.00 GFLOP/s that a float32 product" in profile.table(made())


def test_table_tells_the_parts_of_a_step_and_how_to_see_the_trace():
    shown = profile.table(made())
    assert "2,100.00 ms [2,000.00 ms, 2,300.00 ms]" in shown
    assert "dispatch   200.00 ms, 9.5 %" in shown
    assert "steps 14 to 16: out/trace/plugins" in shown
    assert "xprof --logdir out/trace" in shown
    assert "trace" not in profile.table(made(trace=None))


def test_json_has_the_parts_in_seconds():
    found = profile.as_dict(made())
    assert (found["input_seconds"], found["compute_seconds"]) == (0.1, 1.8)
    assert found["flops_per_token"]["total"] == 6e6
    assert json.loads(json.dumps(found)) == found


# --- comparisons ----------------------------------------------------------------------------------


def test_each_value_of_a_setting_is_one_to_compare_and_all_combinations_of_several():
    assert profile.variants(["training.batch_size=8,16"]) == [
        ("training.batch_size=8",),
        ("training.batch_size=16",),
    ]
    assert profile.variants(["mesh={data: 2, fsdp: 1},{data: 1, fsdp: 2}", "a.b=x,null"]) == [
        ('mesh={"data": 2, "fsdp": 1}', "a.b=x"),
        ('mesh={"data": 2, "fsdp": 1}', "a.b=null"),
        ('mesh={"data": 1, "fsdp": 2}', "a.b=x"),
        ('mesh={"data": 1, "fsdp": 2}', "a.b=null"),
    ]


def test_what_is_no_setting_with_values_is_refused(subtests: pytest.Subtests):
    for text in ["training.batch_size", "=8", "training.batch_size=", "a={b"]:
        with subtests.test(text=text), pytest.raises(UserError, match="--compare"):
            profile.variants([text])


def test_rows_stand_under_one_peak_and_one_that_failed_says_why():
    slow, fast = profile.as_dict(made()), profile.as_dict(made(measured_peak_flops=48e9))
    rows = [
        profile.Row(("a=1",), fast),
        profile.Row(("a=200",), None, "it does not fit"),
        profile.Row(("a=3",), slow),
    ]
    from mainrun.profile.compare import _under_one_peak

    first, failed, last = _under_one_peak(rows)
    assert first.found["utilisation"] == last.found["utilisation"] == pytest.approx(0.25)
    shown = profile.comparison([first, failed, last]).splitlines()
    assert len({len(line) for line in (shown[0], shown[1], shown[3])}) == 1
    assert shown[2] == "a=200       it does not fit"
    assert "2,000   25.0 %  1.00 GiB" in shown[1]


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_command_times_and_traces_real_steps(mainrun: Mainrun, tiny: list[str], tmp_path: Path):
    done = mainrun("profile", *tiny, "--steps", 4, "--trace", "5-6", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert len(found["steps"]) == 4
    parts = [found[f"{name}_seconds"] for name in ("input", "dispatch", "compute")]
    assert 0 < min(parts) <= max(parts) < found["step_seconds"] * 1.5  # medians of each
    assert found["tokens_per_step"] == 8 * 16
    assert 0 < found["utilisation"] < 1
    assert found["utilisation_of"] == "measured"
    assert found["compile_seconds"] > 0.5  # not from the cache, in which other tests may have it
    assert found["peak_memory_bytes"] > found["step_bytes"]

    (folder,) = (tmp_path / "profile").iterdir()
    assert json.loads((folder / "profile.json").read_text()) == found
    steps = trains(tmp_path / found["trace"])
    assert steps == [(5, list(Split._fields)), (6, list(Split._fields))]
    (xplane,) = folder.rglob("*.xplane.pb")
    host = jax.profiler.ProfileData.from_file(str(xplane)).find_plane_with_name("/host:CPU")
    names = {event.name for line in host.lines for event in line.events}
    assert {"train", *Split._fields} <= names
    assert any("fusion" in name for name in names)  # what XLA ran is there too


@pytest.mark.slow
def test_command_compares_settings_and_goes_on_after_one_that_cannot_be(
    mainrun: Mainrun, tiny: list[str], tmp_path: Path
):
    options = ["--compare", "training.batch_size=4096,4", "--steps", 2, "--no-trace"]
    done = mainrun("profile", *tiny, *options, cwd=tmp_path)
    head, large, small = done.stdout.splitlines()
    assert "tokens/s" in head
    assert large.startswith("training.batch_size=4096  training.batch_size=4096 is more than the")
    assert small.startswith("training.batch_size=4 ")
    assert "GiB" in small
    assert list(tmp_path.iterdir()) == []
    assert "2 of 2: training.batch_size=4" in done.stderr


def test_mistakes_are_told_in_one_line_before_any_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    subtests: pytest.Subtests,
):
    cases = [
        (["--output", "full"], "--output=full is not empty"),
        (["--output", "full/file"], "--output=full/file cannot be made"),
        (["--compare", "training.batch_sizes=8"], "training.batch_sizes"),
        (["--compare", "training.batch_size=8,0"], "training.batch_size"),
        (["--compare", "training.batch_size"], "write a setting and its values"),
        (["training.batch_size=x"], "training.batch_size"),
    ]
    monkeypatch.chdir(tmp_path)
    Path("full").mkdir()
    Path("full/file").touch()
    for words, says in cases:
        with subtests.test(words=words):
            assert main(["profile", *words]) == 2
            shown = capsys.readouterr()
            (line,) = shown.err.splitlines()
            assert says in line
            assert shown.out == ""


def test_steps_that_are_none_are_refused(subtests: pytest.Subtests):
    for words in [["--trace", "5-3"], ["--steps", "0"], ["--trace", "0-2"]]:
        with subtests.test(words=words):
            with pytest.raises(SystemExit) as refused:
                main(["profile", *words])
            assert refused.value.code == 2


def test_a_step_that_the_run_does_not_have_is_told(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    output = tmp_path / "out"
    assert main(["profile", *tiny, "--trace", "39-41", "--output", str(output)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "there is no step 41 to trace: the run has 40" in line
    assert not output.exists()


def test_no_utilisation_is_told_of_a_device_without_a_data_sheet(finished_run: Path):
    if jax.default_backend() != "cpu":
        pytest.skip("a card's peak may be known")
    rows = metrics(read_events(finished_run / "events.jsonl"))
    assert any("perf/step_ms" in row for row in rows)
    assert not any("perf/mfu" in row for row in rows)
