"""Attention: the scaled dot product that every kind shares, and the kinds that only mask it.

Causal, windowed, sparse and SparseK attention have the same projections of queries, keys and values
and differ in which keys a query reads, and how. Latent attention projects otherwise: see `latent`.
"""

from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mainrun import config
from mainrun.model import cache as caches
from mainrun.model import fused, masks, sparse, sparsek
from mainrun.model.cache import Cache, Span
from mainrun.model.fused import PLAIN, Kernel
from mainrun.model.initializers import Initializer
from mainrun.model.layers import DropoutKeys, DropoutRate, Linear, RmsNorm, dropout
from mainrun.model.positions import rotate

_OPEN = 3.0  # bias of the output gate: it begins at sigmoid(3) = 0.95, nearly open


class Attended(NamedTuple):
    """What a layer of attention gives: its output, its values, and what it now remembers."""

    output: Float[Array, "batch time width"]
    values: Float[Array, "batch kv_heads time dim"] | None
    cache: Cache | None


def attend(
    q: Float[Array, "batch heads queries dim"],
    k: Float[Array, "batch kv_heads keys dim"],
    v: Float[Array, "batch kv_heads keys value_dim"],
    mask: Bool[Array, "#batch #heads queries keys"],
    dropout_keys: DropoutKeys | None = None,
    dropout_rate: float | DropoutRate = 0.0,
    scale: float | None = None,
) -> Float[Array, "batch heads queries value_dim"]:
    """Softmax attention over the keys each query may see; grouped when kv_heads < heads.

    `mask` is True where looking is allowed; every query must see at least itself. Scores and
    softmax are float32 whatever the inputs. Without `scale`, 1/√dim. Vaswani et al. 2017
    (arXiv:1706.03762), eq. 1; grouping from Ainslie et al. 2023 (arXiv:2305.13245).
    """
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    grouped = (batch, kv_heads, heads // kv_heads * queries)
    scores = jnp.einsum(
        "bhqd,bhkd->bhqk", q.reshape(*grouped, dim), k, preferred_element_type=jnp.float32
    ).reshape(batch, heads, queries, -1)
    scores = jnp.where(mask, scores * (dim**-0.5 if scale is None else scale), -jnp.inf)
    weights = dropout(jax.nn.softmax(scores, axis=-1), dropout_keys, 0, dropout_rate)
    weights = weights.astype(v.dtype).reshape(*grouped, -1)
    return jnp.einsum("bhqk,bhkd->bhqd", weights, v).reshape(batch, heads, queries, -1)


def attend_text(
    q: Float[Array, "batch heads time dim"],
    k: Float[Array, "batch kv_heads time dim"],
    v: Float[Array, "batch kv_heads time value_dim"],
    attention: sparse.Tiled | config.LatentAttention,
    segment_ids: Int[Array, "batch time"] | None,
    dropout_keys: DropoutKeys | None,
    dropout_rate: float | DropoutRate,
    kernel: Kernel,
    scale: float | None = None,
) -> Float[Array, "batch heads time value_dim"]:
    """`attend` over a whole text, by the fastest way that its kind, dropout and device have."""
    time = q.shape[2]
    newest = fused.newest_keys(attention, time)
    drops = dropout_keys is not None and not (isinstance(dropout_rate, float) and dropout_rate == 0)
    if kernel.call is not None and newest is not None and not drops:
        return fused.attend(
            q, k, v, call=kernel.call, newest=newest, segment_ids=segment_ids,
            most_documents=kernel.most_documents, scale=scale,
        )  # fmt: skip
    if not isinstance(attention, config.LatentAttention) and sparse.saves(attention, time):
        return sparse.attend(q, k, v, attention, segment_ids, dropout_keys, dropout_rate)
    mask = masks.of_attention(attention)
    if segment_ids is not None:
        mask = mask & masks.same_document(segment_ids)
    places = jnp.arange(time)
    grid = masks.grid(mask, places, places, q.shape[1])
    return attend(q, k, v, grid, dropout_keys, dropout_rate, scale)


class MultiHeadAttention(nnx.Module):
    """Attention with fused query, key and value projections (columns q | k | v)."""

    def __init__(
        self,
        network: config.Network,
        settings: config.MultiHead,
        inputs: int,
        outputs: int,
        *,
        is_first: bool,
        out_init: Initializer,
        rngs: nnx.Rngs,
    ) -> None:
        self.settings = settings
        self.num_heads = settings.num_heads
        self.num_kv_heads = settings.num_kv_heads or settings.num_heads
        inner = settings.intermediate_dim or inputs
        self.head_dim = inner // self.num_heads
        self.dropout, self.own_dropout = network.dropout, network.attention_dropout
        self.kernel = PLAIN  # another when it is bound
        self.rotary_base = network.rotary_base if network.position == "rotary" else None
        init, bias = Initializer.of(network), network.bias
        wide = inner + 2 * self.num_kv_heads * self.head_dim
        self.qkv = Linear(inputs, wide, init=init, bias=bias, rngs=rngs)
        self.out = Linear(inner, outputs, init=out_init, bias=bias, rngs=rngs)
        eps, normed = network.norm_eps, settings.qk_norm
        self.q_norm = RmsNorm(self.head_dim, eps=eps) if normed else None
        self.k_norm = RmsNorm(self.head_dim, eps=eps) if normed else None
        self.gate = output_gate(inputs, inner, init, rngs) if settings.output_gate else None
        mixes = settings.value_residual and not is_first
        self.first_share = nnx.Param(jnp.full((1,), 0.5)) if mixes else None
        is_scored = isinstance(settings, config.SparseKAttention)
        self.importance = (
            Linear(inputs, self.num_kv_heads, init=init, bias=False, rngs=rngs)
            if is_scored
            else None
        )

    def __call__(
        self,
        x: Float[Array, "batch time inputs"],
        span: Span,
        keys: DropoutKeys | None = None,
        first_values: Float[Array, "batch kv_heads time dim"] | None = None,
        cache: Cache | None = None,
    ) -> Attended:
        """With a cache, several tokens are the beginning of a text, and one token goes on with it.

        `first_values` are those of the first layer, for the value residual.
        """
        q, k, v = self._projected(x, span, keys)
        if self.first_share is not None:  # Zhou et al. 2024 (arXiv:2410.17897), eq. 7, learned
            assert first_values is not None
            share = self.first_share[...].astype(v.dtype)
            v = (1 - share) * v + share * first_values
        scores = None if self.importance is None else self._scores(x, span, keys)
        if cache is not None:
            new = {"k": k, "v": v} | ({} if scores is None else {"scores": scores[..., None]})
            cache = caches.written(cache, span.positions, **new)
        if cache is not None and x.shape[1] == 1:
            mixed = self._next(q, span, cache)
        else:
            mixed = self._whole(q, k, v, scores, span, keys)
        return Attended(joined(mixed, x, keys, gate=self.gate, out=self.out), v, cache)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """For texts of at most `length` tokens."""
        slots = jnp.zeros((batch, self.num_kv_heads, 0, self.head_dim), dtype)
        scored = {} if self.importance is None else {"scores": slots[..., :1].astype(jnp.float32)}
        return caches.empty(min(length, _reach(self.settings, length)), k=slots, v=slots, **scored)

    def _projected(
        self, x: Array, span: Span, keys: DropoutKeys | None
    ) -> tuple[Array, Array, Array]:
        batch, time, _ = x.shape
        heads, kv_heads, dim = self.num_heads, self.num_kv_heads, self.head_dim
        columns = self.qkv(x, keys)
        if heads == kv_heads:
            split = columns.reshape(batch, time, 3, heads, dim)
            q, k, v = (split[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        else:
            parts = jnp.split(columns, [heads * dim, (heads + kv_heads) * dim], axis=-1)
            q, k, v = (part.reshape(batch, time, -1, dim).transpose(0, 2, 1, 3) for part in parts)
        if self.q_norm is not None and self.k_norm is not None:
            # Henry et al. 2020 (arXiv:2010.04245), with the RMSNorm of Qwen3 and OLMo 2.
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary_base is not None:
            q, k = (rotate(y, span.positions, self.rotary_base) for y in (q, k))
        return q, k, v

    def _scores(
        self, x: Array, span: Span, keys: DropoutKeys | None
    ) -> Float[Array, "batch kv_heads time"]:
        """How much each key is worth remembering, float32."""
        assert self.importance is not None
        assert isinstance(self.settings, config.SparseKAttention)
        scores = self.importance(x.astype(jnp.float32), keys).transpose(0, 2, 1)
        return scores + self.settings.position_slope * span.positions

    def _whole(
        self,
        q: Array,
        k: Array,
        v: Array,
        scores: Array | None,
        span: Span,
        keys: DropoutKeys | None,
    ) -> Array:
        """Every position of the text at once."""
        rate = self.dropout if self.own_dropout is None else self.own_dropout
        segments = span.segment_ids
        match self.settings:
            case config.SparseKAttention(num_selected=selected, window_including_self=window):
                assert scores is not None
                return sparsek.attend(
                    q, k, v, scores, num_selected=selected, window_including_self=window,
                    segment_ids=segments, dropout_keys=keys, dropout_rate=rate,
                )  # fmt: skip
            case config.CausalAttention() | config.SparseAttention():
                return attend_text(q, k, v, self.settings, segments, keys, rate, self.kernel)
            case _:
                assert_never(self.settings)

    def _next(self, q: Array, span: Span, cache: Cache) -> Array:
        """The one newest position, from what is remembered."""
        match self.settings:
            case config.SparseKAttention(num_selected=selected, window_including_self=window):
                return sparsek.decode(
                    q, cache["k"], cache["v"], cache["scores"][..., 0],
                    query_position=span.positions[0], positions=cache["positions"],
                    num_selected=selected, window_including_self=window,
                )  # fmt: skip
            case config.CausalAttention() | config.SparseAttention():
                mask = masks.of_attention(self.settings)
                grid = masks.grid(mask, span.positions, cache["positions"], self.num_heads)
                return attend(q, cache["k"], cache["v"], grid & caches.filled(cache))
            case _:
                assert_never(self.settings)


def output_gate(inputs: int, inner: int, init: Initializer, rngs: nnx.Rngs) -> Linear:
    """Logits of a gate on what the heads found, nearly open at first.

    Qiu et al. 2025 (arXiv:2505.06708), after the scaled dot product, element by element; the
    `no_sink` of DantinoX.
    """
    gate = Linear(inputs, inner, init=init, rngs=rngs)
    gate.bias = nnx.Param(jnp.full(inner, _OPEN))
    return gate


def joined(
    heads: Float[Array, "batch heads time dim"],
    x: Float[Array, "batch time inputs"],
    keys: DropoutKeys | None,
    *,
    gate: Linear | None,
    out: Linear,
) -> Float[Array, "batch time outputs"]:
    """The layer's output from what the heads found; the gate reads `x`, the block's input."""
    side_by_side = heads.transpose(0, 2, 1, 3).reshape(*x.shape[:2], -1)
    if gate is not None:
        side_by_side = side_by_side * jax.nn.sigmoid(gate(x, keys))
    return out(side_by_side, keys)


def _reach(settings: config.MultiHead, length: int) -> int:
    """How many newest positions a query may need."""
    match settings:
        case config.CausalAttention(window_including_self=int(window)):
            return window
        case config.SparseAttention(pattern=config.LocalKeys(window_including_self=window)):
            return window
        case _:
            return length
