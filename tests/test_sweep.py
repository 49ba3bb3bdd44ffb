"""A sweep: every trial told, none twice; killed, stopped and gone on it ends the same.

Where the trial itself does not matter it is a program of a few lines that leaves a record as a run
does; what a real one must keep is tried with real ones, at the end.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mainrun import config
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.record import WALL_CLOCK, metrics, read_events
from mainrun.sweep import local_sweep, sweep_folder
from mainrun.sweep import start as sweep
from mainrun.sweep.study import Study
from tests.conftest import COMMAND, REPOSITORY
from tests.wandb_server import WandbServer

# `train` and `resume` as a sweep sees them. The seed of a trial says how it ends.
TRIAL = """
import json, os, signal, sys, time
from pathlib import Path

verb, where, *words = sys.argv[1:]
run_dir = Path(where if verb == "resume" else words.pop())
with Path("ran").open("a") as ran:
    ran.write(f"{verb} {run_dir.name}\\n")
seed = int((run_dir / "seed").read_text() if verb == "resume" else
           dict(word.split("=") for word in words if "=" in word)["seed"])

def log(event, **fields):
    with (run_dir / "events.jsonl").open("a") as file:
        told = {"event": event, "timestamp": "2026-11-23T05:00:00+00:00", **fields}
        file.write(json.dumps(told) + "\\n")

def evaluation(step, loss):
    log("evaluation", step=step, **{"val/loss": loss, "val/loss_stderr": 0.25})

if seed == 102:
    sys.exit(print("mainrun: no such data: file:absent.txt") or 2)
run_dir.mkdir(exist_ok=True)
(run_dir / "seed").write_text(str(seed))
(run_dir / "words").write_text(json.dumps(words))
log("tracking_started", wandb="disabled")
if seed == 101:
    log("failed", reason="loss is NaN at step 3")
    sys.exit(print("mainrun: failed: loss is NaN at step 3") or 1)
if seed == 103:
    os.kill(os.getpid(), signal.SIGKILL)
if seed == 104:
    evaluation(0, "NaN")
    log("finished")
    sys.exit()
if seed == 105 and verb == "train":
    received = []
    signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    Path("waiting").touch()
    if "to_parent" in os.environ.get("TRIAL", ""):
        os.kill(os.getppid(), signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGINT)
    while not received:
        signal.pause()
    while "slow" in os.environ.get("TRIAL", "") and not Path("let go").exists():
        time.sleep(0.005)
    log("stopped", resume_command="mainrun resume there")
    sys.exit(75)
evaluation(0, 9.0)
evaluation(4, seed / 10)
evaluation(8, seed / 10 + 1)
log("finished")
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory where trials are the program above."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(local_sweep, "MAINRUN", (sys.executable, "-c", TRIAL))
    return tmp_path


def write(folder: Path, seeds: list[int], head: str = "method: grid", more: str = "") -> Path:
    path = folder / "seeds.yaml"
    path.write_text(
        f"{head}\nparameters:\n  seed: {{values: {seeds}}}\n{textwrap.indent(more, '  ')}\n"
    )
    return path


def ran(folder: Path) -> list[str]:
    return (folder / "ran").read_text().splitlines()


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# -------------------------------------------------------------------------------------------
# What a sweep comes to


def test_a_sweep_tells_every_trial_and_ranks_them(folder: Path, capfd: pytest.CaptureFixture[str]):
    file = write(folder, [7, 3, 5], more="model.dropout: {value: 0.2}")
    sweep.run(file, ["data.context_length=32"], run_dir=Path("runs/first"))
    run_dir = folder / "runs" / "first"
    assert ran(folder) == ["train trial-001", "train trial-002", "train trial-003"]
    words = json.loads((run_dir / "trials" / "trial-002" / "words").read_text())
    assert words == ["seed=3", "model.dropout=0.2", "--run-dir"]

    told = summary(run_dir)
    assert (told["status"], told["reason"], told["resume_command"]) == ("finished", None, None)
    assert told["trials"] == {"wanted": 3, "finished": 3, "failed": 0, "refused": 0, "running": 0}
    assert told["best"] == {
        "trial": 2,
        "value": 0.3,  # the best of the run, at step 4; its last is 1.3
        "stderr": 0.25,
        "step": 4,
        "overrides": ["seed=3", "model.dropout=0.2"],
        "run_dir": "runs/first/trials/trial-002",
    }
    assert [(r["trial"], r["status"], r["val/loss"], r["seed"]) for r in rows(run_dir)] == [
        ("1", "finished", "0.7", "7"), ("2", "finished", "0.3", "3"), ("3", "finished", "0.5", "5"),
    ]  # fmt: skip
    page = (run_dir / "summary.md").read_text()
    assert page.startswith("# first: finished\n\n`val/loss` **0.3 ± 0.25** in trial 2, the lowest.")
    ranked = re.findall(r"^\| (\d) \| ([^|]+) \|", page, re.MULTILINE)
    assert ranked == [("2", "0.3 ± 0.25"), ("3", "0.5 ± 0.25"), ("1", "0.7 ± 0.25")]
    assert "mainrun train runs/first/best.yaml" in page

    shown = capfd.readouterr()
    assert "seeds: grid of 3 points over 1 settings, 3 trials, minimize val/loss" in shown.err
    assert "trial 3/3: seed=5 → val/loss 0.5 ± 0.25 (best 0.3, trial 2)" in shown.err
    assert "trial 2/3: seed=3 → val/loss 0.3 ± 0.25 (the best so far)" in shown.err
    assert shown.out.startswith("finished: 3 of 3 trials in 00:00\nbest: val/loss 0.3 ± 0.25")


def test_the_best_trial_is_a_config_of_its_own(folder: Path):
    file = write(folder, [7, 3], more="optimizer.kind: {value: sgd}\nmodel.dropout: {value: 0.3}")
    sweep.run(file, ["training.batch_size=16"], run_dir=folder / "a")
    moved = (folder / "a").rename(folder / "elsewhere")
    best = config.load(moved / "best.yaml")
    quickstart = config.default_config_root() / "base" / "quickstart.yaml"
    words = ["training.batch_size=16", "seed=3", "optimizer.kind=sgd", "model.dropout=0.3"]
    assert best == config.load(quickstart, words)


def test_the_goal_decides_what_is_best(folder: Path):
    head = "method: grid\nmetric: {goal: maximize, name: val/loss}"
    sweep.run(write(folder, [7, 3], head), run_dir=folder / "a")
    assert summary(folder / "a")["best"]["trial"] == 1
    assert summary(folder / "a")["best"]["value"] == 9.0


def test_a_folder_of_its_own_is_made_where_none_is_named(folder: Path):
    for _ in range(2):
        sweep.run(write(folder, [1]))
    made = sorted(path.name for path in (folder / "runs").iterdir())
    assert len(made) == 2
    assert all(re.fullmatch(r"\d{8}-\d{6}-seeds(-2)?", name) for name in made)


def test_count_and_run_cap_end_a_sweep(folder: Path):
    file = write(folder, [1, 2, 3, 4], "method: grid\nrun_cap: 3")
    sweep.run(file, run_dir=folder / "a", count=2)
    assert len(rows(folder / "a")) == 2
    sweep.run(file, run_dir=folder / "a")  # as many as were asked for before
    assert len(rows(folder / "a")) == 2
    sweep.run(folder / "a", count=9)
    assert len(rows(folder / "a")) == 3


# -------------------------------------------------------------------------------------------
# Failures


def test_failures_are_told_with_their_reason_and_the_sweep_goes_on(folder: Path):
    sweep.run(write(folder, [101, 4, 103, 102, 2, 104]), run_dir=folder / "a")
    told = summary(folder / "a")
    assert told["status"] == "finished"
    assert told["best"]["value"] == 0.2
    assert {f["trial"]: f["reason"] for f in told["failures"]} == {
        1: "loss is NaN at step 3",
        3: "killed by SIGKILL: the machine may be out of memory",
        4: "no such data: file:absent.txt",
        6: "val/loss was never a number",
    }
    page = (folder / "a" / "summary.md").read_text()
    assert "| 3 | failed | seed\\=103 | killed by SIGKILL" in page


def test_three_failures_in_a_row_stop_a_sweep_and_it_can_go_on(folder: Path):
    file = write(folder, [5, 101, 102, 101, 6, 7])
    with pytest.raises(RunFailed, match=r"3 trials in a row failed, the last: loss is NaN"):
        sweep.run(file, run_dir=folder / "a")
    told = summary(folder / "a")
    assert told["status"] == "failed"
    assert told["reason"].startswith("3 trials in a row failed")
    assert told["resume_command"] == f"mainrun sweep {folder / 'a'}"
    sweep.run(folder / "a")
    assert [row["status"] for row in rows(folder / "a")] == ["finished", *["failed"] * 3,
                                                             "finished", "finished"]  # fmt: skip


def test_a_refusal_between_failures_is_no_success(folder: Path):
    more = "model.d_model: {values: [96, 90, 80]}\nmodel.attention.num_heads: {values: [6, 5]}"
    with pytest.raises(RunFailed, match="3 trials in a row failed"):
        sweep.run(write(folder, [101], more=more), run_dir=folder / "a")
    statuses = [row["status"] for row in rows(folder / "a")]
    assert statuses == ["failed", "refused", "failed", "failed"]


def test_a_sweep_without_any_result_has_failed(folder: Path):
    with pytest.raises(RunFailed, match="no trial came to an end, the last: no such data"):
        sweep.run(write(folder, [101, 102]), run_dir=folder / "a")
    assert not (folder / "a" / "best.yaml").exists()


def test_combinations_that_no_model_can_have_are_refused_without_a_process(folder: Path):
    """Width 96 with 5 heads, and so on: three of six points, in a row, which stops nothing."""
    more = "model.d_model: {values: [96, 105]}\nmodel.attention.num_heads: {values: [6, 5, 7]}"
    sweep.run(write(folder, [1], more=more), run_dir=folder / "a")
    assert [row["status"] for row in rows(folder / "a")] == [
        "finished", "refused", "refused", "refused", "finished", "finished",
    ]  # fmt: skip
    assert ran(folder) == ["train trial-001", "train trial-005", "train trial-006"]
    assert not (folder / "a" / "trials" / "trial-002.log").exists()
    first = summary(folder / "a")["failures"][0]
    assert first["reason"].startswith("model.d_model=96 is not divisible by model.attention.num")


# -------------------------------------------------------------------------------------------
# Stopped, killed, gone on


def test_a_stop_is_passed_on_once_and_the_next_call_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TRIAL", "to_parent")
    file = write(folder, [4, 105, 3])
    with pytest.raises(Stopped):
        sweep.run(file, run_dir=Path("a"))
    told = summary(folder / "a")
    assert (told["status"], told["resume_command"]) == ("stopped", "mainrun sweep a")
    assert (told["trials"]["finished"], told["trials"]["running"]) == (1, 1)
    assert "to go on: mainrun sweep a" in capfd.readouterr().out
    stopped = read_events(folder / "a" / "trials" / "trial-002" / "events.jsonl")
    assert [event["event"] for event in stopped].count("stopped") == 1

    sweep.run(file, run_dir=Path("a"))
    assert ran(folder) == [
        "train trial-001", "train trial-002", "resume trial-002", "train trial-003",
    ]  # fmt: skip
    assert summary(folder / "a")["status"] == "finished"
    assert [row["status"] for row in rows(folder / "a")] == ["finished"] * 3
    sweep.run(Path("a"))
    assert len(ran(folder)) == 4, "a finished sweep has nothing left to do"


# As a process of its own, whose trials are the program above.
SWEEP = f"""
import sys
from pathlib import Path
from mainrun import cli
from mainrun.sweep import local_sweep
local_sweep.MAINRUN = (sys.executable, "-c", {TRIAL!r})
sys.exit(cli.main(["sweep", *sys.argv[1:]]))
"""


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen]]:
    """Those of a test; none outlives it."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def start(command: list[str], **options: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def wait_until(process: subprocess.Popen, happened: Callable[[], bool]) -> None:
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)  # a poll; nothing depends on its length


def test_a_killed_sweep_takes_its_trial_along_and_the_next_one_waits_for_it(
    folder: Path, processes: list[subprocess.Popen]
):
    """The trial holds on to its log: as long as it lives, nobody else works on it."""
    file = write(folder, [4, 105, 3])
    command = [sys.executable, "-c", SWEEP, str(file), "--run-dir", "a"]
    slow = {**os.environ, "TRIAL": "slow"}
    processes.append(start(command, cwd=folder, env=slow))
    wait_until(processes[0], (folder / "waiting").exists)
    processes[0].kill()
    processes.append(start(command, cwd=folder, env=slow))
    assert processes[1].stdout is not None
    shown = iter(processes[1].stdout.readline, "")
    assert any("waiting for a process that still works on a/trials/trial-002" in s for s in shown)
    (folder / "let go").touch()
    rest, _ = processes[1].communicate(timeout=60)
    assert processes[1].returncode == 0, rest
    stopped = read_events(folder / "a" / "trials" / "trial-002" / "events.jsonl")
    assert "stopped" in [event["event"] for event in stopped], "SIGTERM came from the kernel"
    assert ran(folder)[1:] == ["train trial-002", "resume trial-002", "train trial-003"]
    assert [row["status"] for row in rows(folder / "a")] == ["finished"] * 3
    assert not list((folder / "a").rglob("*lock*"))


def test_a_trial_that_finished_unnoticed_is_not_trained_again(folder: Path):
    """The sweep died between the trial's end and writing it down."""
    sweep.run(write(folder, [4, 3]), run_dir=folder / "a", count=1)
    study = Study(folder / "a" / "study.journal", sweep_folder.load(folder / "a").space, 1337)
    assert study.begin().number == 2
    study.close()
    shutil.copytree(folder / "a/trials/trial-001", folder / "a/trials/trial-002")
    sweep.run(folder / "a", count=2)
    assert ran(folder) == ["train trial-001"]
    assert rows(folder / "a")[1]["val/loss"] == "0.4"


# -------------------------------------------------------------------------------------------
# The user's mistakes


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        sweep.run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_search_never_goes_on_in_the_folder_of_the_first(folder: Path):
    sweep.run(write(folder, [4, 3]), run_dir=Path("a"))
    before = (folder / "a" / "study.journal").read_bytes()
    assert "searches another space than" in refused(write(folder, [4, 2]), run_dir=Path("a"))
    same = write(folder, [4, 3])
    text = refused(same, ["model.dropout=0"], run_dir=Path("a"))
    assert "a varies another config: `model.dropout` differs: go on with `mainrun sweep a`" in text
    assert "the settings of a are made and cannot change" in refused(Path("a"), ["seed=1"])
    assert "it goes on there" in refused(Path("a"), run_dir=Path("b"))
    assert "a was begun with local" in refused(Path("a"), backend="wandb")
    assert "a was begun with local" in refused(same, backend="wandb", run_dir=Path("a"))
    assert (folder / "a" / "study.journal").read_bytes() == before


def test_two_sweeps_at_once_never_share_a_folder(folder: Path):
    sweep.run(write(folder, [4, 3]), run_dir=folder / "a", count=1)
    study = Study(folder / "a" / "study.journal", sweep_folder.load(folder / "a").space, 0)
    assert "is being worked on by another process" in refused(folder / "a", count=2)
    study.close()


def test_a_damaged_study_is_told_and_kept(folder: Path):
    sweep.run(write(folder, [4, 3]), run_dir=folder / "a", count=1)
    (folder / "a" / "study.journal").write_text("rubbish\n")
    with pytest.raises(RunFailed, match=r"study\.journal:1: damaged"):
        sweep.run(folder / "a", count=2)
    assert (folder / "a" / "study.journal").read_text() == "rubbish\n"


def test_what_cannot_be_run_is_refused_before_a_folder_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(folder))
    grid = write(folder, [1])
    assert "leave out --backend local" in refused(grid, sweep_id="e/p/i", backend="local")
    assert "no Weights & Biases key is found" in refused(grid, backend="wandb")
    assert "no Weights & Biases key is found" in refused(grid, sweep_id="e/p/i")
    offline = refused(grid, ["tracking.wandb=offline"], backend="wandb")
    assert "tracking.wandb=offline: a sweep at Weights & Biases is online" in offline
    assert "cannot change" not in refused(grid, ["model.dropout=2"])
    endless = write(folder, [1], "method: random")
    assert "how many trials? say --count N" in refused(endless)
    early = write(folder, [1], "method: grid\nearly_terminate: {type: hyperband, min_iter: 3}")
    assert "`early_terminate` is not supported yet" in refused(early)
    assert "is no sweep folder" in refused(folder)
    (folder / "b").mkdir()
    assert "b is no sweep folder" in refused(grid, run_dir=Path("b"))
    assert not (folder / "runs").exists()


def test_a_sweep_never_imports_jax():
    """The trials need the GPU, and its memory."""
    ask = "import sys, mainrun.sweep; print({'jax', 'wandb'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


# -------------------------------------------------------------------------------------------
# Real trials


@pytest.fixture
def real(tmp_path: Path, tiny: list[str]) -> list[str]:
    """The words of a sweep of one trial, whose settings are those of `finished_run`."""
    base = config.load(REPOSITORY / "config" / "base" / "quickstart.yaml", tiny)
    (tmp_path / "tiny.yaml").write_text(config.to_yaml(base))
    (tmp_path / "sweep.yaml").write_text(
        "method: random\nrun_cap: 2\n"
        "parameters:\n  optimizer.learning_rate: {values: [3e-3]}\n"
        f'command: [mainrun, train, {tmp_path / "tiny.yaml"}, "${{args_no_hyphens}}"]\n'
    )
    return [*COMMAND, "sweep", str(tmp_path / "sweep.yaml")]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """All that the record says of a run, but for what a clock decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith(WALL_CLOCK)}
        for row in metrics(read_events(run_dir / "events.jsonl"))
    ]


def logged(run_dir: Path, event: str) -> int:
    path = run_dir / "events.jsonl"
    return path.read_bytes().count(f'"event": "{event}"'.encode()) if path.is_file() else 0


def test_a_trial_stopped_and_then_killed_ends_with_the_numbers_of_an_undisturbed_run(
    tmp_path: Path, real: list[str], finished_run: Path, processes: list[subprocess.Popen]
):
    folder = tmp_path / "sweep"
    trial = folder / "trials" / "trial-001"

    # Ctrl-C ...
    processes.append(start([*real, "--count", "1", "--run-dir", str(folder)]))
    wait_until(processes[0], lambda: logged(trial, "train_step") >= 3)
    processes[0].send_signal(signal.SIGINT)
    shown, _ = processes[0].communicate(timeout=60)
    assert processes[0].returncode == 75, shown
    assert f"to go on: mainrun sweep {folder}" in shown
    assert logged(trial, "stopped") == 1

    # ... and then the whole machine dies.
    processes.append(start([*COMMAND, "sweep", str(folder)]))
    before = logged(trial, "checkpoint")
    wait_until(processes[1], lambda: logged(trial, "checkpoint") >= before + 2)
    processes[1].send_signal(signal.SIGSTOP)
    for child in _children(processes[1].pid):
        os.kill(child, signal.SIGKILL)
    processes[1].kill()
    processes[1].communicate()
    assert logged(trial, "finished") == 0

    subprocess.run([*COMMAND, "sweep", str(folder)], check=True, capture_output=True)
    assert logged(trial, "resumed") == 2
    assert numbers(trial) == numbers(finished_run)
    best = min(row["val/loss"] for row in numbers(finished_run) if "val/loss" in row)
    assert summary(folder)["best"]["value"] == best


def _children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


# -------------------------------------------------------------------------------------------
# Weights & Biases


@pytest.fixture
def online(tmp_path: Path, real: list[str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts the sweep at a server, with words added."""
    keep = {n: v for n, v in os.environ.items() if not n.startswith("WANDB_") and n != "NETRC"}

    def begin(server: WandbServer, *words: str) -> subprocess.Popen[str]:
        environment = {
            **keep,
            "HOME": str(tmp_path),
            "WANDB_BASE_URL": server.url,
            "WANDB_API_KEY": "k" * 40,
            "WANDB_ERROR_REPORTING": "false",
        }
        return start([*real, "--backend", "wandb", *words], env=environment, cwd=tmp_path)

    return begin


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_real_agent_of_wandb_runs_the_trials_that_the_server_chooses(
    tmp_path: Path, online: Callable[..., subprocess.Popen[str]]
):
    chosen = [{"optimizer.learning_rate": 0.02}, {"optimizer.learning_rate": 1e-06}]
    with WandbServer(chosen) as server:
        process = online(server, "--run-dir", "runs/at-wandb", "--count", "2")
        shown, _ = process.communicate(timeout=300)
        assert process.returncode == 0, shown
        registered = yaml.safe_load(server.sweeps["sweep1"])
        joined = online(server, "--id", "me/mainrun/sweep1", "--count", "1", "--run-dir", "b")
        shown, _ = joined.communicate(timeout=300)
        assert joined.returncode == 1, shown
        assert "no trial came to an end" in shown  # the server has none left
        missing = online(server, "--id", "me/mainrun/absent")
        shown, _ = missing.communicate(timeout=300)
        assert missing.returncode == 2, shown
        assert "Weights & Biases has no sweep me/mainrun/absent" in shown.splitlines()[-1]
    assert registered["parameters"] == {"optimizer.learning_rate": {"values": [0.003]}}
    assert registered["command"][-2:] == ["tracking.wandb=online", "${args_no_hyphens}"]

    run_dir = tmp_path / "runs" / "at-wandb"
    told = summary(run_dir)
    assert (told["status"], told["best"]["trial"]) == ("finished", 1)
    assert told["wandb"]["url"] == f"{server.url}/me/mainrun/sweeps/sweep1"
    assert [row["optimizer.learning_rate"] for row in rows(run_dir)] == ["0.02", "1e-06"]
    for row, name in zip(rows(run_dir), ("trial1", "trial2"), strict=True):
        at_wandb = server.runs[name]
        trained = numbers(tmp_path / row["run_dir"])
        assert (at_wandb.sweep, at_wandb.exit_code) == ("sweep1", 0)
        assert at_wandb.config["optimizer"]["learning_rate"] == float(
            row["optimizer.learning_rate"]
        )
        losses = [point["val/loss"] for point in at_wandb.history if "val/loss" in point]
        assert losses == [point["val/loss"] for point in trained if "val/loss" in point]
        assert min(losses) == pytest.approx(float(row["val/loss"]))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_sweep_at_wandb_goes_on_with_its_own_trial_first(
    tmp_path: Path, online: Callable[..., subprocess.Popen[str]]
):
    with WandbServer([{"optimizer.learning_rate": 0.02}]) as server:
        process = online(server, "--run-dir", "a", "--count", "1", "training.max_steps=400")
        trials = tmp_path / "a" / "trials"
        wait_until(process, lambda: any(logged(p, "train_step") >= 3 for p in trials.glob("*")))
        process.send_signal(signal.SIGTERM)
        shown, _ = process.communicate(timeout=200)
        assert process.returncode == 75, shown
        assert summary(tmp_path / "a")["trials"]["running"] == 1
        process = online(server, "--run-dir", "a", "--count", "1", "training.max_steps=400")
        shown, _ = process.communicate(timeout=200)
        assert process.returncode == 0, shown
    (trial,) = rows(tmp_path / "a")
    assert trial["status"] == "finished"
    assert logged(tmp_path / trial["run_dir"], "resumed") == 1
    assert list(server.runs) == ["trial1"], "it is one run at Weights & Biases"
    assert server.runs["trial1"].exit_code == 0
