"""What a layer of attention remembers of the text so far, so that one more token costs one token.

A cache is a dict of arrays whose time axis is a ring: position p lies in slot p mod capacity, and
`positions` says which position each slot holds, -1 for none. A kind that never looks back further
than a window needs no more slots than that. What the arrays are is the business of each kind.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

Cache = dict[str, Array]


class Span(NamedTuple):
    """The stretch of text in hand: the position of each token, and its document where masked."""

    positions: Int[Array, " time"]
    segment_ids: Int[Array, "batch time"] | None = None


def empty(capacity: int, **like: Array) -> Cache:
    """Room for `capacity` positions of arrays like these, [batch, ..., time, width]."""
    slots = {
        name: jnp.zeros((*array.shape[:-2], capacity, array.shape[-1]), array.dtype)
        for name, array in like.items()
    }
    return slots | {"positions": jnp.full(capacity, -1, jnp.int32)}


def written(cache: Cache, positions: Int[Array, " time"], **new: Array) -> Cache:
    """The cache with these positions in it; of more than fit, the newest."""
    capacity = len(cache["positions"])
    positions = positions[-capacity:]
    slots = positions % capacity
    arrays = {
        name: cache[name].at[..., slots, :].set(array[..., -capacity:, :])
        for name, array in new.items()
    }
    return arrays | {"positions": cache["positions"].at[slots].set(positions)}


def filled(cache: Cache) -> Bool[Array, " capacity"]:
    """The slots that hold a position."""
    return cache["positions"] >= 0
