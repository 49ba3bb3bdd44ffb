"""Whether runs differ by more than their seeds: Welch's test for every two groups of runs.

Runs whose settings are equal but for the seed, and for what moves no number, are one group; the
spread inside a group is what chance does. Two groups of at least two seeds each are compared by
Welch's t-test (Welch 1947, degrees of freedom by Satterthwaite 1946), and the p values of all pairs
are corrected together (Holm 1979). A group of one seed has no spread, so nothing can be said of
chance: there is only the standard error of the evaluation, which knows of the text alone.
"""

import itertools
import json
import math
import statistics
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mainrun import config as configs
from mainrun.analysis.run_folder import Run

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone, at most one of each seed."""

    runs: tuple[Run, ...]
    left_out: tuple[Run, ...] = ()
    """Of a seed that is in `runs`, or without a result: they are no further evidence."""

    @property
    def losses(self) -> list[float]:
        return [value for run in self.runs if (value := result(run)) is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.losses) if self.losses else None

    @property
    def deviation(self) -> float | None:
        """Of the seeds, as a sample; None for less than two."""
        return statistics.stdev(self.losses) if len(self.losses) > 1 else None


@dataclass(frozen=True)
class Welch:
    """Of two samples: `difference` is the mean of the second less that of the first."""

    difference: float
    low: float
    high: float
    """The interval of the difference, at `CONFIDENCE`."""
    t: float
    degrees_of_freedom: float
    p: float
    corrected_p: float = math.nan
    """By Holm, over all pairs that were compared."""


@dataclass(frozen=True)
class Pair:
    """Groups by their place; without a test where neither group has any spread."""

    first: int
    second: int
    test: Welch | None


def result(run: Run) -> float | None:
    """The best `val/loss` of a run that came to its end; what did not has no result to compare."""
    if run.status != "finished" or run.best is None or run.best["value"] is None:
        return None
    return float(run.best["value"])


def groups(runs: Sequence[Run]) -> list[Group]:
    """In the order of their first runs."""
    members: dict[str, list[Run]] = {}
    for run in runs:
        kept = {path: value for path, value in run.settings.items() if configs.is_effect(path)}
        # Without settings nothing says what it is equal to.
        key = json.dumps(kept, sort_keys=True) if kept else f"unknown: {run.folder}"
        members.setdefault(key, []).append(run)
    return [_group(listed) for listed in members.values()]


def _group(runs: Sequence[Run]) -> Group:
    """Of each seed the first run with a result."""
    ordered = sorted(runs, key=lambda run: result(run) is None)
    of_seed: dict[Any, Run] = {}
    for run in ordered:
        of_seed.setdefault(run.settings.get("seed"), run)
    taken = {id(run) for run in of_seed.values()}
    return Group(
        tuple(run for run in runs if id(run) in taken),
        tuple(run for run in runs if id(run) not in taken),
    )


def pairs(compared: Sequence[Group]) -> list[Pair]:
    """Every two groups with at least two results each, their p values corrected together."""
    known = [place for place, group in enumerate(compared) if len(group.losses) > 1]
    tests = [
        Pair(first, second, welch(compared[first].losses, compared[second].losses))
        for first, second in itertools.combinations(known, 2)
    ]
    corrected = iter(holm([pair.test.p for pair in tests if pair.test is not None]))
    return [
        pair
        if pair.test is None
        else replace(pair, test=replace(pair.test, corrected_p=next(corrected)))
        for pair in tests
    ]


def welch(first: Sequence[float], second: Sequence[float]) -> Welch | None:
    """The two-sided test of equal means; None where no value differs from its sample's others."""
    from scipy import stats  # of JAX's own dependencies

    if len({*first}) == len({*second}) == 1:
        return None
    with warnings.catch_warnings():
        # Of a sample without spread: its variance is nought, which is exact and no loss.
        warnings.simplefilter("ignore", RuntimeWarning)
        found = stats.ttest_ind(second, first, equal_var=False)
    interval = found.confidence_interval(CONFIDENCE)
    return Welch(
        difference=statistics.fmean(second) - statistics.fmean(first),
        low=float(interval.low),
        high=float(interval.high),
        t=float(found.statistic),
        degrees_of_freedom=float(found.df),
        p=float(found.pvalue),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected so that one false alarm among all of them is as unlikely as for one alone.

    Holm 1979: the smallest is multiplied by their number, the next by one less, and none may fall
    below one before it.
    """
    corrected, highest = [0.0] * len(p_values), 0.0
    order = sorted(range(len(p_values)), key=lambda place: p_values[place])
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
