"""Dynamic loss scaling for float16, inside the compiled step.

float16 has no number between 0 and 6e-8, where small gradients fall. The loss is multiplied before
the backward pass and gradients are divided, in float32, after it; the multiplier backs off where
gradients overflow and grows where they long have not. Micikevicius et al. 2018 (arXiv:1710.03740),
section 3.2; the sequence of scales is that of PyTorch's `GradScaler`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mainrun import config


class LossScale(NamedTuple):
    """Part of the training state, so a resumed run goes on with it. Unused but in float16."""

    scale: Float[Array, ""]
    good_steps: Int[Array, ""]  # since it last changed
    overflows: Int[Array, ""]  # of the whole run: steps that were skipped
    at_min: Int[Array, ""]  # overflows in a row with the least scale there is


def initial(settings: config.LossScale) -> LossScale:
    counters = (jnp.zeros((), jnp.int32) for _ in range(3))  # arrays of their own: all are donated
    return LossScale(jnp.asarray(settings.initial, jnp.float32), *counters)


def next_scale(settings: config.LossScale, now: LossScale, finite: Bool[Array, ""]) -> LossScale:
    """After a step whose gradients were finite, or were not."""
    backed_off = jnp.maximum(now.scale * settings.backoff_factor, settings.min)
    good_steps = now.good_steps + 1
    grows = good_steps >= settings.growth_interval
    grown = jnp.where(
        grows, jnp.minimum(now.scale * settings.growth_factor, settings.max), now.scale
    )
    is_least = now.scale <= settings.min
    return LossScale(
        scale=jnp.where(finite, grown, backed_off),
        good_steps=jnp.where(finite & ~grows, good_steps, 0),
        overflows=now.overflows + ~finite,
        at_min=jnp.where(finite, 0, now.at_min + is_least),
    )
