"""A training step whose hyper-parameters are inputs: compiled once for runs that differ in them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mainrun import config as configs
from mainrun.config import Config
from mainrun.data.batches import Batch
from mainrun.model.layers import DropoutRate
from mainrun.parts import Parts
from mainrun.training import optimizer as optimizers
from mainrun.training.feed import Feed
from mainrun.training.step import Metrics, TrainState, make_train_step
from mainrun.training.stretch import stretch

_DROPOUT = "model.dropout"


class Hyper(NamedTuple):
    """What differs between runs that share a step."""

    learning_rates: Float[Array, " updates"]  # the last is that of all further updates
    values: dict[str, Any]  # by dotted path; the dropout rate as `DropoutRate`


HyperStep = Callable[[Hyper, TrainState, Batch], tuple[TrainState, Metrics]]
HyperRun = Callable[[Hyper, TrainState, Any, Int[Array, ""]], tuple[TrainState, Metrics]]
"""As `stretch.Run`."""


def hyper(config: Config, joined: Parts, paths: frozenset[str], updates: int) -> Hyper:
    """Those of one run; at least its `total_steps` learning rates."""
    values: dict[str, Any] = {
        path: np.float32(value) for path, value in configs.carried_values(config, paths).items()
    }
    if _DROPOUT in values:
        values[_DROPOUT] = DropoutRate.of(config.model.dropout)
    rates = jax.jit(jax.vmap(lambda count: jnp.float32(joined.learning_rate(count))))
    return Hyper(rates(jnp.arange(updates)), values)


def hyper_stretch(config: Config, joined: Parts, paths: frozenset[str], feed: Feed) -> HyperRun:
    """Several steps of every run with the structure of this one."""
    step = hyper_step(config, joined, paths)

    def run(
        given: Hyper, state: TrainState, feeds: Any, count: Array
    ) -> tuple[TrainState, Metrics]:
        return stretch(partial(step, given), feed.batch_at, feed.most)(state, feeds, count)

    return run


def hyper_step(config: Config, joined: Parts, paths: frozenset[str]) -> HyperStep:
    """The step of `parts.train_step` for every run with the structure of this one."""

    def step(given: Hyper, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        values = dict(given.values)
        dropout = values.pop(_DROPOUT, None)
        settings = configs.with_values(config, values)
        last = len(given.learning_rates) - 1

        def learning_rate(count: Array) -> Array:
            return given.learning_rates[jnp.minimum(count, last)]

        train_step = make_train_step(
            joined.network,
            optimizers.optimizer(settings.optimizer, learning_rate, settings.training.grad_clip),
            learning_rate,
            settings.training,
            micro_batches=joined.micro_batches,
            mask_documents=config.data.mask_documents,
            head_tokens=joined.head_tokens,
            samples=joined.samples,
            dropout=dropout,
        )
        return train_step(state, batch)

    return step
