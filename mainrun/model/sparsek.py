"""SparseK attention: the newest keys, and the few of the rest that a learned score selects.

Lou et al. 2024 (arXiv:2406.16747). A key farther back than the window is a candidate; of a query's
candidates the `num_selected` with the largest scores are seen, key and value multiplied by the gate
that `sparsek` gives them. Selection and gates are those of the query's own prefix, so nothing later
is ever looked at. Projections and scores are made elsewhere.

Queries go by in chunks. What a chunk's queries select lies among the best candidates before the
chunk and the chunk's own candidates, so a chunk is one small dense attention under a mask, and
memory is linear in time. The gates' threshold tau depends on all candidates; a copy of the scores
that is kept sorted gives it exactly, at time / chunk numbers per query (128 of them at 8192).
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from mainrun.model.layers import DropoutKeys, dropout


def attend(
    q: Float[Array, "batch heads time dim"],
    k: Float[Array, "batch kv_heads time dim"],
    v: Float[Array, "batch kv_heads time dim"],
    scores: Float32[Array, "batch kv_heads time"],
    *,
    num_selected: int,
    window_including_self: int,
    segment_ids: Int[Array, "batch time"] | None = None,
    dropout_keys: DropoutKeys | None = None,
    dropout_rate: float = 0.0,
    chunk: int = 64,
) -> Float[Array, "batch heads time dim"]:
    """One softmax over the `window_including_self` newest keys and the selected older ones.

    `scores` say how important a key is, whoever asks; query head h uses key head
    h // (heads / kv_heads). Of equal scores the earlier is selected. `segment_ids` do not decrease
    along time; positions see only their own segment. Gradients reach the scores through the gates,
    tau included. Logits, softmax and gates are float32 whatever the inputs. `chunk` queries are
    worked on at once, which moves the cost and not the result: of 32, 64 and 128, 64 was fastest
    on two CPU cores at 512 to 8192 tokens, 64 keys in the window and 64 selected.
    """
    batch, _, time, _ = q.shape
    window = min(window_including_self, time)
    plan = _Plan(
        # The last query has time - window candidates, so no query can select more.
        num_selected=min(num_selected, max(1, time - window)),
        window=window,
        chunk=min(chunk, time),
        dropout_rate=dropout_rate,
    )
    starts = jnp.zeros((batch, time), jnp.int32)
    if segment_ids is not None:
        new = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = starts.at[:, 1:].set(jnp.where(new, jnp.arange(1, time), 0))
        starts = jax.lax.cummax(starts, axis=1)
    return _attend(plan, *_Inputs(q, k, v, scores, starts, dropout_keys))


def decode(
    q: Float[Array, "batch heads 1 dim"],
    k: Float[Array, "batch kv_heads length dim"],
    v: Float[Array, "batch kv_heads length dim"],
    scores: Float32[Array, "batch kv_heads length"],
    *,
    query_position: Int[Array, ""] | int,
    positions: Int[Array, " length"],
    num_selected: int,
    window_including_self: int,
) -> Float[Array, "batch heads 1 dim"]:
    """What `attend` gives the query at `query_position`, from a cache in any order.

    `positions` says which position each slot of the cache holds, -1 for none; the query's own key
    is among them.
    """
    newest_candidate = query_position - window_including_self
    candidate = (positions >= 0) & (positions <= newest_candidate)
    window = (positions >= 0) & (positions > newest_candidate) & (positions <= query_position)

    # The last one selected: by score, then of equal scores by position.
    count = min(num_selected, scores.shape[-1])
    ranked = jnp.where(candidate, scores, -jnp.inf)
    cut = _largest(ranked, count)[..., -1:]
    missing = count - (ranked > cut).sum(-1, keepdims=True)
    earliest = jnp.where(ranked == cut, -positions.astype(jnp.float32), -jnp.inf)
    cut_place = -jnp.take_along_axis(_largest(earliest, count), missing - 1, axis=-1)
    selected = candidate & _outranks(scores, positions, cut, cut_place)
    gates = jnp.where(window, 1.0, sparsek(scores, num_selected, candidate))
    grouped = q.reshape(*k.shape[:2], -1, 1, q.shape[-1])
    mixed = _mix(grouped, k, v, gates[:, :, None], (window | selected)[:, :, None], None, 0.0)
    return mixed.reshape(q.shape)


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
    kth, following = jnp.moveaxis(_largest(fixed, num_selected + 1)[..., -2:], -1, 0)
    t, _ = _solve(partial(_sums, fixed), num_selected, kth, following, kth)
    # One more step of Newton's method gives tau its gradient: the mean of the active scores'.
    saturated, active, excess = _sums(masked, jnp.where(jnp.isfinite(t), t, 0.0))
    step = (excess + (saturated - num_selected)) / jnp.maximum(active, 1)
    tau = t + jnp.where(active > 0, step, 0.0)
    return jnp.where(valid, _clip(scores - tau[..., None]), 0.0)


def _largest(x: Array, count: int) -> Array:
    """The `count` largest along the last axis, falling.

    Without the barrier XLA:CPU may join what is sliced from them with the slice that top_k is, no
    longer sees a top_k and sorts everything: 11 ms for 8 x 8192 numbers where this takes 0.3.
    """
    return jax.lax.optimization_barrier(jax.lax.top_k(x, count)[0])


class _Plan(NamedTuple):
    num_selected: int
    window: int
    chunk: int
    dropout_rate: float


class _Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    scores: Array
    starts: Array  # [batch, time]: where each position's document begins
    dropout_keys: Array | None


# --- tau ------------------------------------------------------------------------------------------

_Sums = tuple[Array, Array, Array]
"""Of scores z at a threshold t: how many gates are 1, how many between 0 and 1, and their sum."""


def _sums(scores: Array, t: Array, valid: Array | bool = True) -> _Sums:
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


def _solve(
    sums: Callable[[Array], _Sums], num_selected: int, kth: Array, following: Array, guess: Array
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


# --- selection ------------------------------------------------------------------------------------


class _Sorted(NamedTuple):
    """Scores and positions by falling score; of equal scores the earlier comes first."""

    costs: Float32[Array, " entries"]  # minus the score; inf where there is none
    places: Int[Array, " entries"]  # -1 where there is none


class _Selection(NamedTuple):
    """What the gates of every query follow from, and the keys a chunk may need from before it."""

    tau: Float32[Array, "batch kv_heads whole_chunks"]
    num_active: Int[Array, "batch kv_heads whole_chunks"]
    cut: Float32[Array, "batch kv_heads whole_chunks"]  # the last score selected; -inf: all are
    cut_place: Int[Array, "batch kv_heads whole_chunks"]
    far: Int[Array, "chunks batch kv_heads selected"]  # positions of the best so far


def _outranks(scores: Array, places: Array, cut: Array, cut_place: Array) -> Array:
    """Is this candidate selected, where the last one selected is `cut`?"""
    return (scores > cut) | (scores == cut) & (places <= cut_place)


def _select(
    plan: _Plan,
    scores: Float32[Array, "batch kv_heads time"],
    starts: Int[Array, "batch time"],
) -> _Selection:
    per_head = jax.vmap(partial(_select_row, plan), (0, None))
    *per_query, far = jax.vmap(per_head)(scores, starts)
    tau, num_active, cut, cut_place = (x.reshape(*x.shape[:2], -1) for x in per_query)
    return _Selection(tau, num_active, cut, cut_place, jnp.moveaxis(far, 2, 0))


def _select_row(
    plan: _Plan, scores: Float32[Array, " time"], starts: Int[Array, " time"]
) -> tuple[Array, ...]:
    """The fields of `_Selection` for one key head, with an axis of chunks in front."""
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

        def sums(t: Array) -> _Sums:
            ours = _sums(own_scores, t, are_candidates)
            saturated, active, excess = (
                b + jnp.where(same, a, 0) for a, b in zip(sums_before(t), ours, strict=True)
            )
            return saturated, active, excess

        # The last chunk's tau is near, but another document's would show in the last bit.
        hint = jnp.where(same, guess, -jnp.inf)
        tau, num_active = _solve(sums, num_selected, cut, following, hint)

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
) -> Callable[[Array], _Sums]:
    """`_sums` of many scores at many thresholds, by two searches each."""
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

    def sums(t: Array) -> _Sums:
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


def _gradient_by_tau(
    plan: _Plan,
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


# --- attention ------------------------------------------------------------------------------------


def _clip(x: Array) -> Array:
    return jax.lax.clamp(0.0, x, 1.0)  # jnp.clip has a gradient of 1/2 at 0 and at 1


def _mix(
    q: Float[Array, "batch kv_heads group queries dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys dim"],
    gates: Float32[Array, "batch kv_heads queries keys"],
    seen: Bool[Array, "batch kv_heads queries keys"],
    dropout_keys: DropoutKeys | None,
    dropout_rate: float,
) -> Float[Array, "batch kv_heads group queries dim"]:
    """Softmax attention with gated keys and values; a gate scales the logit for the key."""
    gates, seen = gates[:, :, None], seen[:, :, None]
    logits = jnp.einsum("bgrqd,bgkd->bgrqk", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(seen, logits * q.shape[-1] ** -0.5 * gates, -jnp.inf)
    weights = dropout(jax.nn.softmax(logits, axis=-1), dropout_keys, 0, dropout_rate) * gates
    return jnp.einsum("bgrqk,bgkd->bgrqd", weights.astype(v.dtype), v)


class _Part(NamedTuple):
    """What one chunk's output is made of: `near` reach back by the window, `far` are selected."""

    q: Float[Array, "batch kv_heads group chunk dim"]
    tau: Float32[Array, "batch kv_heads chunk"]
    near_k: Float[Array, "batch kv_heads near dim"]
    near_v: Float[Array, "batch kv_heads near dim"]
    near_scores: Float32[Array, "batch kv_heads near"]
    far_k: Float[Array, "batch kv_heads selected dim"]
    far_v: Float[Array, "batch kv_heads selected dim"]
    far_scores: Float32[Array, "batch kv_heads selected"]


class _Chunks(NamedTuple):
    """The inputs as whole chunks; of keys and scores, position p stands at index p + window."""

    plan: _Plan
    q: Float[Array, "batch kv_heads group whole_chunks dim"]
    k: Float[Array, "batch kv_heads shifted dim"]
    v: Float[Array, "batch kv_heads shifted dim"]
    scores: Float32[Array, "batch kv_heads shifted"]
    starts: Int[Array, "batch whole_chunks"]
    dropout_keys: DropoutKeys | None
    selection: _Selection

    def own(self, x: Array, number: Array, axis: int) -> Array:
        return jax.lax.dynamic_slice_in_dim(x, number * self.plan.chunk, self.plan.chunk, axis)

    def near(self, x: Array, number: Array) -> Array:
        size = self.plan.window + self.plan.chunk
        return jax.lax.dynamic_slice_in_dim(x, number * self.plan.chunk, size, axis=2)

    def far(self, x: Array, number: Array) -> Array:
        index = self.selection.far[number] + self.plan.window
        index = index.reshape(*index.shape, *[1] * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=2, mode="promise_in_bounds")

    def part(self, number: Array) -> _Part:
        return _Part(
            self.own(self.q, number, 3),
            self.own(self.selection.tau, number, 2),
            *(self.near(x, number) for x in (self.k, self.v, self.scores)),
            *(self.far(x, number) for x in (self.k, self.v, self.scores)),
        )

    def add(self, total: Array, number: Array, near: Array, far: Array) -> Array:
        """`total` plus what this chunk's near and far rows get; in place inside a loop."""
        start = number * self.plan.chunk
        near = near + self.near(total, number)
        total = jax.lax.dynamic_update_slice_in_dim(total, near, start, axis=2)
        index = self.selection.far[number] + self.plan.window
        return jax.vmap(jax.vmap(lambda x, i, rows: x.at[i].add(rows)))(total, index, far)

    def mixed(self, number: Array, part: _Part) -> Float[Array, "batch kv_heads group chunk dim"]:
        """The output of this chunk's queries."""
        window, chunk = self.plan.window, self.plan.chunk
        queries = number * chunk + jnp.arange(chunk)[:, None]
        far = self.selection.far[number]
        near = number * chunk - window + jnp.arange(window + chunk)
        near = jnp.broadcast_to(near, (*far.shape[:2], near.size))
        places = jnp.concatenate([far, near], axis=-1)[:, :, None]
        scores = jnp.concatenate([part.far_scores, part.near_scores], axis=-1)[:, :, None]

        cut = self.own(self.selection.cut, number, 2)[..., None]
        cut_place = self.own(self.selection.cut_place, number, 2)[..., None]
        starts = self.own(self.starts, number, 1)[:, None, :, None]
        in_window = places > queries - window
        seen = in_window | _outranks(scores, places, cut, cut_place)
        seen &= (places >= starts) & (places <= queries)
        gates = jnp.where(in_window, 1.0, _clip(scores - part.tau[..., None]))

        keys = self.dropout_keys
        if keys is not None:  # `dropout` scrambles them, so any odd factors give chunks own masks
            odd = jnp.array([0x85EBCA6B, 0xC2B2AE35], jnp.uint32)
            keys = keys + number.astype(jnp.uint32) * odd
        k = jnp.concatenate([part.far_k, part.near_k], axis=2)
        v = jnp.concatenate([part.far_v, part.near_v], axis=2)
        return _mix(part.q, k, v, gates, seen, keys, self.plan.dropout_rate)


def _chunks(plan: _Plan, inputs: _Inputs, selection: _Selection) -> _Chunks:
    q, k, v, scores, starts, dropout_keys = inputs
    time = q.shape[2]
    ahead = (plan.window, -time % plan.chunk)
    rows = ((0, 0), (0, 0), ahead)
    return _Chunks(
        plan,
        _grouped(plan, q, k.shape[1]),
        jnp.pad(k, (*rows, (0, 0))),
        jnp.pad(v, (*rows, (0, 0))),
        jnp.pad(scores, rows),
        jnp.pad(starts, ((0, 0), (0, ahead[1])), constant_values=time),
        dropout_keys,
        selection,
    )


def _grouped(
    plan: _Plan, x: Float[Array, "batch heads time dim"], kv_heads: int
) -> Float[Array, "batch kv_heads group whole_chunks dim"]:
    x = x.reshape(x.shape[0], kv_heads, -1, *x.shape[2:])
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, -x.shape[3] % plan.chunk), (0, 0)))


def _ungrouped(
    x: Float[Array, "chunks batch kv_heads group chunk dim"], time: int
) -> Float[Array, "batch heads time dim"]:
    chunks, batch, kv_heads, group, chunk, dim = x.shape
    joined = jnp.moveaxis(x, 0, 3).reshape(batch, kv_heads * group, chunks * chunk, dim)
    return joined[:, :, :time]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(plan: _Plan, *inputs: Array | None) -> Array:
    return _attend_forward(plan, *inputs)[0]


def _attend_forward(
    plan: _Plan, *arguments: Array | None
) -> tuple[Array, tuple[_Inputs, _Selection]]:
    inputs = _Inputs._make(arguments)
    selection = _select(plan, inputs.scores, inputs.starts)
    chunks = _chunks(plan, inputs, selection)
    numbers = jnp.arange(selection.far.shape[0])
    out = jax.lax.map(lambda number: chunks.mixed(number, chunks.part(number)), numbers)
    return _ungrouped(out, inputs.q.shape[2]), (inputs, selection)


def _attend_backward(
    plan: _Plan, saved: tuple[_Inputs, _Selection], dout: Array
) -> tuple[Array | None, ...]:
    """A chunk's own gradient is autodiff's, computed anew; by hand only where it is added up.

    Left to autodiff, every chunk would add arrays as long as the text.
    """
    inputs, selection = saved
    q, k, v, scores, starts, _ = inputs
    time = q.shape[2]
    chunks = _chunks(plan, inputs, selection)
    dout = _grouped(plan, dout, k.shape[1])

    def step(totals: tuple[Array, ...], number: Array) -> tuple[tuple[Array, ...], tuple]:
        pull = jax.vjp(partial(chunks.mixed, number), chunks.part(number))[1]
        d: _Part = pull(chunks.own(dout, number, 3))[0]
        dk, dv, dscores = totals
        totals = (
            chunks.add(dk, number, d.near_k.astype(dk.dtype), d.far_k.astype(dk.dtype)),
            chunks.add(dv, number, d.near_v.astype(dv.dtype), d.far_v.astype(dv.dtype)),
            chunks.add(dscores, number, d.near_scores, d.far_scores),
        )
        return totals, (d.q, d.tau)

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (chunks.k, chunks.v, chunks.scores))
    numbers = jnp.arange(selection.far.shape[0])
    totals, (dq, dtau) = jax.lax.scan(step, zeros, numbers)
    dk, dv, dscores = (x[:, :, plan.window : plan.window + time] for x in totals)
    dtau = jnp.moveaxis(dtau, 0, 2).reshape(selection.tau.shape)
    weight = (dtau / jnp.maximum(selection.num_active, 1))[:, :, :time]
    by_tau = jax.vmap(jax.vmap(partial(_gradient_by_tau, plan), (0, 0, 0, None)))
    dscores = dscores + by_tau(scores, selection.tau[:, :, :time], weight, starts)
    dq = _ungrouped(dq, time)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dscores, None, None


_attend.defvjp(_attend_forward, _attend_backward)
