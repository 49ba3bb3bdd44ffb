"""A sweep: every trial told, none twice; killed, stopped and gone on it ends the same.

The trials are real ones of a tiny model, a few steps each.
"""

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import jax
import pytest
import yaml

from mainrun import config, sweep_details
from mainrun.errors import RunFailed, UserError
from mainrun.population.places import Places
from mainrun.record import WALL_CLOCK, metrics, read_events
from mainrun.sweep import start as sweep
from mainrun.sweep import sweep_file, sweep_folder, wandb_sweep, worker
from mainrun.sweep.study import Study
from tests.conftest import COMMAND, REPOSITORY
from tests.wandb_server import WandbServer

FEW_STEPS = ["training.max_steps=4", "training.evals_per_epoch=0", "training.num_samples=0",
             "training.divergence.action=stop"]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the config that all trials are made of."""
    monkeypatch.chdir(tmp_path)
    base = config.load(REPOSITORY / "config" / "base" / "quickstart.yaml", [*tiny, *FEW_STEPS])
    (tmp_path / "tiny.yaml").write_text(config.to_yaml(base))
    return tmp_path


def write(folder: Path, parameters: dict[str, Any], **more: Any) -> Path:
    """A sweep file: a list is values, anything else is a constant."""
    path = folder / "search.yaml"
    said = {
        "method": "grid",
        "parameters": {
            name: {"values": value} if isinstance(value, list) else {"value": value}
            for name, value in parameters.items()
        },
        "command": ["mainrun", "train", str(folder / "tiny.yaml"), "${args_no_hyphens}"],
    }
    path.write_text(yaml.safe_dump({**said, **more}, sort_keys=False))
    return path


def summary(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "summary.json").read_text())


def rows(run_dir: Path) -> list[dict[str, str]]:
    with (run_dir / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def statuses(run_dir: Path) -> list[str]:
    return [row["status"] for row in rows(run_dir)]


def losses(run_dir: Path) -> list[float]:
    return [row["val/loss"] for row in numbers(run_dir) if "val/loss" in row]


def numbers(run_dir: Path) -> list[dict[str, float]]:
    """All that the record says of a run, but for what a clock decides."""
    return [
        {name: value for name, value in row.items() if not name.startswith(WALL_CLOCK)}
        for row in metrics(read_events(run_dir / "events.jsonl"))
    ]


# -------------------------------------------------------------------------------------------
# What a sweep comes to


def test_a_sweep_tells_every_trial_and_ranks_them(folder: Path, capfd: pytest.CaptureFixture[str]):
    rates = [0.001, 0.03, 0.01]
    file = write(folder, {"optimizer.learning_rate": rates, "model.dropout": 0.2})
    sweep.run(file, ["data.context_length=8"], run_dir=Path("runs/first"))
    run_dir = Path("runs/first")
    trials = [run_dir / "trials" / f"trial-00{number}" for number in (1, 2, 3)]
    for trial, rate in zip(trials, rates, strict=True):
        trained = config.load(trial / "config.yaml")
        assert (trained.optimizer.learning_rate, trained.model.dropout) == (rate, 0.2)
        assert trained.data.context_length == 8
    found = [min(losses(trial)) for trial in trials]
    order = sorted(range(3), key=found.__getitem__)

    told = summary(run_dir)
    assert (told["status"], told["reason"], told["resume_command"]) == ("finished", None, None)
    assert told["trials"] == {
        "wanted": 3, "finished": 3, "pruned": 0, "failed": 0, "refused": 0, "running": 0,
    }  # fmt: skip
    best = told["best"]
    assert (best["trial"], best["value"]) == (order[0] + 1, found[order[0]])
    assert best["overrides"] == [f"optimizer.learning_rate={rates[order[0]]}", "model.dropout=0.2"]
    assert best["run_dir"] == str(trials[order[0]])
    assert [float(row["val/loss"]) for row in rows(run_dir)] == found
    page = (run_dir / "summary.md").read_text()
    assert sweep_details.markdown(told) == page, "the host makes a job's page of it"
    ranked = re.findall(r"^\| (\d) \| [\d.]+ ± ", page, re.MULTILINE)
    assert ranked == [str(place + 1) for place in order]
    assert "mainrun train runs/first/best.yaml" in page

    shown = capfd.readouterr()
    assert "search: grid of 3 points over 1 settings, 3 trials, minimize val/loss" in shown.err
    assert "trial 1: optimizer.learning_rate=0.001 → val/loss" in shown.err
    assert shown.err.count("compiling the training step") == 1, "they share it"
    assert shown.out.startswith("finished: 3 of 3 trials in ")


@pytest.mark.slow
def test_the_best_trial_is_a_config_of_its_own(folder: Path):
    file = write(folder, {"seed": [7], "optimizer.kind": "sgd", "model.dropout": 0.3})
    sweep.run(file, ["training.batch_size=4"], run_dir=folder / "a")
    moved = (folder / "a").rename(folder / "elsewhere")
    best = config.load(moved / "best.yaml")
    words = ["training.batch_size=4", "seed=7", "optimizer.kind=sgd", "model.dropout=0.3"]
    assert best == config.load(folder / "tiny.yaml", words)


@pytest.mark.slow
def test_the_goal_decides_what_is_best_and_the_folder_has_a_name(folder: Path):
    file = write(folder, {"optimizer.learning_rate": [0.01, 0.03]},
                 metric={"goal": "maximize", "name": "val/loss"})  # fmt: skip
    for _ in range(2):
        sweep.run(file, count=1)
    made = sorted(Path("runs").iterdir())
    assert all(re.fullmatch(r"\d{8}-\d{6}-search(-2)?", path.name) for path in made)
    assert len(made) == 2
    assert summary(made[0])["best"]["value"] == max(losses(made[0] / "trials" / "trial-001"))


@pytest.mark.slow
def test_count_and_run_cap_end_a_sweep(folder: Path):
    file = write(folder, {"seed": [1, 2, 3, 4]}, run_cap=3)
    sweep.run(file, run_dir=folder / "a", count=1)
    assert len(rows(folder / "a")) == 1
    sweep.run(file, run_dir=folder / "a")  # as many as were asked for before
    assert len(rows(folder / "a")) == 1
    sweep.run(folder / "a", count=9)
    assert len(rows(folder / "a")) == 3


# -------------------------------------------------------------------------------------------
# Trials that come to nothing


@pytest.mark.slow
def test_failures_are_told_with_their_reason_and_the_sweep_goes_on(folder: Path, corpus: Path):
    sources = [f"file:{corpus}", "file:absent.txt"]
    file = write(folder, {"data.source": sources, "optimizer.learning_rate": [1e25, 0.01]})
    sweep.run(file, run_dir=folder / "a", count=3)
    told = summary(folder / "a")
    assert statuses(folder / "a") == ["failed", "finished", "failed"]
    assert (told["status"], told["best"]["trial"]) == ("finished", 2)
    first, third = told["failures"]
    assert "training diverged" in first["reason"]
    assert "absent.txt" in third["reason"]
    assert "| 1 | failed |" in (folder / "a" / "summary.md").read_text()
    assert "failed" in logged_events(folder / "a" / "trials" / "trial-001")


@pytest.mark.slow
def test_three_failures_in_a_row_stop_a_sweep_and_it_can_go_on(folder: Path):
    file = write(folder, {"optimizer.learning_rate": [0.01, 1e25, 1e26, 1e27, 0.02]})
    with pytest.raises(RunFailed, match=r"3 trials in a row failed, the last: .*diverged"):
        sweep.run(file, run_dir=folder / "a")
    told = summary(folder / "a")
    assert told["status"] == "failed"
    assert told["reason"].startswith("3 trials in a row failed")
    assert told["resume_command"] == f"mainrun sweep {folder / 'a'}"
    sweep.run(folder / "a")
    assert statuses(folder / "a") == ["finished", *["failed"] * 3, "finished"]


def test_a_sweep_without_any_result_has_failed(folder: Path):
    with pytest.raises(RunFailed, match=r"no trial came to an end, the last: .*absent"):
        sweep.run(write(folder, {"data.source": ["file:absent.txt"]}), run_dir=folder / "a")
    assert not (folder / "a" / "best.yaml").exists()


@pytest.mark.slow
def test_combinations_that_no_model_can_have_are_refused_and_do_not_count(
    folder: Path, capfd: pytest.CaptureFixture[str]
):
    """Width 24 with 5 or 7 heads, 35 with 6: three of six points, in a row, which stops nothing."""
    parameters = {"model.d_model": [24, 35], "model.attention.num_heads": [6, 5, 7]}
    sweep.run(write(folder, parameters), run_dir=folder / "a", count=2)
    assert statuses(folder / "a") == ["finished", "refused", "refused", "refused", "finished"]
    reason = "model.d_model=24 is not divisible by model.attention.num_heads=5"
    assert summary(folder / "a")["failures"][0]["reason"] == reason
    assert not (folder / "a" / "trials" / "trial-002").exists()
    assert "grid of 6 points (3 of them impossible: model.d_model=" in capfd.readouterr().err
    sweep.run(folder / "a", count=9)
    assert statuses(folder / "a")[5:] == ["finished"]


@pytest.mark.slow
@pytest.mark.parametrize("population", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_trials_that_fall_behind_are_pruned_where_the_file_says_so(folder: Path, population: int):
    """At the first evaluation after the start, of two that are compared one goes on."""
    file = write(
        folder,
        {"optimizer.learning_rate": [0.03, 1e-6, 1e-7]},
        early_terminate={"type": "hyperband", "min_iter": 2, "eta": 2},
    )
    more = ["training.max_steps=40", "training.evals_per_epoch=5"]
    sweep.run(file, more, run_dir=Path("a"), population=population)
    assert statuses(Path("a")) == ["finished", "pruned", "pruned"]
    told = summary(Path("a"))
    assert (told["best"]["trial"], told["trials"]["pruned"]) == (1, 2)
    pruned = Path("a/trials/trial-002")
    assert len(losses(pruned)) == 2
    assert rows(Path("a"))[1]["reason"].startswith("pruned at evaluation 2: 1 of the 1 other")
    assert logged_events(pruned)[-1] == "stopped"
    assert json.loads((pruned / "summary.json").read_text())["reason"].startswith("pruned")


# -------------------------------------------------------------------------------------------
# Side by side


@pytest.mark.parametrize(
    ("text", "ended"),
    [("", False), ("null", False), ("{}", False), ('{"status": "stopped"}', False),
     ('{"status": "finished"}', True)],
)  # fmt: skip
def test_a_sweep_at_wandb_whose_summary_is_damaged_has_not_ended(
    tmp_path: Path, text: str, ended: bool
):
    (tmp_path / "summary.json").write_text(text)
    assert wandb_sweep._came_to_its_end(tmp_path) == ended


@pytest.mark.slow
def test_trials_side_by_side_end_as_they_would_alone(folder: Path):
    """Five in three places: a place that is left is taken by the next."""
    parameters = {
        "optimizer.learning_rate": [0.001, 0.03],
        "model.dropout": [0.0, 0.3],
        "training.max_steps": [3, 7],
    }
    file = write(folder, parameters)
    sweep.run(file, run_dir=Path("alone"), count=5, population=1)
    sweep.run(file, run_dir=Path("together"), count=5, population=3)
    for number in range(1, 6):
        one, other = (Path(f) / "trials" / f"trial-00{number}" for f in ("alone", "together"))
        assert [row["step"] for row in numbers(one)] == [row["step"] for row in numbers(other)]
        for a, b in zip(numbers(one), numbers(other), strict=True):
            assert a.keys() == b.keys()
            # float32, summed in another order
            assert a == pytest.approx(b, rel=2e-5, abs=1e-6)
    assert "3 trials train side by side" in (folder / "together" / "worker.log").read_text()


@pytest.mark.slow
def test_trials_that_run_out_of_memory_together_go_on_fewer_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    """The device's error is made up, once; all else is as it is."""
    file = write(folder, {"optimizer.learning_rate": [0.001, 0.003, 0.01, 0.03]})
    space = sweep_file.read(file)
    made = sweep_folder.open_folder(file, space, Path("a"))
    study = Study(made.folder, space, made.base.seed)
    study.want(4)
    study.close()
    take, taken = Places.take, []

    def full(self: Places, feeds: dict, steps: int) -> dict:
        taken.append(len(self))
        if taken.count(4) == 2 and len(self) == 4:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")
        return take(self, feeds, steps)

    monkeypatch.setattr(Places, "take", full)
    now = datetime.now().isoformat()
    assert worker.main(["a", "--name", "w", "--since", now, "--population", "4"]) == 0
    assert statuses(Path("a")) == ["finished"] * 4
    assert set(taken) == {4, 2}
    shown = capfd.readouterr().err
    assert "out of memory: RESOURCE_EXHAUSTED" in shown
    assert "its 4 trials go on 2 at a time" in shown
    first = Path("a/trials/trial-001")
    assert logged_events(first).count("failed") == 1, "its record says what happened"
    assert json.loads((first / "summary.json").read_text())["status"] == "finished"


# -------------------------------------------------------------------------------------------
# Stopped, killed, gone on


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


def logged_events(run_dir: Path) -> list[str]:
    return [event["event"] for event in read_events(run_dir / "events.jsonl")]


def logged(run_dir: Path, event: str) -> int:
    path = run_dir / "events.jsonl"
    return path.read_bytes().count(f'"event": "{event}"'.encode()) if path.is_file() else 0


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


@pytest.mark.slow
def test_a_worker_that_is_killed_takes_one_trial_with_it(
    folder: Path, processes: list[subprocess.Popen]
):
    file = write(folder, {"training.max_steps": [100_000, 3]})
    processes.append(start([*COMMAND, "sweep", str(file), "--run-dir", "a"], cwd=folder))
    wait_until(processes[0], lambda: logged(folder / "a/trials/trial-001", "train_step") >= 3)
    for child in children(processes[0].pid):
        os.kill(child, signal.SIGKILL)
    shown, _ = processes[0].communicate(timeout=120)
    assert processes[0].returncode == 0, shown
    assert statuses(folder / "a") == ["failed", "finished"]
    reason = summary(folder / "a")["failures"][0]["reason"]
    assert reason == "killed by SIGKILL: the machine may be out of memory"


def test_a_trial_that_ended_behind_the_back_of_its_sweep_has_its_views(
    folder: Path, finished_run: Path
):
    """Its worker was killed between the run's last word and the sweep's."""
    file = write(folder, {"training.max_steps": [3]})
    made = sweep_folder.open_folder(file, sweep_file.read(file), Path("a"))
    study = Study(made.folder, made.space, made.base.seed)
    study.want(1)
    trial = study.begin()
    assert trial is not None
    study.close()
    run_dir = shutil.copytree(finished_run, made.run_dir(trial))
    for name in ("summary.json", "metrics.csv"):
        (run_dir / name).unlink()
    sweep.run(Path("a"))
    assert statuses(Path("a")) == ["finished"]
    assert summary(run_dir)["status"] == "finished"
    assert (run_dir / "metrics.csv").is_file()


@pytest.mark.slow
def test_a_killed_sweep_takes_its_worker_along_and_the_next_one_waits_for_it(
    folder: Path, processes: list[subprocess.Popen]
):
    """Nobody else works on a trial as long as the process that has it lives."""
    file = write(folder, {"training.max_steps": [200_000, 3]})
    command = [*COMMAND, "sweep", str(file), "--run-dir", "a"]
    trial = folder / "a" / "trials" / "trial-001"
    processes.append(start(command, cwd=folder))
    wait_until(processes[0], lambda: logged(trial, "train_step") >= 3)
    (worker,) = children(processes[0].pid)
    os.kill(worker, signal.SIGSTOP)
    processes[0].kill()
    processes.append(start(command, cwd=folder))
    assert processes[1].stdout is not None
    shown = iter(processes[1].stdout.readline, "")
    assert any("waiting for a process that still works on a/worker" in line for line in shown)
    os.kill(worker, signal.SIGCONT)
    wait_until(processes[1], lambda: logged(trial, "resumed") == 1)
    assert logged(trial, "stopped") == 1, "SIGTERM came from the kernel"
    processes[1].send_signal(signal.SIGTERM)
    rest, _ = processes[1].communicate(timeout=60)
    assert processes[1].returncode == 75, rest
    assert statuses(folder / "a") == ["running"]


@pytest.mark.slow
def test_two_processes_share_the_trials_of_one_sweep(
    folder: Path, processes: list[subprocess.Popen]
):
    file = write(folder, {"seed": list(range(1, 7)), "training.max_steps": 30})
    command = [*COMMAND, "sweep", str(file), "--run-dir", "a"]
    processes.append(start(command, cwd=folder))
    wait_until(processes[0], (folder / "a" / "worker.log").exists)
    processes.append(start(command, cwd=folder))
    for process in processes:
        shown, _ = process.communicate(timeout=200)
        assert process.returncode == 0, shown
        assert "finished: 6 of 6 trials" in shown
    assert [row["seed"] for row in rows(folder / "a")] == ["1", "2", "3", "4", "5", "6"]
    logs = [(folder / "a" / name).read_text() for name in ("worker.log", "worker-2.log")]
    ran = [re.findall(r"^trial (\d): seed=\d$", log, re.MULTILINE) for log in logs]
    assert sorted(ran[0] + ran[1]) == ["1", "2", "3", "4", "5", "6"], "each once"
    for trial in (folder / "a" / "trials").glob("trial-*"):
        assert logged_events(trial)[-1] == "finished"


@pytest.mark.slow
def test_a_trial_that_finished_unnoticed_is_not_trained_again(folder: Path):
    """The worker died between the trial's end and writing it down."""
    sweep.run(write(folder, {"seed": [4, 3]}), run_dir=folder / "a", count=1)
    study = Study(folder / "a", sweep_folder.load(folder / "a").space, 1337)
    study.want(2)
    begun = study.begin()
    assert begun is not None
    assert begun.number == 2
    study.close()
    shutil.copytree(folder / "a/trials/trial-001", folder / "a/trials/trial-002")
    sweep.run(folder / "a", count=2)
    assert logged(folder / "a/trials/trial-002", "resumed") == 0
    assert rows(folder / "a")[1]["val/loss"] == rows(folder / "a")[0]["val/loss"]


# -------------------------------------------------------------------------------------------
# The user's mistakes


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        sweep.run(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.slow
def test_another_search_never_goes_on_in_the_folder_of_the_first(folder: Path):
    sweep.run(write(folder, {"seed": [4, 3]}), run_dir=Path("a"), count=1)
    before = (folder / "a" / "study.journal").read_bytes()
    other = write(folder, {"seed": [4, 2]})
    assert "searches another space than" in refused(other, run_dir=Path("a"))
    same = write(folder, {"seed": [4, 3]})
    text = refused(same, ["model.dropout=0"], run_dir=Path("a"))
    assert "a varies another config: `model.dropout` differs: go on with `mainrun sweep a`" in text
    assert "the settings of a are made and cannot change" in refused(Path("a"), ["seed=1"])
    assert "it goes on there" in refused(Path("a"), run_dir=Path("b"))
    assert "a was begun with local" in refused(Path("a"), backend="wandb")
    assert "a was begun with local" in refused(same, backend="wandb", run_dir=Path("a"))
    (folder / "a" / "sweep.yaml").write_text(
        (folder / "a" / "sweep.yaml").read_text().replace("- 3", "- 5")
    )
    text = refused(Path("a"))
    assert "study.journal is the study of another search space: move it away" in text
    assert (folder / "a" / "study.journal").read_bytes() == before


@pytest.mark.slow
def test_a_damaged_study_is_told_and_kept(folder: Path):
    sweep.run(write(folder, {"seed": [4, 3]}), run_dir=folder / "a", count=1)
    (folder / "a" / "study.journal").write_text("rubbish\n")
    with pytest.raises(RunFailed, match=r"study\.journal:1: damaged"):
        sweep.run(folder / "a", count=2)
    assert (folder / "a" / "study.journal").read_text() == "rubbish\n"


def test_what_cannot_be_run_is_refused_before_a_folder_is_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(folder))
    grid = write(folder, {"seed": [1]})
    assert "leave out --backend local" in refused(grid, sweep_id="e/p/i", backend="local")
    assert "no Weights & Biases key is found" in refused(grid, backend="wandb")
    assert "no Weights & Biases key is found" in refused(grid, sweep_id="e/p/i")
    offline = refused(grid, ["tracking.wandb=offline"], backend="wandb")
    assert "tracking.wandb=offline: a sweep at Weights & Biases is online" in offline
    assert "cannot change" not in refused(grid, ["model.dropout=2"])
    assert "mesh.fsdp=2: a sweep trains each" in refused(grid, ["mesh.fsdp=2"])
    endless = write(folder, {"seed": [1]}, method="random")
    assert "how many trials? say --count N" in refused(endless)
    assert "is no sweep folder" in refused(folder)
    (folder / "b").mkdir()
    assert "b is no sweep folder" in refused(grid, run_dir=Path("b"))
    assert not (folder / "runs").exists()


def test_who_looks_after_the_worker_never_imports_jax():
    """The trials need the GPU, and its memory."""
    ask = "import sys, mainrun.sweep.local_sweep; print({'jax', 'wandb'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


# -------------------------------------------------------------------------------------------
# Against an undisturbed run


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


@pytest.mark.slow
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
    for child in children(processes[1].pid):
        os.kill(child, signal.SIGKILL)
    processes[1].kill()
    processes[1].communicate()
    assert logged(trial, "finished") == 0

    subprocess.run([*COMMAND, "sweep", str(folder)], check=True, capture_output=True)
    assert logged(trial, "resumed") == 2
    assert numbers(trial) == numbers(finished_run)
    best = min(row["val/loss"] for row in numbers(finished_run) if "val/loss" in row)
    assert summary(folder)["best"]["value"] == best


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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_trial_that_the_server_stops_is_saved_and_the_next_one_runs(
    tmp_path: Path, online: Callable[..., subprocess.Popen[str]]
):
    chosen = [
        {"optimizer.learning_rate": 0.02, "training.max_steps": 1_000_000},
        {"optimizer.learning_rate": 0.01},
    ]
    with WandbServer(chosen) as server:
        process = online(server, "--run-dir", "a", "--count", "2")
        trials = tmp_path / "a" / "trials"
        wait_until(process, lambda: any(logged(p, "train_step") >= 3 for p in trials.glob("*")))
        server.stopping.add("trial1")
        shown, _ = process.communicate(timeout=300)
        assert process.returncode == 0, shown
    first, second = rows(tmp_path / "a")
    assert (first["status"], second["status"]) == ("pruned", "finished")
    assert first["reason"].startswith("stopped by Weights & Biases")
    stopped = tmp_path / first["run_dir"]
    assert logged_events(stopped)[-1] == "stopped"
    assert any((stopped / "checkpoints").iterdir())
    assert (server.runs["trial1"].exit_code, server.runs["trial2"].exit_code) == (75, 0)
    assert summary(tmp_path / "a")["best"]["trial"] == 2
