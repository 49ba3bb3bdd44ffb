"""Who may look at whom: predicates on positions, joined with `&`, `|` and `~`.

A predicate is asked about whatever positions are at hand: all pairs at once (`grid`), one query
against a cache of keys, or the few keys that a tile of a sparse pattern holds. Nothing here knows
how attention is computed. Child et al. 2019 (arXiv:1904.10509), section 4, for the sparse patterns;
their block form, and what `num_verts` and `vertsize` mean, from OpenAI's `sparse_attention`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import assert_never

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mainrun import config


@dataclass(frozen=True, eq=False)
class Mask:
    """A predicate: may the query at position `query` look at the key at position `key`?

    `query`, `key` and `head` are index arrays that broadcast against each other as
    [heads, queries, keys]; a predicate that knows a batch puts its axis in front.
    """

    sees: Callable[[Array, Array, Array], Array]

    def __call__(
        self,
        query: Int[Array, "#heads #queries 1"],
        key: Int[Array, "#heads #queries #keys"],
        head: Int[Array, "#heads 1 1"],
    ) -> Bool[Array, "..."]:
        return self.sees(query, key, head)

    def __and__(self, other: "Mask") -> "Mask":
        return Mask(lambda q, k, h: self.sees(q, k, h) & other.sees(q, k, h))

    def __or__(self, other: "Mask") -> "Mask":
        return Mask(lambda q, k, h: self.sees(q, k, h) | other.sees(q, k, h))

    def __invert__(self) -> "Mask":
        return Mask(lambda q, k, h: ~self.sees(q, k, h))


causal = Mask(lambda q, k, h: k <= q)
"""Each position sees itself and what came before."""


def window_including_self(size: int) -> Mask:
    """The `size` newest keys, the query's own among them. Joined with `causal`."""
    return Mask(lambda q, k, h: q - k < size)


def same_document(segment_ids: Int[Array, "batch time"]) -> Mask:
    """Positions see only positions of their own document. Knows the batch."""
    return Mask(lambda q, k, h: segment_ids[:, q] == segment_ids[:, k])


def same_segment(stride: int) -> Mask:
    """Keys of the query's own stretch of `stride` positions, counted from the first."""
    return Mask(lambda q, k, h: q // stride == k // stride)


def summary_columns(stride: int, num_verts: int, vertsize: int, block_size: int) -> Mask:
    """The last blocks of every stride: `vertsize` of them, another group for each head in turn.

    Head h takes the group h mod `num_verts`, counted from the stride's end.
    """
    blocks = stride // block_size

    def sees(q: Array, k: Array, h: Array) -> Array:
        from_end = blocks - 1 - k // block_size % blocks
        return from_end // vertsize == h % num_verts

    return Mask(sees)


def every(stride: int, block_size: int) -> Mask:
    """Keys whose block is a whole number of strides away from the query's."""
    blocks = stride // block_size
    return Mask(lambda q, k, h: (q // block_size - k // block_size) % blocks == 0)


def block_window(size: int, block_size: int) -> Mask:
    """The newest `size` positions' blocks, the query's own block among them."""
    blocks = size // block_size
    return Mask(lambda q, k, h: q // block_size - k // block_size < blocks)


def sparse(pattern: config.Pattern, block_size: int) -> Mask:
    """What a head sees in one of the patterns of Child et al., both of its factors in each head.

    With `block_size` 1 the pattern is drawn token by token; else in square tiles of that edge, and
    the tiles on the diagonal are causal.
    """
    match pattern:
        case config.AllKeys():
            return causal
        case config.LocalKeys(window_including_self=size):
            return causal & block_window(size, block_size)
        case config.FixedKeys(stride=stride, num_verts=num_verts, vertsize=vertsize):
            columns = summary_columns(stride, num_verts, vertsize, block_size)
            return causal & (same_segment(stride) | columns)
        case config.StridedKeys(stride=stride):
            return causal & (block_window(stride, block_size) | every(stride, block_size))
        case _:
            assert_never(pattern)


def of_attention(attention: config.Attention) -> Mask:
    """What the settings let a query see of its own text, SparseK's selection left out."""
    match attention:
        case config.CausalAttention(window_including_self=int(size)):
            return causal & window_including_self(size)
        case config.SparseAttention(pattern=pattern, block_size=block_size):
            return sparse(pattern, block_size)
        case _:
            return causal


def grid(
    mask: Mask,
    queries: Int[Array, " queries"],
    keys: Int[Array, " keys"],
    num_heads: int,
) -> Bool[Array, "#batch #heads queries keys"]:
    """The mask for all pairs of these positions; axes of size 1 where it knows no batch or head."""
    heads = jnp.arange(num_heads)[:, None, None]
    allowed = mask(queries[None, :, None], keys[None, None, :], heads)
    return allowed if allowed.ndim == 4 else allowed[None]
