"""Multi-head latent attention: keys and values that are projections of one small latent.

DeepSeek-AI 2024 (arXiv:2405.04434), section 2.1. Over a whole text keys and values are written out;
one token at a time the up-projections are absorbed into queries and outputs, so that only the
latent and one shared rotary key are remembered. Same weights, same result.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mainrun import config
from mainrun.model import cache as caches
from mainrun.model import masks
from mainrun.model.attention import Attended, attend, attend_text, joined, output_gate
from mainrun.model.cache import Cache, Span
from mainrun.model.fused import PLAIN
from mainrun.model.initializers import Initializer
from mainrun.model.layers import DropoutKeys, Linear, RmsNorm
from mainrun.model.positions import rotate


class LatentAttention(nnx.Module):
    """Queries are (content | rotary) in each head; the rotary key is one for all heads.

    The up-projections have no biases: absorbing them leaves no place for one.
    """

    def __init__(
        self,
        network: config.Network,
        settings: config.LatentAttention,
        inputs: int,
        outputs: int,
        *,
        out_init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        self.num_heads = settings.num_heads
        self.head_dim = settings.head_dim or inputs // settings.num_heads
        self.rotary_dim, self.kv_rank = settings.rotary_dim, settings.kv_rank
        self.settings, self.rotary_base = settings, network.rotary_base
        self.dropout, self.own_dropout = network.dropout, network.attention_dropout
        self.kernel = PLAIN  # another when it is bound
        init, bias, eps = Initializer.of(network), network.bias, network.norm_eps
        inner = self.num_heads * self.head_dim
        q_wide = inner + self.num_heads * self.rotary_dim
        rank = settings.query_rank
        self.q_down = Linear(inputs, rank, init=init, bias=bias, rngs=rngs) if rank else None
        self.q_norm = RmsNorm(rank, eps=eps) if rank else None
        self.q_up = Linear(rank or inputs, q_wide, init=init, bias=False, rngs=rngs)
        latent = self.kv_rank + self.rotary_dim
        self.kv_down = Linear(inputs, latent, init=init, bias=bias, rngs=rngs)
        self.kv_norm = RmsNorm(self.kv_rank, eps=eps)
        self.kv_up = Linear(self.kv_rank, 2 * inner, init=init, bias=False, rngs=rngs)
        self.out = Linear(inner, outputs, init=out_init, bias=bias, rngs=rngs)
        self.gate = output_gate(inputs, inner, init, rngs) if settings.output_gate else None

    def __call__(
        self,
        x: Float[Array, "batch time inputs"],
        span: Span,
        keys: DropoutKeys | None = None,
        cache: Cache | None = None,
    ) -> Attended:
        """With a cache, several tokens are a text's beginning, and one token goes on with it."""
        q, q_rotary = self._queries(x, span, keys)
        latent, k_rotary = jnp.split(self.kv_down(x, keys), [self.kv_rank], axis=-1)
        latent = self.kv_norm(latent)
        k_rotary = rotate(k_rotary[:, None], span.positions, self.rotary_base)
        if cache is not None:
            cache = caches.written(cache, span.positions, latent=latent, rotary=k_rotary[:, 0])
        if cache is not None and x.shape[1] == 1:
            mixed = self._absorbed(q, q_rotary, span, cache)
        else:
            mixed = self._explicit(q, q_rotary, latent, k_rotary, span, keys)
        return Attended(joined(mixed, x, keys, gate=self.gate, out=self.out), None, cache)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """For texts of at most `length` tokens: kv_rank + rotary_dim numbers for each."""
        latent = jnp.zeros((batch, 0, self.kv_rank), dtype)
        rotary = jnp.zeros((batch, 0, self.rotary_dim), dtype)
        return caches.empty(length, latent=latent, rotary=rotary)

    def _queries(self, x: Array, span: Span, keys: DropoutKeys | None) -> tuple[Array, Array]:
        if self.q_down is not None and self.q_norm is not None:
            x = self.q_norm(self.q_down(x, keys))
        columns = self.q_up(x, keys).reshape(*x.shape[:2], self.num_heads, -1)
        q, rotary = jnp.split(columns.transpose(0, 2, 1, 3), [self.head_dim], axis=-1)
        return q, rotate(rotary, span.positions, self.rotary_base)

    @property
    def _scale(self) -> float:
        return float(self.head_dim + self.rotary_dim) ** -0.5

    def _explicit(
        self,
        q: Array,
        q_rotary: Array,
        latent: Array,
        k_rotary: Array,
        span: Span,
        keys: DropoutKeys | None,
    ) -> Float[Array, "batch heads time dim"]:
        batch, time, _ = latent.shape
        columns = self.kv_up(latent, keys).reshape(batch, time, self.num_heads, -1)
        k, v = jnp.split(columns.transpose(0, 2, 1, 3), 2, axis=-1)
        shared = jnp.broadcast_to(k_rotary, (*k.shape[:3], self.rotary_dim))
        return attend_text(
            jnp.concatenate([q, q_rotary], axis=-1), jnp.concatenate([k, shared], axis=-1), v,
            self.settings, span.segment_ids, keys,
            self.dropout if self.own_dropout is None else self.own_dropout,
            self.kernel, self._scale,
        )  # fmt: skip

    def _absorbed(
        self, q: Array, q_rotary: Array, span: Span, cache: Cache
    ) -> Float[Array, "batch heads 1 dim"]:
        """As explicit: (q W_k) · c is q · (W_k c), and values are made of the mixed latent."""
        weight = self.kv_up.weight().astype(q.dtype)
        up_k, up_v = jnp.split(weight.reshape(self.kv_rank, self.num_heads, -1), 2, axis=-1)
        q_latent = jnp.einsum("bhqd,rhd->bhqr", q, up_k)
        latent, rotary = cache["latent"][:, None], cache["rotary"][:, None]
        grid = masks.grid(masks.causal, span.positions, cache["positions"], self.num_heads)
        mixed = attend(
            jnp.concatenate([q_latent, q_rotary], axis=-1),
            jnp.concatenate([latent, rotary], axis=-1),
            latent, grid & caches.filled(cache), scale=self._scale,
        )  # fmt: skip
        return jnp.einsum("bhqr,rhd->bhqd", mixed, up_v)
