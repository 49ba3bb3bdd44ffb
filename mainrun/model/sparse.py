"""Attention in the sparse patterns that computes little more than what they let a query see.

A pattern is one or two views of the text. A view cuts the queries into tiles and lays beside each
tile the few keys that it may need, by reshapes, shifts and static slices: a gather's backward pass
is a scatter, slow on a CPU. Which of these pairs count is asked of the predicates in `masks`, at
the positions that the same cut brings there, so that no pattern is defined twice. The views of a
pattern share no pair and are under one softmax. Memory and time are those of the pairs laid out
instead of time x time. Child et al. 2019 (arXiv:1904.10509), section 4.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int

from mainrun import config
from mainrun.model import masks
from mainrun.model.layers import DropoutKeys, DropoutRate, dropout

Tiled = config.CausalAttention | config.SparseAttention
"""The kinds whose keys follow from positions alone."""

_TILE = 32
"""Fewest queries of a tile. In tiles of 64 a window of 32 took 1.3 times the CPU time and 1.5 times
the memory (time 1024)."""

_WORTH_IT = 0.55
"""At 0.5 of the scores the step took 0.6 to 0.7 of dense attention's time and 0.7 to 0.9 of its
memory, at 0.65 to 0.75 as much of both (forward and backward, CPU, time 512 and 1024)."""

_SITES = (0, 10)
"""Dropout sites of a pattern's views. The first is dense attention's."""


def attend(
    q: Float[Array, "batch heads time dim"],
    k: Float[Array, "batch kv_heads time dim"],
    v: Float[Array, "batch kv_heads time value_dim"],
    attention: Tiled,
    segment_ids: Int[Array, "batch time"] | None = None,
    dropout_keys: DropoutKeys | None = None,
    dropout_rate: float | DropoutRate = 0.0,
) -> Float[Array, "batch heads time value_dim"]:
    """What dense attention gives under `masks.of_attention`; grouped when kv_heads < heads.

    With `segment_ids`, positions see only their own document. Scores and softmax are float32
    whatever the inputs. The time may be any: it is padded within, and padding is never seen.
    """
    batch, heads, time, _ = q.shape
    parts = views(attention, time, heads)
    if any(view.heads > 1 for view in parts):
        k, v = _for_each_head(k, heads), _for_each_head(v, heads)
    # Time is axis 2 everywhere. The queries that share a key stand behind it, so that the scores of
    # a tile are one product.
    q = q.reshape(batch, k.shape[1], -1, *q.shape[2:]).swapaxes(2, 3)

    scores = [_scores(view, q, k, segment_ids) for view in parts]
    # The softmax is the same whatever is subtracted, so no gradient goes that way.
    highest = [
        view.restored(jax.lax.stop_gradient(each).max(-1, keepdims=True), time)
        for view, each in zip(parts, scores, strict=True)
    ]
    top = functools.reduce(jnp.maximum, highest)
    totals, mixtures = [], []
    for view, each, site in zip(parts, scores, _SITES, strict=False):
        weights = jnp.exp(each - view.queries(top))
        totals.append(view.restored(weights.sum(-1, keepdims=True), time))
        weights = dropout(weights, dropout_keys, site, dropout_rate).astype(v.dtype)
        mixture = jnp.einsum(
            "bhtqgk,bhtkd->bhtqgd", weights, view.keys(v), preferred_element_type=jnp.float32
        )
        mixtures.append(view.restored(mixture, time))
    mixed = functools.reduce(jnp.add, mixtures) / functools.reduce(jnp.add, totals)
    return mixed.astype(v.dtype).swapaxes(2, 3).reshape(batch, heads, time, -1)


def saves(attention: Tiled, time: int) -> bool:
    """Whether `attend` is worth it here: its tiles hold clearly fewer scores than time x time."""
    scores = sum(view.padded(time) * view.keys_per_query for view in views(attention, time, 1))
    return scores < _WORTH_IT * time**2


Layout = Callable[[Array], Array]


@dataclass(frozen=True)
class View:
    """Tiles of queries, the keys that lie beside each, and which of these pairs count.

    The layouts take an array [batch, heads, time, ...] whose time is a multiple of `unit`.
    """

    cut: Layout  # to tiles of queries, [batch, heads, tiles, queries, ...]
    uncut: Layout  # its inverse
    beside: Layout  # to the keys of each tile, [batch, heads, tiles, keys, ...]
    unit: int
    keys_per_query: int
    mask: masks.Mask
    heads: int = 1  # if more, every head has other keys

    def padded(self, time: int) -> int:
        return -(-time // self.unit) * self.unit

    def queries(self, x: Array) -> Array:
        return self.cut(self._pad(x))

    def keys(self, x: Array) -> Array:
        return self.beside(self._pad(x))

    def restored(self, tiles: Array, time: int) -> Array:
        return self.uncut(tiles)[:, :, :time]

    def _pad(self, x: Array) -> Array:
        missing = self.padded(x.shape[2]) - x.shape[2]
        return jnp.pad(x, [(0, missing if axis == 2 else 0) for axis in range(x.ndim)])


def views(attention: Tiled, time: int, heads: int) -> tuple[View, ...]:
    """The views that make up the pattern, the queries themselves among the keys of the first."""
    match attention:
        case config.CausalAttention(window_including_self=int(window)):
            seen = masks.causal & masks.window_including_self(window)
            return (_band(time, window, seen),)
        case config.CausalAttention():
            return (_segments(time, masks.causal),)
        case config.SparseAttention(pattern=pattern, block_size=block_size):
            return _pattern_views(pattern, block_size, time, heads)
        case _:
            assert_never(attention)


def _pattern_views(
    pattern: config.Pattern, block_size: int, time: int, heads: int
) -> tuple[View, ...]:
    seen = masks.sparse(pattern, block_size)
    match pattern:
        case config.AllKeys():
            return (_segments(time, seen),)
        case config.LocalKeys(window_including_self=window):
            return (_band(time, window, seen),)
        case config.FixedKeys(stride=stride, num_verts=num_verts, vertsize=vertsize):
            own = masks.same_segment(stride)
            columns = _columns(time, stride, vertsize * block_size, num_verts, heads, seen & ~own)
            return _segments(stride, seen & own), columns
        case config.StridedKeys(stride=stride):
            near = masks.block_window(stride, block_size)
            return (
                _band(time, stride, seen & near),
                _residues(time, stride, block_size, seen & ~near),
            )
        case _:
            assert_never(pattern)


def _band(time: int, window: int, mask: masks.Mask) -> View:
    """Each tile's own keys and those of as many tiles before it as the window reaches into."""
    window = min(window, time)
    # A long window goes by halves, half a window of queries against one and a half of keys: at 512
    # that took 0.8 of the time and memory of two whole windows of keys; at 128 it saved nothing.
    tile = max(_TILE, window if window <= 128 else -(-window // 2))
    before = min(-(-(window - 1) // tile), -(-time // tile) - 1)
    cut = functools.partial(_tiles, tile=tile)

    def beside(x: Array) -> Array:
        # The first tiles get the last ones, which lie in their future: causal masks hide them.
        own = cut(x)
        return jnp.concatenate([jnp.roll(own, i, axis=2) for i in range(before, -1, -1)], axis=3)

    return View(cut, _flat, beside, tile, (before + 1) * tile, mask)


def _segments(stride: int, mask: masks.Mask) -> View:
    """Stretches of `stride` positions against themselves, short ones several at a time."""
    tile = stride * max(1, _TILE // stride)
    cut = functools.partial(_tiles, tile=tile)
    return View(cut, _flat, cut, tile, tile, mask)


def _columns(
    time: int, stride: int, width: int, num_verts: int, heads: int, mask: masks.Mask
) -> View:
    """All queries against the summary columns of every stride, `width` positions of each.

    Heads in turn take one of `num_verts` groups of columns, counted from the stride's end.
    """

    def group(x: Array, index: int) -> Array:
        end = stride - index * width
        return _flat(_tiles(x, stride)[:, :, :, end - width : end])

    def beside(x: Array) -> Array:
        if num_verts == 1:
            return group(x, 0)[:, :, None]
        groups = [group(x[:, i::num_verts], i) for i in range(num_verts)]
        return jnp.stack(groups, axis=2).reshape(*x.shape[:2], 1, -1, *x.shape[3:])

    return View(
        cut=lambda x: x[:, :, None],
        uncut=lambda x: x[:, :, 0],
        beside=beside,
        unit=stride,
        keys_per_query=-(-time // stride) * width,
        mask=mask,
        heads=heads if num_verts > 1 else 1,
    )


def _residues(time: int, stride: int, block_size: int, mask: masks.Mask) -> View:
    """Positions whose blocks are whole strides apart, against each other."""
    blocks = stride // block_size

    def cut(x: Array) -> Array:
        by_block = x.reshape(*x.shape[:2], -1, blocks, block_size, *x.shape[3:]).swapaxes(2, 3)
        return by_block.reshape(*x.shape[:2], blocks, -1, *x.shape[3:])

    def uncut(x: Array) -> Array:
        by_block = x.reshape(*x.shape[:3], -1, block_size, *x.shape[4:]).swapaxes(2, 3)
        return by_block.reshape(*x.shape[:2], -1, *x.shape[4:])

    return View(cut, uncut, cut, stride, -(-time // stride) * block_size, mask)


def _scores(
    view: View,
    q: Float[Array, "batch kv_heads time group dim"],
    k: Float[Array, "batch kv_heads time dim"],
    segment_ids: Int[Array, "batch time"] | None,
) -> Float32[Array, "batch kv_heads tiles queries group keys"]:
    """The scaled scores of a view's pairs, -inf where the query may not look."""
    scores = jnp.einsum(
        "bhtqgd,bhtkd->bhtqgk", view.queries(q), view.keys(k), preferred_element_type=jnp.float32
    )
    seen = _seen(view, q.shape[2], segment_ids)[:, :, :, :, None]
    return jnp.where(seen, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _seen(
    view: View, time: int, segment_ids: Int[Array, "batch time"] | None
) -> Bool[Array, "#batch #kv_heads tiles queries keys"]:
    def pairs(x: Int[Array, "batch time"]) -> tuple[Array, Array]:
        of_heads = jnp.broadcast_to(x[:, None], (len(x), view.heads, x.shape[1]))
        return view.queries(x[:, None])[..., None], view.keys(of_heads)[..., None, :]

    # Padding has the positions after the text: causal masks hide it, and its own queries see it.
    queries, keys = pairs(jnp.arange(view.padded(time))[None])
    heads = jnp.arange(view.heads)[:, None, None]
    of_tiles = jax.vmap(lambda query, key: view.mask(query, key, heads), in_axes=1, out_axes=1)
    seen = of_tiles(queries[0], keys[0])[None]
    if segment_ids is not None:
        queries, keys = pairs(segment_ids)
        seen = seen & (queries == keys)
    return seen


def _tiles(x: Array, tile: int) -> Array:
    return x.reshape(*x.shape[:2], -1, tile, *x.shape[3:])


def _flat(tiles: Array) -> Array:
    return tiles.reshape(*tiles.shape[:2], -1, *tiles.shape[4:])


def _for_each_head(
    x: Float[Array, "batch kv_heads time dim"], heads: int
) -> Float[Array, "batch heads time dim"]:
    batch, kv_heads, *rest = x.shape
    groups = jnp.broadcast_to(x[:, :, None], (batch, kv_heads, heads // kv_heads, *rest))
    return groups.reshape(batch, heads, *rest)
