"""Who may look at whom: boolean masks over (query, key) positions, True where looking is allowed.

Masks are plain arrays that broadcast over batch and heads, so they join with `&` and `|`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def causal(time: int) -> Bool[Array, "1 1 {time} {time}"]:
    """Each position sees itself and what came before."""
    position = jnp.arange(time)
    return (position[:, None] >= position[None, :])[None, None]


def same_document(segment_ids: Int[Array, "batch time"]) -> Bool[Array, "batch 1 time time"]:
    """Positions see only positions of their own document."""
    return (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
