"""Softmax over the newest keys and the selected ones, chunk by chunk of queries.

What a chunk's queries select lies among the best candidates before the chunk and the chunk's own
candidates, so a chunk is one small dense attention under a mask, and memory is linear in time.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from mainrun.model.layers import DropoutKeys, dropout
from mainrun.model.sparsek.gates import clip, largest, sparsek
from mainrun.model.sparsek.selection import Plan, Selection, gradient_by_tau, outranks, select


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
    plan = Plan(
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
    cut = largest(ranked, count)[..., -1:]
    missing = count - (ranked > cut).sum(-1, keepdims=True)
    earliest = jnp.where(ranked == cut, -positions.astype(jnp.float32), -jnp.inf)
    cut_place = -jnp.take_along_axis(largest(earliest, count), missing - 1, axis=-1)
    selected = candidate & outranks(scores, positions, cut, cut_place)
    gates = jnp.where(window, 1.0, sparsek(scores, num_selected, candidate))
    grouped = q.reshape(*k.shape[:2], -1, 1, q.shape[-1])
    mixed = _mix(grouped, k, v, gates[:, :, None], (window | selected)[:, :, None], None, 0.0)
    return mixed.reshape(q.shape)


class _Inputs(NamedTuple):
    q: Array
    k: Array
    v: Array
    scores: Array
    starts: Array  # [batch, time]: where each position's document begins
    dropout_keys: Array | None


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

    plan: Plan
    q: Float[Array, "batch kv_heads group whole_chunks dim"]
    k: Float[Array, "batch kv_heads shifted dim"]
    v: Float[Array, "batch kv_heads shifted dim"]
    scores: Float32[Array, "batch kv_heads shifted"]
    starts: Int[Array, "batch whole_chunks"]
    dropout_keys: DropoutKeys | None
    selection: Selection

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
        seen = in_window | outranks(scores, places, cut, cut_place)
        seen &= (places >= starts) & (places <= queries)
        gates = jnp.where(in_window, 1.0, clip(scores - part.tau[..., None]))

        keys = self.dropout_keys
        if keys is not None:  # `dropout` scrambles them, so any odd factors give chunks own masks
            odd = jnp.array([0x85EBCA6B, 0xC2B2AE35], jnp.uint32)
            keys = keys + number.astype(jnp.uint32) * odd
        k = jnp.concatenate([part.far_k, part.near_k], axis=2)
        v = jnp.concatenate([part.far_v, part.near_v], axis=2)
        return _mix(part.q, k, v, gates, seen, keys, self.plan.dropout_rate)


def _chunks(plan: Plan, inputs: _Inputs, selection: Selection) -> _Chunks:
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
    plan: Plan, x: Float[Array, "batch heads time dim"], kv_heads: int
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
def _attend(plan: Plan, *inputs: Array | None) -> Array:
    return _attend_forward(plan, *inputs)[0]


def _attend_forward(
    plan: Plan, *arguments: Array | None
) -> tuple[Array, tuple[_Inputs, Selection]]:
    inputs = _Inputs._make(arguments)
    selection = select(plan, inputs.scores, inputs.starts)
    chunks = _chunks(plan, inputs, selection)
    numbers = jnp.arange(selection.far.shape[0])
    out = jax.lax.map(lambda number: chunks.mixed(number, chunks.part(number)), numbers)
    return _ungrouped(out, inputs.q.shape[2]), (inputs, selection)


def _attend_backward(
    plan: Plan, saved: tuple[_Inputs, Selection], dout: Array
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
    by_tau = jax.vmap(jax.vmap(partial(gradient_by_tau, plan), (0, 0, 0, None)))
    dscores = dscores + by_tau(scores, selection.tau[:, :, :time], weight, starts)
    dq = _ungrouped(dq, time)
    return dq, dk.astype(k.dtype), dv.astype(v.dtype), dscores, None, None


_attend.defvjp(_attend_forward, _attend_backward)
