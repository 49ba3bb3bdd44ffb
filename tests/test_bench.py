"""The harness's arithmetic and manners, with contestants of a few lines; and the real ones, small.

Nothing here asserts a time of mainrun or PyTorch: tests share the machine with other tests.
"""

import json
import math
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks import contestants, page, peaks, pytorch, race, ratios, sizes, steady
from benchmarks.__main__ import equal_settings
from benchmarks.contestants import Contestant, environment, field
from benchmarks.ratios import Record, Spread
from benchmarks.worker import Answer, Worker, WorkerFailed
from mainrun import config, parts

MIB = 2**20
FOLDER = pytorch.ROOT / page.FOLDER

# Takes `argv[1]` seconds and `argv[2]` MiB for each step, and writes down when it was at work.
FAKE = """
import json, sys, time
seconds, mebibytes, diary, name = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
print("BEGIN {}\\nREADY " + json.dumps({"first_loss": 2.0, "versions": {}}), flush=True)
done = 1
for line in sys.stdin:
    began = time.monotonic()
    for _ in range(int(line)):
        time.sleep(seconds)
        b"x" * (mebibytes * 2**20)
        done += 1
    with open(diary, "a") as file:
        file.write(json.dumps([name, began, time.monotonic()]) + "\\n")
    answer = {"seconds": seconds, "loss": 2.0 - done / 100, "steps": done, "device_bytes": None}
    print("R " + json.dumps(answer), flush=True)
"""


def test_a_ratio_is_of_the_times_of_one_round() -> None:
    # The machine is three times slower in the third round; ours is always half of the reference.
    reference, ours = _record([4.0, 4.2, 12.0]), _record([2.0, 2.1, 6.0])
    row = ratios.rows({"reference": reference, "ours": ours}, "reference", drop=0)["ours"]
    assert row.ratio == Spread(0.5, 0.5, 0.5)
    assert row.seconds == Spread(2.1, 2.0, 6.0)
    assert row.ratio_of_best == 0.5


def test_a_rival_is_compared_with_round_by_round() -> None:
    records = {
        "reference": _record([4.0, 4.0]),
        "rival": _record([2.0, 6.0]),
        "ours": _record([1.0, 3.0]),
    }
    rows = ratios.rows(records, "reference", drop=0, rivals={"ours": "rival"})
    assert rows["ours"].rival_ratio == Spread(0.5, 0.5, 0.5)
    assert rows["rival"].rival_ratio is None


def test_ours_has_for_a_rival_pytorch_at_its_best_in_the_same_precision(tmp_path: Path) -> None:
    on_gpu = field("gpu", bfloat16=True, torch=tmp_path)
    assert contestants.rivals(on_gpu) == {
        "mainrun f32": "torch f32 compiled",
        "mainrun bf16": "torch bf16 compiled",
    }
    assert [c.name for c in on_gpu if c.is_compiled] == [
        "torch f32 compiled",
        "torch bf16 compiled",
    ]
    assert contestants.rivals(field("cpu", bfloat16=False, torch=None)) == {}


def test_peaks_are_of_this_device_and_plausible() -> None:
    found = peaks.measure(numbers=2**20)
    assert 1e8 < found["flops_per_second"]["float32"] < 1e15
    assert 1e8 < found["bytes_per_second"] < 1e14
    assert found["datasheet"] is None


def test_the_page_is_what_the_records_say_and_names_what_was_not_run() -> None:
    records = {f.stem: json.loads(f.read_text("utf-8")) for f in FOLDER.glob("*.json")}
    text = page.page(records)
    assert FOLDER.with_suffix(".md").read_text("utf-8") == text, "python -m benchmarks.page"
    assert "## `gpt124m`\n\nNot run." in page.page({})


@pytest.mark.slow
def test_a_long_run_on_packed_documents_does_not_grow(tmp_path: Path) -> None:
    """Its later thousands take no more memory than the one after the first."""
    found = steady.measure(4000, 1000, tmp_path)
    resident = [s["resident_bytes"] for s in found["stretches"]]
    assert len(resident) == 4
    assert resident[-1] < resident[1] + 8 * MIB, resident


def test_dropped_rounds_move_no_number() -> None:
    reference = _record([4.0, 5.0, 6.0])
    warming = _record([4e6, 5.0, 12.0], faults=[9e9, 10.0, 20.0])
    row = ratios.rows({"reference": reference, "ours": warming}, "reference", drop=1)["ours"]
    assert row.seconds == Spread(8.5, 5.0, 12.0)
    assert row.ratio == Spread(1.5, 1.0, 2.0)
    assert row.ratio_of_best == 1.0
    assert row.minor_faults == 15.0


def test_memory_is_compared_with_the_references_and_unknown_memory_with_nothing() -> None:
    records = {
        "reference": _record([1.0], peak=400 * MIB),
        "ours": _record([1.0], peak=100 * MIB),
        "unknown": _record([1.0], peak=None),
    }
    rows = ratios.rows(records, "reference", drop=0)
    assert rows["ours"].memory_ratio == 0.25
    assert rows["unknown"].memory_ratio is None


@pytest.mark.parametrize(
    ("first", "last", "refused"),
    [
        (9.70, 9.50, None),
        (9.74, 9.46, None),
        (9.76, 9.50, "loss at the first step is 9.7600, the reference's 9.7000"),
        (9.70, 9.44, "loss at the step 4 is 9.4400, the reference's 9.5000"),
        (9.70, math.nan, "loss at the step 4 is nan, the reference's 9.5000"),
        (math.inf, 9.50, "loss at the first step is inf, the reference's 9.7000"),
    ],
)
def test_a_contestant_that_learns_something_else_is_refused(
    first: float, last: float, refused: str | None
) -> None:
    reference = _record([1.0, 1.0, 1.0], first_loss=9.70, last_loss=9.50)
    record = _record([1.0, 1.0, 1.0], first_loss=first, last_loss=last)
    row = ratios.rows({"reference": reference, "ours": record}, "reference", drop=0)["ours"]
    assert row.refused == refused


def test_losses_after_unequal_numbers_of_steps_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="equally many"):
        ratios.refusal(_record([1.0, 1.0]), _record([1.0]))


def test_contestants_take_turns_and_never_overlap(tmp_path: Path) -> None:
    names = ["a", "b", "c"]
    diary = tmp_path / "diary"
    commands = {_contestant(name): _fake(diary, name, seconds=0.01) for name in names}
    records, facts = race.rounds(commands, tmp_path, count=6, steps=2, seed=0, say=lambda _: None)
    turns = [json.loads(line) for line in diary.read_text().splitlines()]
    rounds = [[name for name, _, _ in turns[i : i + 3]] for i in range(0, len(turns), 3)]
    assert [sorted(names_of_round) for names_of_round in rounds] == [names] * 6
    assert len({tuple(names_of_round) for names_of_round in rounds}) > 1, "the order is shuffled"
    for (_, _, end), (_, begin, _) in pairwise(turns):
        assert end <= begin
    assert facts["a"]["first_loss"] == 2.0
    assert [answer.steps for answer in records["a"].answers] == [3, 5, 7, 9, 11, 13]


def test_each_start_is_of_a_new_process_and_cold_before_warm(tmp_path: Path) -> None:
    # It says READY at once when its cache folder is there, and makes it otherwise.
    program = (
        "import json, os, time; p = os.environ['MAINRUN_CACHE_DIR']\n"
        "if not os.path.exists(p): time.sleep(0.5); os.mkdir(p)\n"
        "print('BEGIN {}\\nREADY {}', flush=True); input()"
    )
    command = [sys.executable, "-c", program]
    seconds = race.starts({_contestant("a"): command}, tmp_path, count=2, say=lambda _: None)["a"]
    assert [len(seconds["cold"]), len(seconds["warm"])] == [2, 2]
    assert min(start.begin for start in seconds["cold"]) >= 0.5
    assert len(list(tmp_path.iterdir())) == 2, "each cold start has a cache of its own"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="no /proc")
def test_peak_memory_and_faults_are_the_contestants_own(tmp_path: Path) -> None:
    ballast = b"x" * (300 * MIB)  # of the parent, which a child's ru_maxrss would report
    with Worker(_fake(tmp_path / "diary", "a", mebibytes=0), dict(os.environ), tmp_path) as small:
        small.run(1)
        assert (small.peak_bytes() or 0) < 100 * MIB
    with Worker(_fake(tmp_path / "diary", "a", mebibytes=100), dict(os.environ), tmp_path) as large:
        answer = large.run(1)
        assert 100 * MIB < (large.peak_bytes() or 0) < 200 * MIB
        assert (answer.minor_faults or 0) >= 50, "100 MiB are 50 huge pages, or 25,600 small ones"
    assert len(ballast) == 300 * MIB


def test_a_contestant_that_dies_is_an_error_with_its_last_words(tmp_path: Path) -> None:
    program = "print('BEGIN {}\\nREADY {}', flush=True); input(); raise SystemExit('no more')"
    dying = Worker([sys.executable, "-c", program], dict(os.environ), tmp_path)
    with dying, pytest.raises(WorkerFailed, match="no more"):
        dying.run(1)
    with pytest.raises(WorkerFailed, match="never ready"):
        Worker([sys.executable, "-c", "raise SystemExit('never ready')"], {}, tmp_path)


def test_a_contestant_is_gone_after_its_block_even_when_the_block_fails(tmp_path: Path) -> None:
    deaf = "import time; print('BEGIN {}\\nREADY {}', flush=True); time.sleep(600)"
    worker = Worker([sys.executable, "-c", deaf], dict(os.environ), tmp_path)
    with pytest.raises(KeyboardInterrupt), worker:
        raise KeyboardInterrupt
    assert worker._process.returncode == -signal.SIGKILL


def test_stock_pytorch_is_stock_whatever_the_shell_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    stock, tuned, ours = field("cpu", bfloat16=False, torch=tmp_path)
    assert not {"MALLOC_ARENA_MAX", "XLA_FLAGS"} & environment(stock, tmp_path).keys()
    assert environment(tuned, tmp_path)["MALLOC_ARENA_MAX"] == "1"
    assert environment(ours, tmp_path)["JAX_PLATFORMS"] == "cpu"


@pytest.mark.slow
def test_mainrun_takes_part_with_its_own_loop(corpus: Path, tmp_path: Path) -> None:
    overrides = [*sizes.SIZES["tiny"][1], f"data.source=file:{corpus}", "training.epochs=200"]
    run = config.load(None, [*overrides, "optimizer.learning_rate=1e-2"])
    settings = equal_settings(run, parts.read_texts(run), tmp_path)
    (contestant,) = field("cpu", bfloat16=False, torch=None)
    command = contestants.command(contestant, settings, run, tmp_path)
    with Worker(command, environment(contestant, tmp_path / "cache"), pytorch.ROOT) as worker:
        untrained = math.log(settings["model"]["vocab_size"])
        assert abs(worker.facts["first_loss"] - untrained) < 0.1
        assert worker.run(20).steps == 21
        answer = worker.run(79)
    assert answer.steps == 100
    assert answer.loss < untrained - 1
    assert list((tmp_path / "cache").rglob("*-cache")), "the next start finds the compiled step"


@pytest.mark.slow
@pytest.mark.skipif(pytorch.interpreter() is None, reason=pytorch.MISSING)
def test_the_real_contestants_run_and_learn_the_same(corpus: Path, tmp_path: Path) -> None:
    output = tmp_path / "bench"
    command = ["-m", "benchmarks", f"data.source=file:{corpus}", "--sizes", "tiny"]
    options = [
        "--rounds",
        "2",
        "--drop",
        "1",
        "--steps",
        "3",
        "--starts",
        "1",
        "--output",
        str(output),
    ]
    done = subprocess.run(
        [sys.executable, *command, *options], cwd=pytorch.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((output / "tiny.json").read_text())
    assert record["devices"] == ["cpu", "gpu"]
    (comparison, *_) = record["comparisons"]
    in_float32 = [name for name in comparison["rows"] if "bf16" not in name]  # that: with AMX only
    assert in_float32 == ["torch f32 stock", "torch f32 tuned malloc", "mainrun f32"]
    parameters = {name: facts["parameters"] for name, facts in comparison["facts"].items()}
    assert len(set(parameters.values())) == 1, parameters
    for name, row in comparison["rows"].items():
        assert row["refused"] is None
        answers = comparison["records"][name]["answers"]
        assert [answer["steps"] for answer in answers] == [4, 7, 10]
        # Untrained weights are all but a uniform guess.
        assert abs(row["first_loss"] - math.log(record["vocab_size"])) < 0.1
    for kind in ("cold", "warm"):
        ((begin, done),) = comparison["starts"]["mainrun f32"][kind]
        assert 0 < begin < done
    text = output.with_suffix(".md").read_text()
    assert "| mainrun f32 |" in text
    assert "GPU: not run." in text or record["gpu"] != "none"
    assert str(pytorch.ROOT) not in text + (output / "tiny.json").read_text()


# ---------------------------------------------------------------------------------------------


def _record(
    seconds: list[float],
    *,
    faults: list[float] | None = None,
    first_loss: float = 2.0,
    last_loss: float = 1.0,
    peak: int | None = MIB,
) -> Record:
    faults = faults or [0.0] * len(seconds)
    answers = [
        Answer(s, last_loss, steps, None, f, 0.0)
        for steps, (s, f) in enumerate(zip(seconds, faults, strict=True), start=2)
    ]
    return Record(first_loss, answers, peak)


def _contestant(name: str) -> Contestant:
    return Contestant(name, "mainrun", "cpu", "float32")


def _fake(diary: Path, name: str, *, seconds: float = 0.0, mebibytes: int = 0) -> list[str]:
    return [sys.executable, "-c", FAKE, str(seconds), str(mebibytes), str(diary), name]
