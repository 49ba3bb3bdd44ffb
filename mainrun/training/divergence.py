"""Is a step's loss a number, and one to be expected? Decided inside the step, before its update.

A step that is not changes nothing but its own count; what then happens, skipping it, stopping or
going back to a checkpoint, is the loop's.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mainrun import config

APPLIED, OVERFLOWED, NOT_FINITE, SPIKED = range(4)
"""What became of a step: it changed the parameters; its float16 gradients overflowed (see
`precision`); its loss or gradient was no number; its loss was far above those before."""


class Guard(NamedTuple):
    """Part of the training state: what losses have been, and how the last steps went."""

    in_a_row: Int[Array, ""]  # steps that diverged, up to now
    returns: Int[Array, ""]  # to a checkpoint, in the whole run
    num_losses: Int[Array, ""]
    mean: Float[Array, ""]  # of the losses, exponentially forgetting
    square: Float[Array, ""]  # mean squared deviation, likewise


def initial() -> Guard:
    integers = (jnp.int32, jnp.int32, jnp.int32)
    return Guard(*(jnp.zeros((), dtype) for dtype in (*integers, jnp.float32, jnp.float32)))


def outcome(
    settings: config.Divergence,
    guard: Guard,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    *,
    scales_loss: bool,
) -> Int[Array, ""]:
    """One of the four above; with a scaled loss, gradients that are no numbers overflowed."""
    result = jnp.where(_is_spike(settings, guard, loss), SPIKED, APPLIED)
    bad_gradient = OVERFLOWED if scales_loss else NOT_FINITE
    result = jnp.where(jnp.isfinite(grad_norm), result, bad_gradient)
    return jnp.where(jnp.isfinite(loss), result, NOT_FINITE).astype(jnp.int32)


def _is_spike(settings: config.Divergence, guard: Guard, loss: Array) -> Bool[Array, ""]:
    """More than so many standard deviations above the mean, once a window of losses is known."""
    if settings.spike_deviations is None:
        return jnp.zeros((), bool)
    known = guard.num_losses >= settings.spike_window
    return known & (loss > guard.mean + settings.spike_deviations * jnp.sqrt(guard.square))


def observed(
    settings: config.Divergence, guard: Guard, loss: Array, result: Int[Array, ""]
) -> Guard:
    """After a step. Losses of steps that diverged are not what losses should be like."""
    diverged = (result == NOT_FINITE) | (result == SPIKED)
    applied = result == APPLIED
    count = guard.num_losses + 1
    share = jnp.maximum(1 / count, 1 / settings.spike_window)  # the plain mean, to begin with
    away = jnp.where(applied, loss - guard.mean, 0.0)
    return Guard(
        in_a_row=jnp.where(diverged, guard.in_a_row + 1, jnp.where(applied, 0, guard.in_a_row)),
        returns=guard.returns,
        num_losses=jnp.where(applied, count, guard.num_losses),
        mean=guard.mean + share * away,
        square=jnp.where(
            applied, (1 - share) * (guard.square + share * jnp.square(away)), guard.square
        ),
    )
