"""GPT and U-Net GPT: embeddings, blocks of attention and MLP, a head; and their static half.

Flax NNX describes the network; outside this folder it is a static `graphdef` and one flat dict of
arrays under dotted names (`blocks.0.attention.qkv.kernel`). `nnx.jit` would cost about 10 ms of
Python a step, the dict next to nothing (SPEED 3.4), and names serve masks, files and export.
Radford et al. 2019; Vaswani et al. 2017 (arXiv:1706.03762).
"""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mainrun import config
from mainrun.model import lora
from mainrun.model.blocks import Block, Skip
from mainrun.model.cache import Cache, Span
from mainrun.model.fused import PLAIN, Kernel
from mainrun.model.head import Unembedding
from mainrun.model.initializers import Initializer
from mainrun.model.layers import DropoutKeys, DropoutRate, Embedding, dropout, fold, norm
from mainrun.model.moe import Routing
from mainrun.model.positions import sinusoids

Params = dict[str, jax.Array]


class Read(NamedTuple):
    """What the network makes of a text: what the head reads, and how each layer routed it."""

    features: Float[Array, "batch time width"]
    routings: tuple[Routing, ...]  # none without a mixture of experts


class Gpt(nnx.Module):
    """The language model that `settings` describe, computing in `dtype`."""

    def __init__(
        self,
        settings: config.Network,
        *,
        vocab_size: int,
        context_length: int,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.settings = settings
        self.dropout = settings.dropout
        self.remat = False
        self.vocab_size = vocab_size
        self.dtype = dtype
        init, widths = Initializer.of(settings), settings.widths
        multiple = settings.pad_vocab_to_multiple_of
        rows = -(-vocab_size // multiple) * multiple
        self.token_embedding = Embedding(rows, widths[0], init=init, rngs=rngs)
        self.position_embedding = (
            Embedding(context_length, widths[0], init=None, rngs=rngs)
            if settings.position == "learned"
            else None
        )
        self.blocks = nnx.List(
            Block(settings, inputs, outputs, is_first=number == 0, rngs=rngs)
            for number, (inputs, outputs) in enumerate(pairwise(widths))
        )
        self.skips = nnx.List(
            Skip(widths[i + 1], widths[-2 - i], init=init, rngs=rngs) for i in _paired(settings)
        )
        is_pre = settings.norm_position == "pre"
        self.final_norm = norm(settings, widths[-1]) if is_pre else None
        tied = settings.tie_embeddings
        self.head = None if tied else Embedding(rows, widths[-1], init=init, rngs=rngs)
        if settings.lora is not None:
            lora.attach(self, settings.lora, rngs=rngs)

    def read(
        self,
        tokens: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"] | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Read:
        """A whole text from its beginning. With `segment_ids`, attention stays within each
        document; with `dropout_keys`, dropout is on."""
        span = Span(jnp.arange(tokens.shape[1]), segment_ids)
        return self._through(tokens, span, dropout_keys, None)[0]

    def go_on(
        self,
        tokens: Int[Array, "batch time"],
        position: int | Int[Array, ""],
        memory: Sequence[Cache],
    ) -> tuple[Float[Array, "batch time width"], tuple[Cache, ...]]:
        """What the head reads of these tokens, the first of which stands at `position`, and what
        is remembered now: the beginning of a text (`position` 0), or one more token of it."""
        span = Span(position + jnp.arange(tokens.shape[1]))
        read, memory = self._through(tokens, span, None, memory)
        return read.features, tuple(memory)

    def empty_memory(self, batch: int, length: int) -> tuple[Cache, ...]:
        """A cache for each block, for texts of at most `length` tokens."""
        return tuple(b.attention.empty_cache(batch, length, self.dtype) for b in self.blocks)

    def logits(self, features: Float[Array, "*any width"]) -> Float[Array, "*any vocab"]:
        """Unnormalised log probabilities of the next token, float32."""
        return self.unembedding.logits(features, self.head_table)

    @property
    def unembedding(self) -> Unembedding:
        """How the head makes logits of features and its table."""
        return Unembedding(self.vocab_size, self.settings.logit_softcap)

    @property
    def head_table(self) -> Float[Array, "rows width"]:
        """An embedding for each token and for padding: the input's, where they are tied."""
        return (self.token_embedding if self.head is None else self.head).embedding[...]

    def __call__(
        self,
        tokens: Int[Array, "batch time"],
        segment_ids: Int[Array, "batch time"] | None = None,
        dropout_keys: DropoutKeys | None = None,
    ) -> Float[Array, "batch time vocab"]:
        """Logits of the token after each position; see `read`."""
        return self.logits(self.read(tokens, segment_ids, dropout_keys).features)

    def _through(
        self,
        tokens: Array,
        span: Span,
        keys: DropoutKeys | None,
        memory: Sequence[Cache] | None,
    ) -> tuple[Read, list[Cache]]:
        x = dropout(self._embedded(tokens, span), keys, 0, self.dropout)
        first_values = None
        routings: list[Routing] = []
        remembered: list[Cache] = []
        outputs: list[Array] = []
        pairs = _paired(self.settings)
        mirrored = {len(self.blocks) - 1 - i: n for n, i in enumerate(pairs)}
        for number, block in enumerate(self.blocks):
            block_keys = None if keys is None else fold(keys, number + 1)
            if number in mirrored:
                n = mirrored[number]
                x = self.skips[n](x, outputs[pairs[n]], block_keys)
            cache = None if memory is None else memory[number]
            # Chen et al. 2016 (arXiv:1604.06174)
            through = jax.checkpoint(block.__call__) if self.remat else block
            x, values, routing, cache = through(x, span, block_keys, first_values, cache)
            outputs.append(x)
            first_values = values if number == 0 else first_values
            if routing is not None:
                routings.append(routing)
            if cache is not None:
                remembered.append(cache)
        x = x if self.final_norm is None else self.final_norm(x)
        return Read(x, tuple(routings)), remembered

    def _embedded(self, tokens: Array, span: Span) -> Array:
        x = self.token_embedding.embedding[...][tokens]
        match self.settings.position:
            case "learned":
                assert self.position_embedding is not None
                x = x + self.position_embedding.embedding[...][span.positions]
            case "sinusoidal":  # scaled up beside sines of size 1: Vaswani et al., section 3.4
                x = x * x.shape[-1] ** 0.5 + sinusoids(span.positions, x.shape[-1])
            case "rotary":
                pass
        return x.astype(self.dtype)


def _paired(settings: config.Network) -> range:
    """Blocks whose output their mirror image in the second half receives.

    Not the innermost pair of an even number: one would only repeat what the other was given.
    """
    if isinstance(settings, config.UnetGpt) and settings.skip_connections:
        return range((len(settings.widths) - 2) // 2)
    return range(0)


class Network:
    """The static half of a model: makes initial parameters, and binds parameters to a module."""

    def __init__(
        self,
        settings: config.Network,
        *,
        vocab_size: int,
        context_length: int,
        precision: str,
        kernel: Kernel = PLAIN,
    ) -> None:
        self._build = partial(
            Gpt,
            settings,
            vocab_size=vocab_size,
            context_length=context_length,
            dtype=jnp.dtype(precision),
        )
        self.settings = settings
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.kernel = kernel
        abstract = nnx.eval_shape(lambda: self._build(rngs=nnx.Rngs(0)))
        self._graphdef, state = nnx.split(abstract)
        self._paths = {_dotted(path): path for path in nnx.to_flat_state(state).paths}

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters under their dotted names."""
        state = nnx.state(self._build(rngs=nnx.Rngs(params=key)))
        return {_dotted(path): param[...] for path, param in nnx.to_flat_state(state)}

    def bind(
        self, params: Params, dropout: DropoutRate | None = None, *, remat: bool = False
    ) -> Gpt:
        """A module that computes with these parameters. Cheap inside a trace; made anew there.

        `dropout` stands for the rate of the settings, where that is not one number for all. With
        `remat` a block keeps nothing for the backward pass but its input, and is computed again
        there.
        """
        leaves = [(path, nnx.Param(params[name])) for name, path in self._paths.items()]
        model = nnx.merge(self._graphdef, nnx.from_flat_state(leaves))
        for _, module in nnx.iter_modules(model):
            if dropout is not None and hasattr(module, "dropout"):
                module.dropout = nnx.data(dropout)
            if hasattr(module, "kernel") and isinstance(module.kernel, Kernel):
                module.kernel = self.kernel
        model.remat = remat
        return model

    def with_kernel(self, kernel: Kernel) -> "Network":
        """The same, whose attention another kernel computes."""
        other = copy.copy(self)
        other.kernel = kernel
        return other


def num_parameters(params: Mapping[str, jax.Array | jax.ShapeDtypeStruct]) -> int:
    """Tied weights count once."""
    return sum(int(array.size) for array in params.values())


def _dotted(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
