"""The learning rate of each update: settings in, an Optax schedule out.

Updates count from 0, and a skipped step is none. Warm-up rises linearly and its first update is not
at zero, so none is wasted; what follows runs over the updates that are left.
"""

import math
from typing import assert_never

import jax.numpy as jnp
import optax

from mainrun import config
from mainrun.errors import UserError


def schedule(
    settings: config.Schedule,
    learning_rate: float,
    *,
    total_steps: int,
    steps_per_epoch: int,
    tokens_per_step: int,
) -> optax.Schedule:
    """Learning rate of each update. Raises UserError when warm-up or decay outlasts the run."""

    def steps(duration: config.Duration) -> int:
        return duration.in_steps(
            total_steps=total_steps,
            steps_per_epoch=steps_per_epoch,
            tokens_per_step=tokens_per_step,
        )

    if isinstance(settings, config.NoSchedule):
        return optax.constant_schedule(learning_rate)
    warmup = steps(settings.warmup)
    if warmup > total_steps:
        raise UserError(f"schedule.warmup is {warmup} steps, the whole run only {total_steps}")
    rest = max(1, total_steps - warmup)
    match settings:
        case config.Cosine(final_fraction=final):
            course = optax.cosine_decay_schedule(learning_rate, rest, alpha=final)
        case config.Linear(final_fraction=final):
            course = optax.linear_schedule(learning_rate, learning_rate * final, rest)
        case config.WarmupStableDecay(decay=duration, shape=shape, final_fraction=final):
            decay = steps(duration)
            if decay > total_steps - warmup:
                raise UserError(
                    f"schedule.warmup and schedule.decay are {warmup} and {decay} steps, the "
                    f"whole run only {total_steps}"
                )
            stable = optax.constant_schedule(learning_rate)
            course = optax.join_schedules(
                [stable, _decay(shape, learning_rate, max(1, decay), final)], [rest - decay]
            )
        case config.Step(every=duration, factor=factor):
            course = _staircase(learning_rate, max(1, steps(duration)), factor)
        case config.Constant():
            course = optax.constant_schedule(learning_rate)
        case _:
            assert_never(settings)
    if warmup == 0:
        return course
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, course], [warmup])


def _staircase(peak: float, every: int, factor: float) -> optax.Schedule:
    """Optax's own divides in float32; compiled, a drop is then late where `every` is 41, 47, …"""
    return lambda count: peak * jnp.power(factor, count // every)


def _decay(shape: str, peak: float, steps: int, final: float) -> optax.Schedule:
    """From the peak down to `final` of it. 1 - sqrt: Hägele et al. 2024 (arXiv:2405.18392)."""
    match shape:
        case "linear":
            return optax.linear_schedule(peak, peak * final, steps)
        case "cosine":
            return optax.cosine_decay_schedule(peak, steps, alpha=final)
        case _:
            return lambda count: (
                peak * (1 - (1 - final) * jnp.sqrt(jnp.clip(count / steps, 0.0, 1.0)))
            )


def num_steps(settings: config.Training, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.floor(settings.epochs * steps_per_epoch))
