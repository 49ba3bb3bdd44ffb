"""A running average of the weights, carried beside them and evaluated beside them.

Both kinds move the average a fraction of the way to the parameters after each update; what differs
is the fraction. Nothing is trained with the average.
"""

import math
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mainrun import config

Params = dict[str, jax.Array]


class Samples(NamedTuple):
    """The updates after which an average of samples takes one."""

    start: int  # the first, at least 1
    every: int


EVERY_UPDATE = Samples(1, 1)


def initial(settings: config.WeightAverage | None, params: Params) -> Params:
    """The parameters; empty without an average."""
    return {} if settings is None else {n: jnp.array(a, copy=True) for n, a in params.items()}


def averaged(
    settings: config.WeightAverage | None,
    average: Params,
    params: Params,
    update: Int[Array, ""],
    samples: Samples = EVERY_UPDATE,
) -> Params:
    """The average after the `update`-th update, the first being 1, which made `params`."""
    if settings is None:
        return average
    share = _share(settings, update, samples)
    return {name: a + share * (params[name] - a) for name, a in average.items()}


def _share(
    settings: config.WeightAverage, update: Int[Array, ""], samples: Samples
) -> Float[Array, ""]:
    match settings:
        case config.Ema(decay=decay):
            # Corrected for its beginning as Adam's moments are (Kingma & Ba 2015, section 3).
            return (1 - decay) / -jnp.expm1(math.log(decay) * update.astype(jnp.float32))
        case config.Swa():
            # Izmailov et al. 2018 (arXiv:1803.05407): the plain mean of samples along the way.
            past = update - samples.start
            number = past // samples.every + 1
            share = jnp.where(past % samples.every == 0, 1 / jnp.maximum(number, 1), 0.0)
            return jnp.where(past < 0, 1.0, share)  # until then it is the parameters themselves
        case _:
            assert_never(settings)
