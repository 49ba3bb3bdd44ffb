"""The gates of SparseK: scores in, a number between 0 and 1 for each, their sum fixed.

Lou et al. 2024 (arXiv:2406.16747), section 3.2. All follows from one threshold, tau; here is how it
is found for any set of scores whose sums at a threshold can be told.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32


def sparsek(
    scores: Float32[Array, "*rows entries"],
    num_selected: int,
    valid: Bool[Array, "*#rows entries"] | None = None,
) -> Float32[Array, "*rows entries"]:
    """Gates along the last axis: of all p with 0 <= p <= 1 and sum `num_selected`, the nearest.

    p = clip(scores - tau, 0, 1) in the order of `scores`, differentiable in them. Entries that are
    not valid get 0; where no more than `num_selected` are valid, those get 1. Lou et al. 2024,
    section 3.2, who find tau by a sweep over the sorted scores.
    """
    valid = jnp.broadcast_to(True if valid is None else valid, scores.shape)
    if num_selected >= scores.shape[-1]:
        return valid.astype(jnp.float32)
    masked = jnp.where(valid, scores, -jnp.inf)
    fixed = jax.lax.stop_gradient(masked)
    kth, following = jnp.moveaxis(largest(fixed, num_selected + 1)[..., -2:], -1, 0)
    t, _ = solve(partial(sums_at, fixed), num_selected, kth, following, kth)
    # One more step of Newton's method gives tau its gradient: the mean of the active scores'.
    saturated, active, excess = sums_at(masked, jnp.where(jnp.isfinite(t), t, 0.0))
    step = (excess + (saturated - num_selected)) / jnp.maximum(active, 1)
    tau = t + jnp.where(active > 0, step, 0.0)
    return jnp.where(valid, clip(scores - tau[..., None]), 0.0)


def clip(x: Array) -> Array:
    return jax.lax.clamp(0.0, x, 1.0)  # jnp.clip has a gradient of 1/2 at 0 and at 1


def largest(x: Array, count: int) -> Array:
    """The `count` largest along the last axis, falling.

    Without the barrier XLA:CPU may join what is sliced from them with the slice that top_k is, no
    longer sees a top_k and sorts everything: 11 ms for 8 x 8192 numbers where this takes 0.3.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(x, count)[0])


Sums = tuple[Array, Array, Array]
"""Of scores z at a threshold t: how many gates are 1, how many between 0 and 1, and their sum."""


def sums_at(scores: Array, t: Array, valid: Array | bool = True) -> Sums:
    above = scores - t[..., None]
    active = valid & (above > 0) & (above < 1)
    saturated = valid & (above >= 1)
    return saturated.sum(-1), active.sum(-1), jnp.where(active, above, 0.0).sum(-1)


class _Search(NamedTuple):
    t: Array
    low: Array
    high: Array
    saturated: Array
    active: Array
    done: Array
    tries: Array


def solve(
    sums: Callable[[Array], Sums], num_selected: int, kth: Array, following: Array, guess: Array
) -> tuple[Array, Array]:
    """tau with gates of sum `num_selected`, and how many gates lie strictly between 0 and 1.

    `kth` is the num_selected-th largest score and `following` the next one. -inf where there is no
    such one. The sum of the gates falls from t = kth - 1, where it is num_selected at least, to
    t = following, where it is that at most, and is linear as long as no gate becomes 0 or 1.
    Newton's method therefore ends exactly, after 2 to 4 steps in the mean; the bracket guards it,
    and every other of the later steps halves the bracket. Scores that are no numbers end it too.
    """
    plenty = jnp.isfinite(following)
    kth, following = jnp.where(plenty, kth, 0.0), jnp.where(plenty, following, 0.0)
    low, high = kth - 1, following

    def advance(search: _Search) -> _Search:
        t = search.t
        saturated, active, excess = sums(t)
        excess = excess + (saturated - num_selected)
        low = jnp.where(excess > 0, t, search.low)
        high = jnp.where(excess < 0, t, search.high)
        newton = t + excess / jnp.maximum(active, 1)
        inside = (active > 0) & (newton >= low) & (newton <= high)
        unchanged = inside & (saturated == search.saturated) & (active == search.active)
        narrow = high - low <= 2e-7 * (1 + jnp.abs(t))
        inside &= (search.tries < 8) | (search.tries % 2 == 0)
        found = _Search(
            jnp.where(excess == 0, t, jnp.where(inside | unchanged, newton, (low + high) / 2)),
            low,
            high,
            saturated,
            active,
            (excess == 0) | unchanged | narrow | (search.tries == 63),
            search.tries + 1,
        )
        # Who is done stays, so that no query depends on how long another one takes.
        kept = (jnp.where(search.done, old, new) for old, new in zip(search, found, strict=True))
        return _Search(*kept)

    none = jnp.full(kth.shape, -1)
    apart = high <= low  # the gates are 0 and 1; between the bounds any t will do
    search = jax.lax.while_loop(
        lambda search: ~search.done.all(),
        advance,
        _Search(jnp.clip(guess, low, high), low, high, none, none, ~plenty | apart, none + 1),
    )
    tau = jnp.where(apart, (low + high) / 2, search.t)
    num_active = jnp.where(plenty & ~apart, search.active, 0)
    return jnp.where(plenty, tau, -jnp.inf), num_active
