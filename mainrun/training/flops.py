"""Floating-point operations that a model asks for, per token: what utilisation is counted by.

Only products of matrices are counted, a multiplication and an addition each, as in Kaplan et al.
2020 (arXiv:2001.08361), section 2.1, and Chowdhery et al. 2022 (PaLM, arXiv:2204.02311), appendix
B: 2 for each weight that a token meets going forward and 4 going back. Norms, activations, softmax,
optimizer and whatever a program computes twice are not counted, so utilisation says how much of the
device's time went into what the model needs.

Where we depart from PaLM: attention is counted for the keys that a query may see, half of the text
in the mean under a causal mask, where PaLM counts all of it; the head is counted, the tables that
are only looked up are not.
"""

from collections.abc import Iterable
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from mainrun import config
from mainrun.model import lora, masks
from mainrun.model.gpt import Network

_AT_ONCE = 256  # queries, whose keys are counted


class Flops(NamedTuple):
    """Of one token, in the mean over a whole text."""

    weights: float  # products with the weights of blocks, adapters and skips
    attention: float  # scores of queries and keys, and values mixed by them
    head: float  # logits, padding rows included

    @property
    def total(self) -> float:
        return sum(self)


def forward(network: Network) -> Flops:
    """Of a forward pass over a text as long as the network's context."""
    shapes = _shapes(network)
    rows = shapes[_head_table(network.settings)]
    return Flops(
        weights=sum(2.0 * _met(network.settings, name, x) for name, x in shapes.items()),
        attention=sum(_attention(network)),
        head=2.0 * rows.size,
    )


def training(network: Network, regularization: config.Regularization) -> Flops:
    """Of a training step: forward and backward; where R-Drop reads a batch twice, both times.

    Of frozen weights there is no gradient, and below the first adapter nothing is gone back
    through; within the first block that has one, all is counted as if its input needed a gradient.
    """
    settings, shapes = network.settings, _shapes(network)
    first = _first_trained_block(settings, shapes)
    passes = 2 if regularization.r_drop else 1
    has_adapters = settings.lora is not None

    def share(name: str) -> int:
        """Of the forward pass's operations: it, and the gradients of its input and its weight."""
        if not has_adapters or lora.is_adapter(name):
            return 3
        return 1 if _place(settings, name) < first else 2

    attention = (
        (1 if number < first else 3) * each for number, each in enumerate(_attention(network))
    )
    return Flops(
        weights=passes * sum(2.0 * share(n) * _met(settings, n, x) for n, x in shapes.items()),
        attention=passes * sum(attention),
        head=passes * 2.0 * (2 if has_adapters else 3) * shapes[_head_table(settings)].size,
    )


def mean_keys(attention: config.Attention, time: int) -> float:
    """Keys that a query sees in a text of one document, in the mean over queries and heads."""
    match attention:
        case config.LatentAttention():
            return _mean_of_newest(time, time)
        case config.CausalAttention(window_including_self=window):
            return _mean_of_newest(time if window is None else window, time)
        case config.SparseKAttention(num_selected=selected, window_including_self=window):
            return _mean_of_newest(window + selected, time)
        case config.SparseAttention(pattern=pattern, num_heads=heads):
            # A head is like the one num_verts further on, and num_verts divides their number.
            alike = pattern.num_verts if isinstance(pattern, config.FixedKeys) else 1
            return _mean_of_grid(masks.of_attention(attention), time, min(heads, alike))
        case _:
            assert_never(attention)


def _mean_of_newest(window: int, time: int) -> float:
    """Where query t sees min(t, window) keys, itself among them."""
    window = min(window, time)
    return (window * (window + 1) / 2 + (time - window) * window) / time


def _mean_of_grid(mask: masks.Mask, time: int, heads: int) -> float:
    """By asking the mask about every pair, some queries at a time."""
    keys, seen = jnp.arange(time), 0.0
    for first in range(0, time, _AT_ONCE):
        queries = jnp.arange(first, min(first + _AT_ONCE, time))
        # Of a mask that knows no heads, the grid has one.
        seen += float(masks.grid(mask, queries, keys, heads).sum((2, 3)).mean())
    return seen / time


def _attention(network: Network) -> list[float]:
    """Of each block, forward: 2 for a key's dimension in the score, 2 for a value's in the mix."""
    settings, keys = network.settings, mean_keys(network.settings.attention, network.context_length)
    return [2.0 * keys * _dimensions(settings.attention, width) for width in settings.widths[:-1]]


def _dimensions(attention: config.Attention, width: int) -> int:
    """Of keys and values, over all query heads of a block with this input."""
    match attention:
        case config.LatentAttention(num_heads=heads, head_dim=dim, rotary_dim=rotary):
            return heads * (2 * (dim or width // heads) + rotary)
        case _:
            return 2 * (attention.intermediate_dim or width)


def _met(settings: config.Network, name: str, shape: jax.ShapeDtypeStruct) -> float:
    """Weights of this parameter that a token is multiplied with: of experts, the chosen ones'."""
    mlp = settings.mlp
    if isinstance(mlp, config.MixtureOfExperts) and name.endswith((".mlp.up", ".mlp.down")):
        return shape.size * mlp.top_k / mlp.num_experts
    is_matrix = name.endswith(".kernel") or lora.is_adapter(name)
    return float(shape.size) if is_matrix else 0.0


def _shapes(network: Network) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(network.init, jax.random.key(0))


def _head_table(settings: config.Network) -> str:
    return "token_embedding.embedding" if settings.tie_embeddings else "head.embedding"


def _first_trained_block(settings: config.Network, names: Iterable[str]) -> int:
    """The first place that an adapter stands in; 0 without any, where all weights are trained."""
    return min((_place(settings, name) for name in names if lora.is_adapter(name)), default=0)


def _place(settings: config.Network, name: str) -> int:
    """The number of a parameter's block; a skip is added to what its mirror image is given."""
    kind, _, rest = name.partition(".")
    if kind not in ("blocks", "skips"):
        return 0
    number = int(rest.partition(".")[0])
    return number if kind == "blocks" else len(settings.widths) - 2 - number
