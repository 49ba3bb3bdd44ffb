"""The head: from what the network makes of a position to logits of the next token.

Its logits are the largest array of a small model, so whoever needs only what is made of them, the
loss, asks for a few positions at a time (`training.chunks`).
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Unembedding:
    """What turns features into logits, but for the table of embeddings."""

    vocab_size: int
    softcap: float | None

    def logits(
        self, features: Float[Array, "*any width"], table: Float[Array, "rows width"]
    ) -> Float[Array, "*any vocab"]:
        """Unnormalised log probabilities, float32. Rows beyond the vocabulary are padding."""
        rows = unembed(features.reshape(-1, features.shape[-1]), table)
        logits = rows[:, : self.vocab_size].reshape(*features.shape[:-1], -1)
        cap = self.softcap  # Gemma Team 2024 (arXiv:2408.00118), section 2
        return logits if cap is None else cap * jnp.tanh(logits / cap)


@jax.custom_vjp
def unembed(
    x: Float[Array, "rows width"], embedding: Float[Array, "vocab width"]
) -> Float[Array, "rows vocab"]:
    """Logits, float32: x @ embedding.T."""
    return jnp.matmul(x, embedding.astype(x.dtype).T, preferred_element_type=jnp.float32)


def _unembed_forward(x: Array, embedding: Array) -> tuple[Array, tuple[Array, Array]]:
    return unembed(x, embedding), (x, embedding)


def _unembed_backward(saved: tuple[Array, Array], dlogits: Array) -> tuple[Array, Array]:
    x, embedding = saved
    x, dlogits = jax.lax.optimization_barrier((x, dlogits.astype(x.dtype)))
    dembedding = jnp.matmul(dlogits.T, x, preferred_element_type=jnp.float32)
    return dlogits @ embedding.astype(x.dtype), dembedding


unembed.defvjp(_unembed_forward, _unembed_backward)
