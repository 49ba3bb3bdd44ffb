"""Does `bayes` find better settings than `random`? `python -m benchmarks.search`.

Both search the space of `config/sweep/quickstart.yaml` as a sweep does, one trial after the other,
but a trial's loss is computed in no time: by a closed form, and by a formula fitted to real runs
(`search_runs.csv`). Each loss has noise, as that of a run has; what counts is the true loss of the
trial that looked best. Seeds are compared with themselves.
"""

import argparse
import csv
import hashlib
import math
import shlex
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial
from scipy.stats import t as student

from mainrun.sweep import sampler, sweep_file
from mainrun.sweep.search_space import SearchSpace

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "config" / "sweep" / "quickstart.yaml"
RUNS = Path(__file__).with_name("search_runs.csv")
PAGE = ROOT / "docs" / "search.md"

RATE, DECAY, DROPOUT = "optimizer.learning_rate", "optimizer.weight_decay", "model.dropout"
COUNTS, SEEDS = (8, 16, 32), 10

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Objective:
    """A loss to be minimised, in nats per character, and the deviation of its noise."""

    name: str
    loss: Callable[[Values], float]
    noise: float
    says: str

    def measured(self, values: Values, seed: int) -> float:
        """The loss as one run would tell it; the same values have the same noise under a seed."""
        text = f"{seed} {sorted(values.items())}"
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]))
        return self.loss(values) + self.noise * float(draw.normal())


def valley(values: Values) -> float:
    """Least at a rate of 3e-3, which falls with dropout and decay: a curved, tilted valley."""
    decades = math.log10(values[RATE] / 3e-3) + 1.5 * (values[DROPOUT] - 0.1) + values[DECAY]
    return (
        1.2 + 0.25 * decades**2 + 0.08 * max(decades, 0) ** 3
        + 2.0 * (values[DROPOUT] - 0.1) ** 2 + 0.1 * (values[DECAY] - 0.1) ** 2
    )  # fmt: skip


def features(values: Values) -> list[float]:
    """What a loss is taken to be linear in."""
    u, w, p = math.log10(values[RATE] / 3e-3), values[DECAY], values[DROPOUT]
    return [1.0, u, u**2, u**3, u**4, w, p, p**2, u * w, u * p]


def fitted(runs: Sequence[Values], losses: Sequence[float]) -> Objective:
    """The formula nearest to real runs, with their distance from it as noise."""
    X, y = np.array([features(run) for run in runs]), np.array(losses)
    weights = np.linalg.lstsq(X, y, rcond=None)[0]
    free = len(y) - X.shape[1]
    noise = math.sqrt(float(np.sum((X @ weights - y) ** 2)) / free)
    says = (
        f"A polynomial of {X.shape[1]} terms fitted to {len(y)} real runs, whose losses go from "
        f"{min(y):.3f} to {max(y):.3f}; its residuals deviate by {noise:.4f}, and its least may "
        "lie below every run. Each run is the quickstart with two layers of width 48, 4,000 "
        "documents, a vocabulary of 1,024, batches of 16 and four epochs, at random settings of "
        "the space (`benchmarks/search_runs.csv`)"
    )
    return Objective(
        "Real runs", lambda values: float(np.array(features(values)) @ weights), noise, says
    )


def read_runs(path: Path) -> tuple[list[Values], list[float]]:
    """Settings and losses of the table that a sweep left."""
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val/loss"]]
    settings: list[Values] = [
        {name: float(row[name]) for name in (RATE, DECAY, DROPOUT)} for row in rows
    ]
    return settings, [float(row["val/loss"]) for row in rows]


def found(space: SearchSpace, objective: Objective, seed: int) -> dict[int, float]:
    """The true loss of the trial that looked best, after so many trials of one search.

    A search's first trials are those of a shorter one: each depends on those before it alone.
    """
    before: list[FrozenTrial] = []
    told: list[tuple[float, float]] = []
    for _ in range(max(COUNTS)):
        values = sampler.next_values(space, seed, before)
        measured = objective.measured(values, seed)
        before.append(_finished(space, values, measured))
        told.append((measured, objective.loss(values)))
    return {count: min(told[:count])[1] for count in COUNTS}


def _finished(space: SearchSpace, values: Values, loss: float) -> FrozenTrial:
    """As the journal has it; the one place that knows how `sampler` encodes values."""
    varied = space.varied()
    return create_trial(
        state=TrialState.COMPLETE,
        value=loss,
        params={name: sampler.encoded(d, values[name]) for name, d in varied.items()},
        distributions={name: sampler.for_optuna(d) for name, d in varied.items()},
    )


def difference(pairs: Sequence[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % interval by Student's t."""
    mean = statistics.mean(pairs)
    half = float(student.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / len(pairs) ** 0.5
    return mean, mean - half, mean + half


def verdict(low: float, high: float) -> str:
    if high < 0:
        return "bayes is better"
    return "bayes is worse" if low > 0 else "not told apart"


def table(objective: Objective, seeds: int) -> str:
    """Markdown: both methods after each number of trials."""
    space = sweep_file.read(SPACE)
    methods = {
        method: [found(replace(space, method=method), objective, s) for s in range(seeds)]
        for method in ("random", "bayes")
    }
    lines = [
        "| trials | random, best found | bayes, best found | bayes − random | 95 % | |",
        "|---|---|---|---|---|---|",
    ]
    for count in COUNTS:
        random, bayes = ([best[count] for best in methods[name]] for name in ("random", "bayes"))
        mean, low, high = difference([b - r for b, r in zip(bayes, random, strict=True)])
        lines.append(
            f"| {count} | {statistics.mean(random):.4f} | {statistics.mean(bayes):.4f} "
            f"| {mean:+.4f} | {low:+.4f} to {high:+.4f} | {verdict(low, high)} |"
        )
    return "\n".join(lines)


def objectives() -> list[Objective]:
    closed = Objective(
        "A tilted valley", valley, 0.005,
        "Closed form: quadratic in the logarithm of the rate, steeper above, the best rate falling "
        "with dropout and weight decay; noise of 0.005",
    )  # fmt: skip
    return [closed, fitted(*read_runs(RUNS))] if RUNS.is_file() else [closed]


def page(seeds: int, command: Sequence[str]) -> str:
    parts = [
        "# Bayes against random",
        "What a sweep finds with `method: bayes` (Optuna's TPE, as `mainrun.sweep.sampler` drives "
        "it) and with `method: random`, in the space of `config/sweep/quickstart.yaml` (learning "
        f"rate over two decades, three weight decays, four dropouts), over {seeds} seeds. Losses "
        "are computed, not trained; each search sees them with noise, and the true loss of the "
        "trial that looked best is what it has found. Differences are of the same seed; intervals "
        "are Student's, of the mean over seeds.",
    ]
    for objective in objectives():
        parts += [f"## {objective.name}", f"{objective.says}.", table(objective, seeds)]
    parts += [
        "The first four trials of `bayes` are drawn at random, the very ones of `random`; from "
        "there on it looks where losses were low. With Optuna's ten at first, a sweep of eight "
        "trials would be one at random.",
        f"Made by `{shlex.join(command)}`.",
    ]
    wrapped = (part if part.startswith(("|", "#")) else _wrapped(part) for part in parts)
    return "\n\n".join(wrapped) + "\n"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description=__doc__)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    text = page(options.seeds, ["python", "-m", "benchmarks.search", *arguments])
    options.output.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
