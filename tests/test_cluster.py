"""Two processes train one run, as on two machines: one curve, one folder, one end."""

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mainrun.record import read_events
from tests.conftest import COMMAND, Mainrun
from tests.test_mesh import curve
from tests.test_run import events, wait_until


def pair(*arguments: object, others: tuple[object, ...] | None = None) -> list[subprocess.Popen]:
    """The same command twice, as two processes of one run; or another for the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    return [
        subprocess.Popen(
            [*COMMAND, *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | own | {"JAX_PROCESS_ID": str(number)},
        )
        for number, words in enumerate((arguments, others or arguments))
    ]


def end(processes: list[subprocess.Popen]) -> list[str]:
    """What both said; neither is left behind."""
    try:
        return [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_the_first_alone_tells(
    tmp_path: Path, tiny: list[str], finished_run: Path
) -> None:
    run_dir = tmp_path / "run"
    processes = pair("train", *tiny, "mesh.data=1", "mesh.fsdp=2", "--run-dir", run_dir)
    first, second = end(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    assert "val/loss" in first
    assert not [line for line in second.splitlines() if line and "Gloo" not in line]
    for event, name, atol in (("train_step", "train/loss", 1e-4), ("evaluation", "val/loss", 1e-6)):
        np.testing.assert_allclose(
            curve(run_dir, event, name), curve(finished_run, event, name), rtol=0, atol=atol
        )
    texts = [[e["texts"] for e in events(d) if e["event"] == "samples"]
             for d in (run_dir, finished_run)]  # fmt: skip
    assert len(texts[0]) == len(texts[1])


@pytest.mark.slow
def test_one_is_killed_the_other_says_so_and_both_go_on(
    tmp_path: Path, tiny: list[str], mainrun: Mainrun
) -> None:
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    processes = pair("train", *tiny, "training.max_steps=200", "--run-dir", run_dir)
    assert wait_until(processes[0], lambda: (run_dir / "checkpoints" / "6").is_dir())
    processes[1].kill()
    first, _ = end(processes)
    assert processes[0].returncode == 1
    assert "another process of this run has ended" in first.splitlines()[-1]
    assert [e["event"] for e in events(run_dir)][-1] == "failed"

    processes = pair("resume", run_dir)
    first, second = end(processes)
    assert [process.returncode for process in processes] == [0, 0], first + second
    mainrun("train", *tiny, "training.max_steps=200", "--run-dir", whole)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    ours, theirs = (curve(d, "evaluation", "val/loss")[-1] for d in (run_dir, whole))
    assert ours == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
def test_a_stop_signal_to_any_of_them_stops_all_at_one_step(
    tmp_path: Path, tiny: list[str]
) -> None:
    run_dir = tmp_path / "run"
    processes = pair("train", *tiny, "training.max_steps=100000", "--run-dir", run_dir)
    assert wait_until(processes[0], lambda: len(events(run_dir)) > 12)
    processes[1].send_signal(signal.SIGTERM)
    told = end(processes)
    assert [process.returncode for process in processes] == [75, 75], told
    found = read_events(run_dir / "events.jsonl")
    last_step = [e["step"] for e in found if e["event"] == "train_step"][-1]
    assert (run_dir / "checkpoints" / str(last_step)).is_dir()
    assert found[-1]["event"] == "stopped"


@pytest.mark.slow
def test_processes_that_read_other_data_are_told(tmp_path: Path, tiny: list[str]) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Some other document\n" * 300)
    first = ("train", *tiny, "--run-dir", tmp_path / "run")
    processes = pair(*first, others=(*first[:-2], f"data.source=file:{other}", *first[-2:]))
    told = end(processes)
    assert processes[1].returncode == 2
    assert "process 1 reads other files than the first one" in told[1].splitlines()[-1]
    assert processes[0].returncode != 0


def test_who_cannot_meet_is_told_how(tiny: list[str], mainrun: Mainrun) -> None:
    lonely = {"env": os.environ | {"JAX_COORDINATOR_ADDRESS": "127.0.0.1:1"}}
    told = mainrun("train", *tiny, code=2, **lonely).stderr
    assert "each needs JAX_COORDINATOR_ADDRESS (host:port of the first), JAX_NUM_PROCESSES" in told
