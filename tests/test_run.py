"""The whole path: config to run folder; stopped, killed and resumed it ends the same."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mainrun import config as configs
from mainrun import folder, trained
from mainrun.record import WALL_CLOCK, metrics, read_events
from tests.conftest import COMMAND, Disk, Mainrun


def arrays(run_dir: Path) -> dict[str, np.ndarray]:
    """Of the newest checkpoint: all that there is, read with Orbax itself."""
    import orbax.checkpoint as ocp

    newest = max((run_dir / "checkpoints").glob("*[0-9]"), key=lambda p: int(p.name))
    parts = [path for path in newest.iterdir() if path.is_dir() and path.name != "record"]
    assert {"params", "rest"} <= {path.name for path in parts}
    found: dict[str, np.ndarray] = {}
    for path in parts:
        found |= ocp.StandardCheckpointer().restore(path.resolve())
    return found


def reproducible_table(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that a clock or a memory gauge decides."""
    header, *rows = (run_dir / "metrics.csv").read_text().splitlines()
    names = header.split(",")
    return [
        {n: v for n, v in zip(names, row.split(","), strict=True) if not n.startswith(WALL_CLOCK)}
        for row in rows
    ]


def assert_same_end(run_dir: Path, expected: Path) -> None:
    ours, theirs = arrays(run_dir), arrays(expected)
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_array_equal(array, theirs[name], err_msg=name)
    assert reproducible_table(run_dir) == reproducible_table(expected)


def start(*arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> bool:
    """True once it happened, False if the process ended before."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(0.002)  # a poll; nothing depends on its length
    return False


def events(run_dir: Path) -> list[dict]:
    path = run_dir / "events.jsonl"
    return read_events(path) if path.is_file() else []


def size(run_dir: Path) -> int:
    path = run_dir / "events.jsonl"
    return path.stat().st_size if path.is_file() else 0


def kill_and_resume(run_dir: Path, tiny: list[str], kills: int, seed: int) -> int:
    """Train with SIGKILL at random points of the record; how many kills hit a living process."""
    draw, hits = random.Random(seed), 0
    command: list[object] = ["train", *tiny, "--run-dir", run_dir]
    for _ in range(kills):
        # The smallest piece of the record is a step of some 300 bytes.
        until = size(run_dir) + draw.randint(1, 4000)
        process = start(*command)
        if wait_until(process, lambda: size(run_dir) >= until):  # noqa: B023
            process.kill()
            hits += 1
        process.communicate()
        command = ["resume", run_dir]
    return hits


def test_a_run_folder_holds_what_the_readme_says(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    assert names >= {
        "config.yaml",
        "environment.json",
        "events.jsonl",
        "metrics.csv",
        "tokenizer.json",
        "checkpoints",
        "summary.json",
        "summary.md",
        "plots",
    }
    assert json.loads((finished_run / "summary.json").read_text())["status"] == "finished"
    assert configs.load(finished_run / "config.yaml").model.d_model == 16


def test_a_run_whose_every_step_was_skipped_is_not_finished(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    run_dir = tmp_path / "run"
    overflowing = [
        "training.max_steps=4",
        "training.precision=float16",
        "training.loss_scale={initial: 1e+30, max: 1e+30}",
    ]
    told = mainrun("train", *tiny, *overflowing, "--run-dir", run_dir, code=1).stderr
    reason = events(run_dir)[-1]["reason"]
    assert told.splitlines()[-1] == f"mainrun: failed: {reason}"
    assert reason.startswith("each of the 4 steps was skipped, since float16 gradients overflowed")
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"
    assert not folder.is_finished(run_dir)


def test_training_lowers_the_validation_loss(finished_run: Path) -> None:
    losses = [row["val/loss"] for row in metrics(events(finished_run)) if "val/loss" in row]
    assert losses[-1] < 0.9 * losses[0]


def test_newest_and_best_checkpoints_are_kept_and_no_others(finished_run: Path) -> None:
    rows = metrics(events(finished_run))
    best = min((r for r in rows if "val/loss" in r), key=lambda r: r["val/loss"])["step"]
    kept = {int(path.name) for path in (finished_run / "checkpoints").iterdir()}
    assert len(kept) in (2, 3)
    assert {40, best} <= kept


def test_a_killed_run_ends_as_if_never_interrupted(
    tmp_path: Path, tiny: list[str], finished_run: Path, mainrun: Mainrun
) -> None:
    assert kill_and_resume(tmp_path / "run", tiny, kills=2, seed=0) > 0
    mainrun("resume", tmp_path / "run")
    assert_same_end(tmp_path / "run", finished_run)


@pytest.mark.slow
def test_a_killed_float16_run_goes_on_with_its_loss_scale_and_its_average(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    """Bit for bit, in micro-batches, while the scale grows, overflows and backs off."""
    float16 = [
        *tiny,
        "training.max_steps=30",
        "training.precision=float16",
        "training.grad_accumulation=2",
        "training.weight_average={kind: ema, decay: 0.9}",
        "training.loss_scale={initial: 1e+6, growth_interval: 3, growth_factor: 64, "
        "backoff_factor: 0.02, max: 1e+12}",
        "training.checkpoint.every.steps=2",
    ]
    whole = tmp_path / "whole"
    mainrun("train", *float16, "--run-dir", whole)
    assert kill_and_resume(tmp_path / "killed", float16, kills=2, seed=2) > 0
    mainrun("resume", tmp_path / "killed")
    resumed = [e["step"] for e in events(tmp_path / "killed") if e["event"] == "resumed"]
    assert max(resumed) > 0
    assert_same_end(tmp_path / "killed", whole)
    rows = [row for row in metrics(events(whole)) if "precision/loss_scale" in row]
    scales = np.array([row["precision/loss_scale"] for row in rows])
    assert (np.diff(scales) > 0).sum() > 3
    assert (np.diff(scales) < 0).sum() > 3
    end = arrays(whole)
    skipped = int(end["loss_scale|overflows"])
    assert skipped == rows[-1]["precision/skipped_steps"] == 30 - end["updates"]
    assert any(name.startswith("average|") for name in end)
    assert "val_average/loss" in metrics(events(whole))[-1]


@pytest.mark.slow
def test_patience_counts_on_where_a_run_is_resumed(
    tmp_path: Path, tiny: list[str], finished_run: Path, mainrun: Mainrun
) -> None:
    """Nothing is learnt, so the first evaluation is the best; the second is the end of a run."""
    evaluations = [e["step"] for e in events(finished_run) if e["event"] == "evaluation"]
    _, first, second, third, *_ = evaluations
    run_dir = tmp_path / "run"
    unteachable = ["optimizer.learning_rate=1e-30", "training.patience=2"]
    train = ["train", *tiny, *unteachable, f"training.max_steps={first}", "--run-dir", run_dir]
    mainrun(*train)
    mainrun("resume", run_dir, f"training.max_steps={third}")
    told = events(run_dir)
    early = [(e["step"], e["best_step"]) for e in told if e["event"] == "stopped_early"]
    assert early == [(second, 0)]
    assert metrics(told)[-1]["step"] == second
    assert max(int(path.name) for path in (run_dir / "checkpoints").iterdir()) == second
    assert "is finished" in mainrun("resume", run_dir).stderr


@pytest.mark.slow
def test_a_run_goes_back_to_its_newest_checkpoint_from_a_spike(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    restless = [
        "optimizer.learning_rate=0.3",
        "training.divergence={action: go_back, spike_deviations: 0.3, spike_window: 5, limit: 100}",
    ]
    run_dir = tmp_path / "run"
    mainrun("train", *tiny, *restless, "--run-dir", run_dir)
    newest = returns = 0
    for event in events(run_dir):
        if event["event"] == "checkpoint":
            newest = event["step"]
        elif event["event"] == "went_back":
            assert event["to_step"] == newest
            returns += 1
    assert returns > 0
    assert newest == 40
    end = arrays(run_dir)
    assert int(end["guard|returns"]) == returns
    assert int(end["updates"]) < 40


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_twenty_kills_at_random_moments_change_nothing(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    long = [*tiny, "training.max_steps=300", "optimizer.kind=adamw"]
    mainrun("train", *long, "--run-dir", tmp_path / "whole")
    assert kill_and_resume(tmp_path / "killed", long, kills=20, seed=1) >= 15
    mainrun("resume", tmp_path / "killed")
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


def _compiling(process: subprocess.Popen, _: Path) -> bool:
    assert process.stdout is not None
    return any("compiling" in line for line in iter(process.stdout.readline, ""))


def _after(event: str, times: int = 1) -> Callable[[subprocess.Popen, Path], bool]:
    needle = f'"event": "{event}"'.encode()

    def happened(record: Path) -> bool:
        return record.is_file() and record.read_bytes().count(needle) >= times

    return lambda process, run_dir: wait_until(process, lambda: happened(run_dir / "events.jsonl"))


def _saving(process: subprocess.Popen, run_dir: Path) -> bool:
    folder = run_dir / "checkpoints"
    return wait_until(process, lambda: folder.is_dir() and any(folder.glob("*tmp*")))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(_compiling, signal.SIGTERM, id="in the first compile"),
        pytest.param(
            _after("tracking_started"),
            signal.SIGTERM,
            id="in the first evaluation",
            marks=pytest.mark.slow,
        ),
        pytest.param(_after("train_step", 3), signal.SIGTERM, id="in a step"),
        pytest.param(_after("train_step", 3), signal.SIGINT, id="in a step, by Ctrl-C"),
        pytest.param(_saving, signal.SIGTERM, id="in a save"),
    ],
)
def test_a_stop_signal_saves_and_exits_75(
    tmp_path: Path,
    tiny: list[str],
    finished_run: Path,
    mainrun: Mainrun,
    moment: Callable[[subprocess.Popen, Path], bool],
    number: signal.Signals,
) -> None:
    run_dir = tmp_path / "run"
    process = start("train", *tiny, "--run-dir", run_dir)
    assert moment(process, run_dir), "the process ended before the moment came"
    process.send_signal(number)
    process.send_signal(signal.SIGTERM)  # GitHub sends a second one; it must change nothing
    told, _ = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert f"mainrun resume {run_dir}" in told
    assert events(run_dir)[-1]["event"] == "stopped"
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "stopped"
    mainrun("resume", run_dir)
    assert_same_end(run_dir, finished_run)


def test_resuming_a_finished_run_says_so_and_changes_nothing(
    finished_run: Path, mainrun: Mainrun
) -> None:
    before = (finished_run / "events.jsonl").read_bytes()
    assert "is finished" in mainrun("resume", finished_run).stderr
    assert (finished_run / "events.jsonl").read_bytes() == before


def test_a_run_that_was_killed_before_its_last_words_has_its_views_at_the_next_resume(
    tmp_path: Path, finished_run: Path, mainrun: Mainrun
) -> None:
    """Behind `finished`, which ends a record, and before the views of it."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run_dir / "plots")
    for name in ("summary.json", "summary.md", "metrics.csv"):
        (run_dir / name).unlink()
    assert "is finished" in mainrun("resume", run_dir).stderr
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"
    assert reproducible_table(run_dir) == reproducible_table(finished_run)
    assert len(list((run_dir / "plots").iterdir())) == 3


@pytest.mark.slow
def test_a_finished_run_goes_on_when_it_is_given_more_steps(
    tmp_path: Path, finished_run: Path, mainrun: Mainrun
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    mainrun("resume", run_dir, "training.max_steps=44")
    assert metrics(events(run_dir))[-1]["step"] == 44


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, finished_run: Path, mainrun: Mainrun
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    _forget_the_end(run_dir)
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    largest = max((run_dir / "checkpoints" / "40" / "params").rglob("*"), key=_bytes)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 0xFF
    largest.write_bytes(bytes(content))
    told = mainrun("resume", run_dir).stderr
    assert "damaged checkpoint set aside: step 40" in told
    resumed = next(e for e in events(run_dir) if e["event"] == "resumed")
    assert resumed["step"] == steps[-2]
    assert_same_end(run_dir, finished_run)


def test_a_run_goes_on_from_the_checkpoint_that_is_asked_for(
    tmp_path: Path, finished_run: Path, mainrun: Mainrun
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    assert "there are" in mainrun("resume", run_dir, "--checkpoint", 39, code=2).stderr
    mainrun("resume", run_dir, "--checkpoint", steps[0])
    resumed = [e for e in events(run_dir) if e["event"] == "resumed"]
    assert [e["step"] for e in resumed] == [steps[0]]
    assert_same_end(run_dir, finished_run)
    for step in steps[1:]:  # what was newer is there still, under another name
        assert (run_dir / "checkpoints" / f"{step}.set-aside" / "params").is_dir()


def test_the_best_checkpoint_is_that_of_the_least_finite_loss(
    tmp_path: Path, finished_run: Path
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    steps = sorted(int(path.name) for path in (run_dir / "checkpoints").iterdir())
    with (run_dir / "events.jsonl").open("a") as record:
        for step, loss in zip(steps, ['"NaN"', "0.5", '"-Infinity"'], strict=False):
            record.write(f'{{"event": "evaluation", "step": {step}, "val/loss": {loss}}}\n')
    assert len(steps) >= 2
    assert trained.step_of(run_dir, "best") == steps[1]
    assert trained.step_of(run_dir, "newest") == steps[-1]


def _bytes(path: Path) -> int:
    return path.stat().st_size if path.is_file() else -1


@pytest.mark.slow
def test_the_first_evaluation_stands_once_though_the_run_was_killed_behind_it(
    tmp_path: Path, finished_run: Path, mainrun: Mainrun
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    shutil.rmtree(run_dir / "checkpoints")
    _forget_after(run_dir, "evaluation", 0)
    mainrun("resume", run_dir)
    steps = [e["step"] for e in events(run_dir) if e["event"] == "evaluation"]
    assert steps == sorted(set(steps))
    assert steps[0] == 0
    assert_same_end(run_dir, finished_run)
    assert progress(run_dir, 40) == progress(finished_run, 40)


@pytest.mark.slow
def test_an_evaluation_of_a_step_that_was_saved_before_it_stands_once(
    tmp_path: Path, finished_run: Path, mainrun: Mainrun
) -> None:
    """A stop in an evaluation saves the step, and a later process makes the evaluation."""
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    _forget_after(run_dir, "evaluation", 40)
    path = run_dir / "checkpoints" / "40" / "record" / "metadata"
    record = json.loads(path.read_text())
    record["progress"] |= {"evaluated_step": 32, "best_step": 0, "best_loss": 100.0}
    path.write_text(json.dumps(record))
    mainrun("resume", run_dir, "training.max_steps=41")
    rows = [row for row in metrics(events(run_dir)) if "val/loss" in row]
    assert [e["step"] for e in events(run_dir) if e["event"] == "evaluation"].count(40) == 1
    assert progress(run_dir, 41)["best_loss"] == min(row["val/loss"] for row in rows)


def _forget_after(run_dir: Path, event: str, step: int) -> None:
    """As if the process had died behind that event."""
    told = [(e["event"], e.get("step")) for e in events(run_dir)]
    at = told.index((event, step))
    lines = (run_dir / "events.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "events.jsonl").write_text("".join(lines[: at + 1]))


def progress(run_dir: Path, step: int) -> dict[str, float]:
    """What that checkpoint knows of the run, but for its seconds."""
    path = run_dir / "checkpoints" / str(step) / "record" / "metadata"
    found: dict[str, float] = json.loads(path.read_text())["progress"]
    return {name: value for name, value in found.items() if name != "train_seconds"}


def _forget_the_end(run_dir: Path) -> None:
    """As if the process had died before its last words."""
    path = run_dir / "events.jsonl"
    kept = [line for line in path.read_text().splitlines() if '"event": "finished"' not in line]
    path.write_text("\n".join(kept) + "\n")


def _stop_between_saves(process: subprocess.Popen, run_dir: Path) -> None:
    """Stops the process for a while. The writers of a save under way would print tracebacks."""
    while True:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        if not any((run_dir / "checkpoints").glob("*tmp*")):
            return
        process.send_signal(signal.SIGCONT)
        os.sched_yield()


@pytest.mark.slow
@pytest.mark.parametrize("disk", ["size=20m"], indirect=True)
def test_a_full_disk_fails_with_the_reason_and_spares_the_checkpoint_before(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun, disk: Disk
) -> None:
    run_dir = disk.path / "run"
    process = start("train", *tiny, "training.max_steps=100000", "--run-dir", run_dir)
    assert _after("checkpoint", 2)(process, run_dir)
    _stop_between_saves(process, run_dir)
    (disk.path / "ballast").write_bytes(bytes(shutil.disk_usage(disk.path).free - 300_000))
    process.send_signal(signal.SIGCONT)
    told, _ = process.communicate(timeout=120)
    copied = shutil.copytree(run_dir, tmp_path / "copy")
    assert process.returncode == 1, told
    assert "no space left" in told.splitlines()[-1].lower()
    assert "Traceback" not in told
    newest = max(
        int(path.name) for path in (copied / "checkpoints").iterdir() if path.name.isdigit()
    )
    mainrun("resume", copied, f"training.max_steps={newest + 2}")
    assert next(e for e in events(copied) if e["event"] == "resumed")["step"] == newest


def test_dry_run_reports_and_leaves_nothing(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    told = mainrun("train", *tiny, "--dry-run", cwd=tmp_path).stdout
    assert "memory of a step" in told
    assert re.search(r"^attention +plain \((cpu|float32)\)$", told, re.MULTILINE)
    assert list(tmp_path.iterdir()) == []


def test_a_run_records_how_attention_is_computed(finished_run: Path) -> None:
    started = next(e for e in events(finished_run) if e["event"] == "run_started")
    assert started["attention"] in ("plain (cpu)", "plain (float32)")


@pytest.mark.slow
def test_accumulation_changes_no_number_of_a_run(
    tmp_path: Path, tiny: list[str], finished_run: Path, mainrun: Mainrun
) -> None:
    """Dropout included: its keys belong to examples, not to micro-batches."""
    mainrun("train", *tiny, "training.grad_accumulation=4", "--run-dir", tmp_path / "run")
    ours, theirs = (metrics(events(d)) for d in (tmp_path / "run", finished_run))
    for mine, other in zip(ours, theirs, strict=True):
        for name in ("train/loss", "val/loss"):
            # float32 sums in another order, after up to 40 steps
            assert mine.get(name) == pytest.approx(other.get(name), abs=2e-5)
