"""Which keys each query of SparseK selects, and the threshold of its gates, in linear memory.

Queries go by in chunks; a copy of the scores before the chunk is kept sorted and gives every
query's threshold exactly, at time / chunk numbers per query (128 of them at 8192).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from mainrun.model.sparsek.gates import Sums, solve, sums_at


class Plan(NamedTuple):
    num_selected: int
    window: int
    chunk: int
    dropout_rate: float


class _Sorted(NamedTuple):
    """Scores and positions by falling score; of equal scores the earlier comes first."""

    costs: Float32[Array, " entries"]  # minus the score; inf where there is none
    places: Int[Array, " entries"]  # -1 where there is none


class Selection(NamedTuple):
    """What the gates of every query follow from, and the keys a chunk may need from before it."""

    tau: Float32[Array, "batch kv_heads whole_chunks"]
    num_active: Int[Array, "batch kv_heads whole_chunks"]
    cut: Float32[Array, "batch kv_heads whole_chunks"]  # the last score selected; -inf: all are
    cut_place: Int[Array, "batch kv_heads whole_chunks"]
    far: Int[Array, "chunks batch kv_heads selected"]  # positions of the best so far


def outranks(scores: Array, places: Array, cut: Array, cut_place: Array) -> Array:
    """Is this candidate selected, where the last one selected is `cut`?"""
    return (scores > cut) | (scores == cut) & (places <= cut_place)


def select(
    plan: Plan,
    scores: Float32[Array, "batch kv_heads time"],
    starts: Int[Array, "batch time"],
) -> Selection:
    per_head = jax.vmap(partial(_select_row, plan), (0, None))
    *per_query, far = jax.vmap(per_head)(scores, starts)
    tau, num_active, cut, cut_place = (x.reshape(*x.shape[:2], -1) for x in per_query)
    return Selection(tau, num_active, cut, cut_place, jnp.moveaxis(far, 2, 0))


def _select_row(
    plan: Plan, scores: Float32[Array, " time"], starts: Int[Array, " time"]
) -> tuple[Array, ...]:
    """The fields of `Selection` for one key head, with an axis of chunks in front."""
    num_selected, window, chunk, _ = plan
    num_chunks = -(-scores.size // chunk)
    padding = num_chunks * chunk - scores.size
    shifted = jnp.pad(scores, (window, padding))  # a key is a candidate `window` queries later
    # One chunk more, of a document that no candidate belongs to.
    starts = jnp.pad(starts, (0, padding + chunk), constant_values=starts.size)

    def step(carry: tuple[_Sorted, Array], first: Array) -> tuple[tuple, tuple[Array, ...]]:
        # Up to here: the candidates before first - window of the document at `first`.
        before, guess = carry
        queries = first + jnp.arange(chunk)
        own_starts = jax.lax.dynamic_slice_in_dim(starts, first, chunk)
        own_scores = jax.lax.dynamic_slice_in_dim(shifted, first, chunk)
        own = _Sorted(-own_scores, queries - window)
        same = own_starts == starts[first]

        def candidates(places: Array) -> Array:
            return (places >= own_starts[:, None]) & (places <= queries[:, None] - window)

        best = _Sorted(*(x[: num_selected + 1] for x in before))
        cut, following, cut_place = _cut(best, own, candidates, num_selected)

        sums_before = _sums_of_sorted(before.costs, num_selected, chunk)
        are_candidates = candidates(own.places)

        def sums(t: Array) -> Sums:
            ours = sums_at(own_scores, t, are_candidates)
            saturated, active, excess = (
                b + jnp.where(same, a, 0) for a, b in zip(sums_before(t), ours, strict=True)
            )
            return saturated, active, excess

        # The last chunk's tau is near, but another document's would show in the last bit.
        hint = jnp.where(same, guess, -jnp.inf)
        tau, num_active = solve(sums, num_selected, cut, following, hint)

        next_start = starts[first + chunk]
        after = _insert(
            before._replace(costs=jnp.where(next_start == starts[first], before.costs, jnp.inf)),
            own._replace(costs=jnp.where(own.places >= next_start, own.costs, jnp.inf)),
            chunk,
        )
        guess = jnp.where(next_start == own_starts[-1], tau[-1], -jnp.inf)
        return (after, guess), (tau, num_active, cut, cut_place, before.places[:num_selected])

    length = num_chunks * chunk
    nothing = _Sorted(jnp.full(length, jnp.inf), jnp.full(length, -1))
    firsts = jnp.arange(num_chunks) * chunk
    found: tuple[Array, ...] = jax.lax.scan(step, (nothing, jnp.asarray(-jnp.inf)), firsts)[1]
    return found


def _cut(
    best: _Sorted, own: _Sorted, candidates: Callable[[Array], Array], num_selected: int
) -> tuple[Array, Array, Array]:
    """Every query's num_selected-th score, the next, and the position of the first of them.

    Counted along all that may be selected, by falling score: `best` is sorted and earlier.
    """
    costs = jnp.concatenate([best.costs, own.costs])
    order = jnp.argsort(costs, stable=True)
    ranked = jnp.append(-costs[order], -jnp.inf)
    places = jnp.concatenate([best.places, own.places])[order]
    rank = jnp.cumsum(candidates(places), axis=1)
    kth, following = (rank < num_selected).sum(1), (rank <= num_selected).sum(1)
    return ranked[kth], ranked[following], jnp.append(places, 0)[kth]


def _sums_of_sorted(
    costs: Float32[Array, " time"], num_selected: int, block: int
) -> Callable[[Array], Sums]:
    """`sums_at` of many scores at many thresholds, by two searches each."""
    held = jnp.isfinite(costs)
    # Summed up and down from the num_selected-th, and relative to it: from the largest on, a few
    # large scores left errors of 1e-3 in the gates.
    middle = jnp.minimum(num_selected, held.sum()) - 1
    center = jnp.where(held[0], costs[middle], 0.0)
    above = jnp.where(held, center - costs, 0.0)
    below = _running_sum(jnp.where(jnp.arange(costs.size) >= middle, above, 0.0), block)
    above = jnp.where(jnp.arange(num_selected) < middle, above[:num_selected], 0.0)
    above = jax.lax.cumsum(above, reverse=True)
    until = jnp.pad(below, (1, 0)) - jnp.pad(above, (0, costs.size + 1 - num_selected))

    def sums(t: Array) -> Sums:
        bounds, strictly = jnp.stack([-(t + 1), -t]), jnp.array([[True], [False]])
        saturated, positive = _first_above(costs, bounds, strictly)
        active = positive - saturated
        return saturated, active, until[positive] - until[saturated] - active * (t + center)

    return sums


def _insert(old: _Sorted, new: _Sorted, block: int) -> _Sorted:
    """The sorted `old` with `new`, which come in any order and later; as long as `old`.

    Sorting all anew takes five times as long: 0.05 us per number on one CPU core.
    """
    size = old.costs.size
    order = jnp.argsort(new.costs, stable=True)
    new = _Sorted(new.costs[order], new.places[order])
    targets = _first_above(old.costs, new.costs, True) + jnp.arange(order.size)
    is_new = jnp.zeros(size).at[targets].set(1, mode="drop")
    num_new = _running_sum(is_new, block).astype(jnp.int32)
    source = jnp.where(is_new > 0, size + num_new - 1, jnp.arange(size) - num_new)
    costs = jnp.concatenate([old.costs, new.costs])[source]
    places = jnp.concatenate([old.places, new.places])[source]
    return _Sorted(costs, jnp.where(jnp.isfinite(costs), places, -1))


def _running_sum(x: Float32[Array, " time"], block: int) -> Float32[Array, " time"]:
    """Sums up to and with each number, by a product within blocks: half the time of jnp.cumsum."""
    ones = jnp.triu(jnp.ones((block, block)))
    within = jnp.matmul(x.reshape(-1, block), ones, precision="highest")
    totals = within[:, -1]
    return (within + (jnp.cumsum(totals) - totals)[:, None]).reshape(-1)


def _first_above(
    values: Float32[Array, " time"],
    bounds: Float32[Array, "*queries"],
    strictly: Array | bool,
    low: Array | int = 0,
    high: Array | int | None = None,
) -> Int[Array, "*queries"]:
    """Where, from `low` on, values that do not fall come to the bound, or above it if strictly.

    `high` where they do not before it. What jnp.searchsorted does for both sides in one search.
    """

    def halve(_: Array, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = (low + high) // 2
        value = values.at[middle].get(mode="clip")
        above = (low >= high) | jnp.where(strictly, value > bounds, value >= bounds)
        return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

    ends = (jnp.broadcast_to(x, bounds.shape) for x in (low, values.size if high is None else high))
    return jax.lax.fori_loop(0, values.size.bit_length(), halve, tuple(ends))[1]


def gradient_by_tau(
    plan: Plan,
    scores: Float32[Array, " time"],
    tau: Float32[Array, " time"],
    weight: Float32[Array, " time"],
    starts: Int[Array, " time"],
) -> Float32[Array, " time"]:
    """Gradient of one key head's scores by way of tau, where tau's is `weight` per active score.

    Within a document tau never falls: one candidate more can only raise it. So the queries for
    which a score is active, tau < score < tau + 1, follow one another, and what they send back is
    the difference of two sums along time.
    """
    time = scores.size
    index = jnp.arange(time)
    begins = jnp.append(starts[1:] == index[1:], True)
    ends = jax.lax.cummin(jnp.where(begins, index + 1, time), reverse=True)
    bounds, strictly = jnp.stack([scores - 1, scores]), jnp.array([[True], [False]])
    low = jnp.minimum(index + plan.window, ends)
    first, last = _first_above(tau, bounds, strictly, low, ends)
    # Summed from the end: tau is shared by ever more scores, so late terms are the small ones.
    since = jnp.append(jax.lax.cumsum(weight, reverse=True), 0.0)
    return since[first] - since[last]
