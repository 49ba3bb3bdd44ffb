"""Text from a model: sampling token by token with a cache, compiled once for a number of rows.

The prompts' common beginning is read at once, then every token costs one token: those of a longer
prompt are given, the others drawn. A row that has ended stays ended.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mainrun.model.gpt import Network, Params


def generate(
    network: Network,
    params: Params,
    prompts: Int[np.ndarray, "batch longest"],
    lengths: Int[np.ndarray, " batch"],
    key: Array,
    *,
    max_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, "batch context"]:
    """Each prompt (its first `lengths[i]` tokens, at least one) and up to `max_tokens` more.

    After the end of a document, and after the tokens asked for, only `eos_id`; a text fills at most
    the context. Temperature 0 takes the likeliest token. `top_k` (0: all) and `top_p` (Holtzman et
    al. 2020, arXiv:1904.09751) leave the likeliest tokens only. Row i's draws depend on key and i
    alone.
    """
    batch, longest = prompts.shape
    context = network.context_length
    assert longest <= context
    tokens = jnp.full((batch, context), eos_id, jnp.int32).at[:, :longest].set(prompts)
    # A power of two, so that prompts of all lengths share a few compilations.
    start = 1 << (int(lengths.min()).bit_length() - 1)
    end = min(int(lengths.max()) + max_tokens, context)
    return _generate(
        network, params, tokens, lengths, key, end, max_tokens, temperature, top_k, top_p,
        start=start, eos_id=eos_id,
    )  # fmt: skip


@partial(jax.jit, static_argnames=("network", "start", "eos_id"))
def _generate(
    network: Network,
    params: Params,
    tokens: Array,
    lengths: Array,
    key: Array,
    end: Array,
    max_tokens: Array,
    temperature: Array,
    top_k: Array,
    top_p: Array,
    *,
    start: int,
    eos_id: int,
) -> Array:
    model = network.bind(params)
    batch, context = tokens.shape
    row_keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))
    State = tuple[Array, Array, Array, Array, tuple]

    def go_on(state: State) -> Array:
        place, _, ended, _, _ = state
        return (place < end) & ~ended.all()

    def one_token(state: State) -> State:
        place, tokens, ended, features, memory = state
        logits = likeliest(model.logits(features), temperature, top_k, top_p)
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, place)
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
        is_given = place < lengths
        ended = ended | (place >= lengths + max_tokens)
        token = jnp.where(ended, eos_id, drawn)
        token = jnp.where(is_given, tokens[:, place], token).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, place, axis=1)
        ended = ended | (~is_given & (token == eos_id))
        features, memory = model.go_on(token[:, None], place, memory)
        return place + 1, tokens, ended, features[:, -1], memory

    memory = model.empty_memory(batch, context)
    features, memory = model.go_on(tokens[:, :start], 0, memory)
    ended = jnp.zeros(batch, bool)
    first = jnp.asarray(start), tokens, ended, features[:, -1], memory
    return jax.lax.while_loop(go_on, one_token, first)[1]


def likeliest(
    logits: Float[Array, "batch vocab"],
    temperature: float | Float[Array, ""],
    top_k: int | Int[Array, ""],
    top_p: float | Float[Array, ""],
) -> Float[Array, "batch vocab"]:
    """Logits of the distribution to draw from: -inf for tokens that are left out."""
    greedy = jnp.where(logits == logits.max(-1, keepdims=True), 0.0, -jnp.inf)
    logits = logits / jnp.maximum(temperature, 1e-6)
    ordered = -jnp.sort(-logits, axis=-1)
    places = jnp.arange(logits.shape[-1])
    k = jnp.where(top_k > 0, top_k, logits.shape[-1])
    ordered = jnp.where(places < k, ordered, -jnp.inf)
    shares = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    is_left = (before < top_p) & (places < k)
    least = jnp.where(is_left, ordered, jnp.inf).min(-1, keepdims=True)
    logits = jnp.where(logits < least, -jnp.inf, logits)
    return jnp.where(temperature == 0, greedy, logits)
