"""How many runs train side by side: as many as was said, or as many as gain by it.

On a CPU one after another is fastest: `vmap` took 1.3 times as long for a model of 64 dimensions,
and gained a tenth at 32 (SPEED section 4). Elsewhere the number is doubled as long as it fits the
memory and a step of each run gets cheaper by a tenth.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax

from mainrun import memory
from mainrun.population.places import PopulationStep
from mainrun.training import backend

_GAIN = 0.9  # of the time that a run's step took among half as many


class Choice(NamedTuple):
    """What was asked for."""

    population: int | None  # None: whatever is fastest
    most: int  # there are no more runs than that


def choose(
    wanted: Choice,
    compiled_for: Callable[[int], PopulationStep],
    seconds: Callable[[PopulationStep], float],
) -> PopulationStep:
    """The step for as many runs as is best.

    `seconds` measures what a step takes for each of the runs.
    """
    if wanted.population is not None:
        return compiled_for(min(wanted.population, wanted.most))
    best = compiled_for(1)
    if jax.default_backend() == "cpu":
        return best
    limit, least = backend.memory_limit_bytes(), seconds(best)
    while 2 * best.places <= wanted.most:
        more = compiled_for(2 * best.places)
        if not memory.fits(more.step_bytes, limit) or (now := seconds(more)) > _GAIN * least:
            break
        best, least = more, now
    return best
