"""GPT: token and position embeddings, pre-norm blocks of attention and MLP, a final norm, a head.

Flax NNX describes the network; outside this file it is a static `graphdef` and one flat dict of
arrays under dotted names (`blocks.0.attention.qkv.kernel`). `nnx.jit` would cost about 10 ms of
Python a step, the dict next to nothing (SPEED 3.4), and names serve masks, files and export.
Radford et al. 2019; Vaswani et al. 2017 (arXiv:1706.03762).
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mainrun import config
from mainrun.model import masks
from mainrun.model.attention import CausalAttention
from mainrun.model.layers import (
    DropoutKeys,
    Embedding,
    LayerNorm,
    Mlp,
    dropout,
    fold,
    unembed,
)

Params = dict[str, jax.Array]


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, settings: config.Model, *, rngs: nnx.Rngs) -> None:
        self.dropout = settings.dropout
        self.attention_norm = LayerNorm(settings.d_model)
        self.attention = CausalAttention(
            settings.attention, settings.d_model, settings.dropout, rngs=rngs
        )
        self.mlp_norm = LayerNorm(settings.d_model)
        self.mlp = Mlp(settings.mlp, settings.d_model, rngs=rngs)

    def __call__(self, x: Array, mask: Array, keys: DropoutKeys | None) -> Array:
        mixed = self.attention(self.attention_norm(x), mask, keys)
        x = x + dropout(mixed, keys, 1, self.dropout)
        return x + dropout(self.mlp(self.mlp_norm(x)), keys, 2, self.dropout)


class Gpt(nnx.Module):
    """The language model that `settings` describe, computing in `dtype`."""

    def __init__(
        self,
        settings: config.Model,
        *,
        vocab_size: int,
        context_length: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        width = settings.d_model
        self.dropout = settings.dropout
        self.dtype = dtype
        self.token_embedding = Embedding(vocab_size, width, rngs=rngs)
        self.position_embedding = Embedding(context_length, width, zeros=True, rngs=rngs)
        self.blocks = nnx.List([Block(settings, rngs=rngs) for _ in range(settings.num_layers)])
        self.final_norm = LayerNorm(width)
        self.head = None if settings.tie_embeddings else Embedding(vocab_size, width, rngs=rngs)

    def features(
        self,
        tokens: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"] | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Float[Array, "batch time width"]:
        """What the head reads. With `segment_ids`, attention stays within each document;
        with `dropout_keys`, dropout is on."""
        time = tokens.shape[1]
        mask = masks.causal(time)
        if segment_ids is not None:
            mask = mask & masks.same_document(segment_ids)
        embedded = self.token_embedding.embedding[...][tokens]
        x = (embedded + self.position_embedding.embedding[...][:time]).astype(self.dtype)
        x = dropout(x, dropout_keys, 0, self.dropout)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, mask, None if dropout_keys is None else fold(dropout_keys, number))
        return self.final_norm(x)

    def logits(self, features: Float[Array, "*any width"]) -> Float[Array, "*any vocab"]:
        """Unnormalised log probabilities of the next token, float32."""
        table = self.token_embedding if self.head is None else self.head
        rows = unembed(features.reshape(-1, features.shape[-1]), table.embedding[...])
        return rows.reshape(*features.shape[:-1], -1)

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"] | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Float[Array, "batch time vocab"]:
        """Logits of the token after each position; see `features`."""
        return self.logits(self.features(tokens, segment_ids, dropout_keys))


class Network:
    """The static half of a model: makes initial parameters, and binds parameters to a module."""

    def __init__(
        self, settings: config.Model, *, vocab_size: int, context_length: int, precision: str
    ) -> None:
        self._build = partial(
            Gpt,
            settings,
            vocab_size=vocab_size,
            context_length=context_length,
            dtype=jnp.dtype(precision),
        )
        self.vocab_size = vocab_size
        self.context_length = context_length
        abstract = nnx.eval_shape(lambda: self._build(rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(abstract)
        self._paths = {_dotted(path): path for path in nnx.to_flat_state(state).paths}

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters under their dotted names."""
        state = nnx.state(self._build(rngs=nnx.Rngs(params=key)))
        return {_dotted(path): param[...] for path, param in nnx.to_flat_state(state)}

    def bind(self, params: Params) -> Gpt:
        """A module that computes with these parameters. Cheap inside a trace; made anew there."""
        leaves = [(path, nnx.Param(params[name])) for name, path in self._paths.items()]
        return nnx.merge(self._graphdef, nnx.from_flat_state(leaves))


def num_parameters(params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Tied weights count once."""
    return sum(int(array.size) for array in params.values())


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
