"""Several optimizer steps in one dispatch: pure, and the same bits however many they are.

Each dispatch costs the host about a millisecond, as much as a small step takes, and metrics are
brought over once for all of its steps. The number of steps is an input of a loop that was compiled
once, not a length of the program: a run that is stopped or resumed in the middle of what was one
stretch is computed by the same instructions as one that was not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from mainrun.data.batches import Batch
from mainrun.training.step import Metrics, TrainState, TrainStep

BatchAt = Callable[[Any, Int[Array, ""]], Batch]
"""The batch of a stretch's n-th step, from what the stretch was given (see `feed`)."""

Run = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
"""From a state, what its batches are made of, and a number of steps (int32): the state after them,
and their metrics in rows, of which those beyond that number mean nothing."""


def stretch(train_step: TrainStep, batch_at: BatchAt, most: int) -> Run:
    """So many steps, at most `most`, one after the other."""
    train_step = jax.jit(train_step, inline=True)  # traced once: for its shapes, and in the loop

    def run(state: TrainState, feed: Any, count: Int[Array, ""]) -> tuple[TrainState, Metrics]:
        def step(index: Array, carried: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, told = carried
            state, metrics = train_step(state, batch_at(feed, index))
            return state, jax.tree.map(lambda rows, row: rows.at[index].set(row), told, metrics)

        shapes = jax.eval_shape(lambda: train_step(state, batch_at(feed, jnp.int32(0)))[1])
        none = jax.tree.map(lambda leaf: jnp.zeros((most, *leaf.shape), leaf.dtype), shapes)
        return jax.lax.fori_loop(0, count, step, (state, none))

    return run
