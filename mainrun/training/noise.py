"""The gradient noise scale: how many tokens a batch should have, from gradients that are there.

McCandlish et al. 2018 (arXiv:1812.06162), appendix A.1. The squared norm of a mean gradient over B
tokens is |G|² + S/B in expectation. The micro-batches' and the whole batch's are two of these, and
give |G|² and S without bias; each is smoothed by itself, since their ratio is not without.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Noise(NamedTuple):
    """Sums whose ratio is the scale: exponentially forgetting, both with the same weights."""

    variance: Float[Array, ""]  # S, summed over parameters, of one token
    signal: Float[Array, ""]  # |G|²


class Norms(NamedTuple):
    """Of the micro-batches of one step."""

    squares: Float[Array, ""]  # sum over micro-batches of |mean gradient|²
    inverse_tokens: Float[Array, ""]  # sum over micro-batches of 1 / tokens
    number: Float[Array, ""]  # of micro-batches with tokens


def none() -> Noise:
    return Noise(jnp.zeros(()), jnp.zeros(()))


def observed(
    now: Noise,
    small: Norms,
    big_square: Float[Array, ""],
    big_tokens: Float[Array, ""],
    *,
    decay: float,
) -> Noise:
    """With a step's two estimates. `big_square` is |gradient of the whole batch|².

    Micro-batches may have different numbers of tokens: the mean of |G|² + S/b over them is
    |G|² + S · mean(1/b). Where only one of them has any, nothing can be told and nothing changes.
    """
    count = jnp.maximum(small.number, 1)
    mean_square, mean_inverse = small.squares / count, small.inverse_tokens / count
    difference = mean_inverse - 1 / big_tokens
    told = (small.number > 1) & (difference > 0)
    variance = (mean_square - big_square) / jnp.where(told, difference, 1.0)
    signal = big_square - variance / big_tokens
    told &= jnp.isfinite(variance) & jnp.isfinite(signal)
    return Noise(
        jnp.where(told, decay * now.variance + (1 - decay) * variance, now.variance),
        jnp.where(told, decay * now.signal + (1 - decay) * signal, now.signal),
    )


def scale_tokens(noise: Noise) -> Float[Array, ""]:
    """S/|G|²: the batch, in tokens, at which noise and signal are equal. NaN until it is known."""
    known = (noise.signal > 0) & (noise.variance > 0)
    return jnp.where(known, noise.variance / jnp.where(known, noise.signal, 1.0), jnp.nan)
