"""The values of the next trial: a pure function of the space, the seed, and the trials before.

Grid points follow in the file's order; the others are drawn by Optuna's samplers, each made anew
for one trial with a seed of its own.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, assert_never

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from mainrun.sweep.distribution import Choices, Distribution, Fixed, Integers, Interval, Multiples
from mainrun.sweep.search_space import SearchSpace, grid_point, grid_size

_AT_RANDOM = 4
_TEACHING = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)


def next_values(
    space: SearchSpace, seed: int, before: Sequence[FrozenTrial]
) -> dict[str, int | float | str | bool | list | dict | None]:
    """The values of the trial that follows these, of every parameter."""
    number = len(before)
    match space.method:
        case "grid":
            return grid_point(space, number % grid_size(space))
        case "random":
            sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(
                seed=_seed(seed, number)
            )
            before = []
        case "bayes":
            # Multivariate: learning rate and batch size, say, are best chosen together. What is
            # still running counts as poor there, or two processes would try the same. Of Optuna's
            # ten random trials at first, a sweep of eight would have no other (docs/search.md).
            sampler = optuna.samplers.TPESampler(
                n_startup_trials=_AT_RANDOM,
                seed=_seed(seed, number),
                multivariate=True,
                constant_liar=True,
            )
        case _:
            assert_never(space.method)
    # A study of this moment only: asking the stored one would write half a trial at a time.
    scratch = optuna.create_study(sampler=sampler, direction=direction(space))
    scratch.add_trials([trial for trial in before if trial.state in _TEACHING])
    asked = scratch.ask({p: for_optuna(d) for p, d in space.varied().items()})
    return {
        setting: d.value if isinstance(d, Fixed) else _decoded(d, asked.params[setting])
        for setting, d in space.parameters.items()
    }


def direction(space: SearchSpace) -> StudyDirection:
    return StudyDirection.MINIMIZE if space.metric.goal == "minimize" else StudyDirection.MAXIMIZE


def _seed(seed: int, number: int) -> int:
    """A seed for each trial, unlike those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4])


def for_optuna(distribution: Distribution) -> BaseDistribution:
    match distribution:
        case Choices(values=values):
            return CategoricalDistribution([json.dumps(value) for value in values])
        case Integers(low=low, high=high):
            return IntDistribution(low, high)
        case Interval(low=low, high=high, log=log):
            return FloatDistribution(low, high, log=log)
        case Multiples(first=first, last=last, log=log):
            return IntDistribution(first, last, log=log)
        case Fixed():
            raise AssertionError("nothing is chosen of one value")
        case _:
            assert_never(distribution)


def encoded(distribution: Distribution, value: Any) -> Any:
    """The value as Optuna has it: lists and mappings as JSON, multiples as their count."""
    match distribution:
        case Choices():
            return json.dumps(value)
        case Multiples(quantum=quantum):
            return round(value / quantum)
        case _:
            return value


def _decoded(distribution: Distribution, stored: Any) -> Any:
    match distribution:
        case Choices():
            return json.loads(stored)
        case Multiples():
            return distribution.at(stored)
        case Interval(low=low, high=high):
            # What a person reads and types again; six digits are more than any setting needs.
            return min(max(float(f"{stored:.6g}"), low), high)
        case _:
            return stored
