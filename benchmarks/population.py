"""Trials per hour of a sweep: `python -m benchmarks.population`.

One process per trial (start, compile, train), against the embedded engine, which reads and compiles
once, and against the same with trials side by side. Every contestant trains the same small trials
from the same config. The first has a compilation cache that is warm, as it would be from the second
trial on, and once more one that is empty each time.
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import report
from mainrun import config
from mainrun.markdown import table
from mainrun.training import backend

TRIALS = 24
SMALL = (
    "data.num_documents=2000",
    "data.context_length=64",
    "tokenizer.vocab_size=1000",
    "model.d_model=64",
    "model.num_layers=2",
    "model.attention.num_heads=4",
    "training.batch_size=16",
    "training.max_steps=100",
    "tracking.wandb=disabled",
)
"""About 0.2 million parameters, 100 steps of 1,024 tokens."""

MAINRUN = [sys.executable, "-c", "import sys; from mainrun.cli import main; sys.exit(main())"]


def main() -> None:
    from benchmarks import page  # which shows this record among others

    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=page.FOLDER, help="folder of the records")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side-by-side", type=int, nargs="*", default=[2, 4])
    asked = parser.parse_args()
    contestants: dict[str, Callable[[Path], None]] = {
        "one process per trial, nothing cached": _processes_cold,
        "one process per trial": _processes,
        "mainrun sweep": _sweep,
        **{
            f"mainrun sweep --population {n}": functools.partial(_sweep, population=n)
            for n in asked.side_by_side
        },
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(asked.rounds):
        for name, run in contestants.items():
            with tempfile.TemporaryDirectory() as where:
                started = time.perf_counter()
                run(Path(where))
                seconds[name].append(time.perf_counter() - started)
                print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr)
    backend.prepare()
    record = {
        "kind": "population",
        **report.machine(["python", "-m", "benchmarks.population", *sys.argv[1:]], ""),
        "device": backend.describe_device(),
        "trials": TRIALS,
        "overrides": SMALL,
        "seconds": seconds,
    }
    page.store(record, asked.output / "population.json")
    print(markdown(record))


def markdown(record: Mapping[str, Any]) -> str:
    """The fastest round of each: a sweep's seconds only grow by what else the machine does."""
    best = {name: min(values) for name, values in record["seconds"].items()}
    reference, trials = best["one process per trial"], record["trials"]
    rows = [
        [name, f"{value:.1f} s", f"{3600 * trials / value:,.0f}", f"{reference / value:.2f}"]
        for name, value in best.items()
    ]
    return table([f"{trials} trials", "in", "trials an hour", "times one process per trial"], rows)


def _processes(where: Path) -> None:
    for number in range(TRIALS):
        _run(where, "train", str(_base()), *SMALL, _rate(number), "--run-dir", f"trial-{number}")


def _processes_cold(where: Path) -> None:
    for number in range(TRIALS):
        cache = where / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        words = ["train", str(_base()), *SMALL, _rate(number), "--run-dir", f"trial-{number}"]
        _run(where, *words, cache=cache)


def _sweep(where: Path, population: int | None = None) -> None:
    rates = [float(_rate(number).partition("=")[2]) for number in range(TRIALS)]
    command = ["mainrun", "train", str(_base()), *SMALL, "${args_no_hyphens}"]
    parameters = {"optimizer.learning_rate": {"values": rates}}
    path = where / "sweep.yaml"
    path.write_text(json.dumps({"method": "grid", "parameters": parameters, "command": command}))
    more = [] if population is None else ["--population", str(population)]
    _run(where, "sweep", str(path), "--backend", "local", "--run-dir", "sweep", *more)


def _base() -> Path:
    return config.default_config_root() / "base" / "quickstart.yaml"


def _rate(number: int) -> str:
    return f"optimizer.learning_rate={0.001 * 1.5**number:.4g}"


def _run(where: Path, *words: str, cache: Path | None = None) -> None:
    environment = os.environ | ({} if cache is None else {"MAINRUN_CACHE_DIR": str(cache)})
    subprocess.run([*MAINRUN, *words], cwd=where, check=True, capture_output=True, env=environment)


if __name__ == "__main__":
    main()
