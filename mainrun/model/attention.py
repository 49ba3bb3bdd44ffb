"""Attention: the scaled dot product every kind shares, and the kinds with their projections."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from mainrun import config
from mainrun.model.layers import DropoutKeys, Linear, dropout


def attend(
    q: Float[Array, "batch heads time dim"],
    k: Float[Array, "batch heads time dim"],
    v: Float[Array, "batch heads time dim"],
    mask: Bool[Array, "#batch #heads time time"],
    dropout_keys: DropoutKeys | None = None,
    dropout_rate: float = 0.0,
) -> Float[Array, "batch heads time dim"]:
    """Softmax attention over the keys each query may see.

    `mask` is True where looking is allowed; every query must see at least itself. Scores and
    softmax are float32 whatever the inputs. Vaswani et al. 2017 (arXiv:1706.03762), eq. 1.
    """
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_keys, 0, dropout_rate)
    return jnp.einsum("bhqk,bhkd->bhqd", weights.astype(v.dtype), v)


class CausalAttention(nnx.Module):
    """Multi-head attention with fused query, key and value projections (columns q | k | v)."""

    def __init__(
        self, settings: config.CausalAttention, width: int, dropout: float, *, rngs: nnx.Rngs
    ) -> None:
        self.num_heads = settings.num_heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width, rngs=rngs)
        self.out = Linear(width, width, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "batch time width"],
        mask: Bool[Array, "#batch 1 time time"],
        dropout_keys: DropoutKeys | None = None,
    ) -> Float[Array, "batch time width"]:
        batch, time, width = x.shape
        split = self.qkv(x).reshape(batch, time, 3, self.num_heads, width // self.num_heads)
        q, k, v = (split[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        mixed = attend(q, k, v, mask, dropout_keys, self.dropout)
        return self.out(mixed.transpose(0, 2, 1, 3).reshape(batch, time, width))
