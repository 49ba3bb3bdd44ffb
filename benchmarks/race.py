"""Contestants take turns: rounds of steps in shuffled order, then starts from nothing.

Never do two of them compute at a time; between its turns a contestant waits for a line.
"""

import contextlib
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.contestants import Contestant, environment
from benchmarks.pytorch import ROOT
from benchmarks.ratios import Record
from benchmarks.worker import Answer, Worker

Say = Callable[[str], None]


class Start(NamedTuple):
    """Seconds from the start of a process."""

    begin: float  # to the beginning of its first step
    done: float  # to the end of it


def rounds(
    commands: Mapping[Contestant, Sequence[str]],
    folder: Path,
    *,
    count: int,
    steps: int,
    seed: int,
    say: Say,
) -> tuple[dict[str, Record], dict[str, dict[str, Any]]]:
    """`count` rounds of `steps` each: what each contestant did, and what it said of itself."""
    order = random.Random(seed)
    answers: dict[str, list[Answer]] = {contestant.name: [] for contestant in commands}
    with contextlib.ExitStack() as stack:
        workers = {}
        for contestant, command in commands.items():
            variables = environment(contestant, folder / "cache")
            worker = stack.enter_context(Worker(command, variables, ROOT))
            say(f"{contestant.name}: first step after {worker.start_seconds:.1f} s")
            workers[contestant.name] = worker
        for number in range(1, count + 1):
            for name in order.sample(list(workers), k=len(workers)):
                answer = workers[name].run(steps)
                answers[name].append(answer)
                say(f"round {number} of {count}: {name} {answer.seconds:.3f} s a step")
        records = {
            name: Record(
                first_loss=worker.facts["first_loss"],
                answers=answers[name],
                peak_bytes=_peak_bytes(worker, answers[name][-1]),
            )
            for name, worker in workers.items()
        }
        return records, {name: worker.facts for name, worker in workers.items()}


def starts(
    commands: Mapping[Contestant, Sequence[str]], folder: Path, *, count: int, say: Say
) -> dict[str, dict[str, list[Start]]]:
    """Starts of each contestant, with an empty compilation cache (`cold`) and with the one the
    start before it filled (`warm`). Files are in the page cache: the rounds have read them. PyTorch
    that compiles nothing has two starts."""
    seconds: dict[str, dict[str, list[Start]]] = {
        contestant.name: {"cold": [], "warm": []} for contestant in commands
    }
    for number in range(1, count + 1):
        for contestant, command in commands.items():
            cache = folder / f"cache-{number}-{contestant.name.replace(' ', '-')}"
            for kind in ("cold", "warm"):
                with Worker(command, environment(contestant, cache), ROOT) as worker:
                    start = Start(worker.begin_seconds, worker.start_seconds)
                    seconds[contestant.name][kind].append(start)
                    say(f"{contestant.name}: {kind} start {start.begin:.1f}, {start.done:.1f} s")
    return seconds


def _peak_bytes(worker: Worker, last: Answer) -> int | None:
    """On a GPU the card's memory, else the process's."""
    return worker.peak_bytes() if last.device_bytes is None else last.device_bytes
