"""Learning-rate schedules and optimizers: settings in, Optax out.

Steps count optimizer updates from 0. Warm-up rises linearly and its first step is not at zero, so
no step is wasted; the decay then runs over the steps that are left.
"""

import math
from typing import assert_never

import jax
import optax

from mainrun import config
from mainrun.errors import UserError


def schedule(
    settings: config.Schedule, learning_rate: float, *, total_steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Learning rate of each step. Raises ValueError when warm-up outlasts the run."""
    warmup = settings.warmup.in_steps(total_steps=total_steps, steps_per_epoch=steps_per_epoch)
    if warmup > total_steps:
        raise UserError(f"schedule.warmup is {warmup} steps, the whole run only {total_steps}")
    rest = max(1, total_steps - warmup)
    match settings:
        case config.Cosine(final_fraction=final):
            decay = optax.cosine_decay_schedule(learning_rate, rest, alpha=final)
        case config.Linear(final_fraction=final):
            decay = optax.linear_schedule(learning_rate, learning_rate * final, rest)
        case config.Constant():
            decay = optax.constant_schedule(learning_rate)
        case _:
            assert_never(settings)
    if warmup == 0:
        return decay
    rise = optax.linear_schedule(learning_rate / (warmup + 1), learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def optimizer(
    settings: config.Optimizer, learning_rate: optax.Schedule, grad_clip: float | None
) -> optax.GradientTransformation:
    """Clipping by the global norm, then the optimizer. Moments are float32, as parameters are."""
    clip = optax.identity() if grad_clip is None else optax.clip_by_global_norm(grad_clip)
    mask = matrices if settings.decay_on == "matrices" else None
    match settings:
        case config.Sgd(momentum=momentum, weight_decay=decay):
            # Coupled decay, as PyTorch's SGD of the original assessment has it.
            return optax.chain(
                clip,
                optax.add_decayed_weights(decay, mask) if decay else optax.identity(),
                optax.sgd(learning_rate, momentum or None),
            )
        case config.AdamW(b1=b1, b2=b2, eps=eps, weight_decay=decay):
            adamw = optax.adamw(learning_rate, b1, b2, eps, weight_decay=decay, mask=mask)
            return optax.chain(clip, adamw)
        case _:
            assert_never(settings)


def matrices(params: dict[str, jax.Array]) -> dict[str, bool]:
    """True for weights and embeddings, False for biases and norms."""
    return {name: array.ndim >= 2 for name, array in params.items()}


def num_steps(settings: config.Training, steps_per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    if settings.max_steps is not None:
        return settings.max_steps
    return max(1, math.floor(settings.epochs * steps_per_epoch))
