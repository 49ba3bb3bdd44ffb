"""Text from a model: sampling token by token, compiled once for a shape.

The whole prefix is computed again for every token; what the network sees and what it gives are
those of training. Batched; a row that has ended stays ended.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mainrun.model.gpt import Network, Params


@partial(jax.jit, static_argnames=("network", "max_tokens", "top_k", "eos_id"))
def generate(
    network: Network,
    params: Params,
    prompt: Int[Array, "batch prompt"],
    key: Array,
    *,
    max_tokens: int,
    eos_id: int,
    temperature: float | Float[Array, ""] = 1.0,
    top_k: int = 0,
    top_p: float | Float[Array, ""] = 1.0,
) -> Int[Array, "batch total"]:
    """The prompt and up to `max_tokens` more; after the end of a document only `eos_id`.

    Temperature 0 takes the likeliest token. `top_k` (0: all) and `top_p` (Holtzman et al. 2020,
    arXiv:1904.09751) leave the likeliest tokens only. Row i's draws depend on key and i alone.
    """
    model = network.bind(params)
    batch, prompt_length = prompt.shape
    total = prompt_length + max_tokens
    assert total <= network.context_length
    tokens = jnp.full((batch, total), eos_id, jnp.int32).at[:, :prompt_length].set(prompt)
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))

    def go_on(carry: tuple[Array, Array, Array]) -> Array:
        place, _, ended = carry
        return (place < total) & ~ended.all()

    def one_token(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        place, tokens, ended = carry
        features = model.features(tokens)
        last = jax.lax.dynamic_index_in_dim(features, place - 1, axis=1, keepdims=False)
        logits = _likeliest(model.logits(last), temperature, top_k, top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, place)
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
        token = jnp.where(ended, eos_id, drawn).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, place, axis=1)
        return place + 1, tokens, ended | (token == eos_id)

    start = jnp.asarray(prompt_length), tokens, jnp.zeros(batch, bool)
    return jax.lax.while_loop(go_on, one_token, start)[1]


def _likeliest(
    logits: Float[Array, "batch vocab"],
    temperature: float | Float[Array, ""],
    top_k: int,
    top_p: float | Float[Array, ""],
) -> Float[Array, "batch vocab"]:
    """Logits of the distribution to draw from: -inf for tokens that are left out."""
    greedy = jnp.where(logits == logits.max(-1, keepdims=True), 0.0, -jnp.inf)
    logits = logits / jnp.maximum(temperature, 1e-6)
    if 0 < top_k < logits.shape[-1]:
        kth = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    ordered = -jnp.sort(-logits, axis=-1)
    before = jnp.cumsum(jax.nn.softmax(ordered, axis=-1), axis=-1) - jax.nn.softmax(
        ordered, axis=-1
    )
    least = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
    return jnp.where(temperature == 0, greedy, logits)
