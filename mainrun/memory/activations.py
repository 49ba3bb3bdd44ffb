"""What the forward pass keeps for the backward pass, in bytes, from the settings alone.

Every product of a formula is an array that XLA:CPU writes out, found in its buffer assignments
(JAX 0.12): what autodiff saves, without what XLA computes again because it is cheap. Arrays that
are no larger than a few numbers per token are left out. `wide` arrays are float32 whatever the
precision, because they stand beside a norm's or softmax's arithmetic or go into a product of
attention, which XLA:CPU does in float32; `narrow` ones have the precision's own size.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp

from mainrun import config
from mainrun.memory.scratch import Product
from mainrun.model import sparse
from mainrun.model.moe import Room
from mainrun.training.chunks import count

FLOAT32 = 4
_MANY_ROWS = 4096
"""Rows of scores from which XLA:CPU divides the softmax's gradient inside one larger kernel, and
therefore writes out the denominators at the size of the scores."""

_SPARSEK_FIELDS = 4  # that a selection has for each key head and token: tau, count, cut, its place

Parts = dict[str, int]


class MicroBatch(NamedTuple):
    """Whose activations are in memory at one time."""

    sequences: int
    time: int
    narrow_bytes: int  # of a number in the precision that the network computes in

    @property
    def tokens(self) -> int:
        return self.sequences * self.time

    def wide(self, per_token: int) -> int:
        """Bytes of so many float32 numbers for each token."""
        return self.tokens * per_token * FLOAT32

    def narrow(self, per_token: int) -> int:
        """Bytes of so many numbers of the precision's own size for each token."""
        return self.tokens * per_token * self.narrow_bytes


def embedding(settings: config.Network, batch: MicroBatch) -> int:
    """The first block's input, and the rows of learned positions."""
    positions = batch.time if settings.position == "learned" else 0
    return batch.narrow(settings.d_model) + positions * settings.d_model * FLOAT32


def final_norm(settings: config.Network, batch: MicroBatch) -> int:
    """None where the norms stand behind what they normalize."""
    return _norm(settings, settings.widths[-1], batch) if settings.norm_position == "pre" else 0


def at_head(batch: MicroBatch, head_tokens: int) -> MicroBatch:
    """The stretch of it whose logits are in memory at one time."""
    chunks = count(batch.sequences, batch.time, most_tokens=head_tokens)
    return batch._replace(time=batch.time // chunks)


def logits(settings: config.Network, vocab_size: int, batch: MicroBatch) -> int:
    """Logits and their exponentials, side by side while the one is made of the other.

    Later the exponentials become the gradient in place. With a soft cap its gradient needs the
    capped logits besides.
    """
    multiple = settings.pad_vocab_to_multiple_of
    padded = -(-vocab_size // multiple) * multiple
    capped = 0 if settings.logit_softcap is None else vocab_size
    return batch.wide(padded + vocab_size + capped)


def dropout_index(settings: config.Network, batch: MicroBatch) -> int:
    """Numbers of an example's entries, that are hashed to its masks: the same for all layers.

    Of the residual stream, and of the scores.
    """
    example, attention = batch._replace(sequences=1), settings.attention
    stream = example.wide(settings.d_model) if settings.dropout else 0
    scores = 0
    if settings.attention_rate == 0:
        pass
    elif _is_dense(attention, batch.time):
        scores = attention.num_heads * batch.time**2
    elif isinstance(attention, config.CausalAttention | config.SparseAttention):
        scores = sum(tile.scores for tile in _tiles(attention, settings.d_model, example))
    return stream + scores * FLOAT32


def block(
    settings: config.Network, inputs: int, outputs: int, batch: MicroBatch, *, is_first: bool
) -> Parts:
    """What one block keeps, by part."""
    first_norm = inputs if settings.norm_position == "pre" else outputs
    # The stream after attention and after the MLP.
    norms = 2 * batch.wide(outputs)
    norms += _norm(settings, first_norm, batch) + _norm(settings, outputs, batch)
    if settings.layer_scale is not None:  # the branches before they are scaled
        norms += 2 * batch.narrow(outputs)
    attention = settings.attention
    if isinstance(attention, config.LatentAttention):
        projections = _latent(attention, inputs, batch)
    else:
        projections = _multi_head(attention, inputs, batch, is_first=is_first)
    parts = {
        "norms_and_residual": norms,
        "projections": projections,
        "attention_weights": _weights(settings, inputs, batch),
    }
    match settings.mlp:
        case config.MixtureOfExperts():
            return parts | {"experts": _experts(settings.mlp, outputs, batch)}
        case config.DenseMlp(kind=kind):
            return parts | {"mlp": _mlp(kind, settings.mlp.hidden_in(outputs), batch)}
        case _:
            assert_never(settings.mlp)


def products(
    settings: config.Network, vocab_size: int, batch: MicroBatch, at_head: MicroBatch
) -> Iterator[Product]:
    """The largest matrix products of the forward pass."""
    tokens, last = batch.tokens, settings.widths[-1]
    yield Product(1, at_head.tokens, last, vocab_size)
    width = max(settings.widths)
    match settings.mlp:
        case config.MixtureOfExperts(num_experts=experts, top_k=top_k):
            share = Room.for_tokens(tokens, top_k, experts).share
            yield Product(experts, share, width, settings.mlp.hidden_in(width))
        case config.DenseMlp():
            yield Product(1, tokens, width, settings.mlp.hidden_in(width))
        case _:
            assert_never(settings.mlp)
    attention = settings.attention
    if _is_dense(attention, batch.time):
        head_dim = _inner(attention, width) // attention.num_heads
        yield Product(batch.sequences * attention.num_heads, batch.time, head_dim, batch.time)


def remembered(outputs: int, batch: MicroBatch) -> Parts:
    """What is left of a block that is computed again: what it gives, the next one's input."""
    return {"block_outputs": batch.narrow(outputs)}


def halves(kept: Parts) -> tuple[Parts, Parts]:
    """A block while the backward pass is in its MLP, and then in its attention.

    There the gradients of the hidden layer stand beside it, before and after its activation; here
    those of the scores, one array more than the weights that they replace.
    """
    hidden = "experts" if "experts" in kept else "mlp"
    in_mlp = kept | {"backward_pass": 2 * kept[hidden] // 3}
    in_attention = kept | {hidden: 0, "backward_pass": kept["attention_weights"] // 3}
    return in_mlp, in_attention


def _norm(settings: config.Network, width: int, batch: MicroBatch) -> int:
    """The normalized input and the scaled output; for LayerNorm the centred input besides."""
    match settings.norm:
        case "layernorm":
            return 2 * batch.wide(width) + batch.narrow(width)
        case "rmsnorm":
            return batch.wide(width) + batch.narrow(width)
        case _:
            assert_never(settings.norm)


# --- attention ------------------------------------------------------------------------------------


def _multi_head(
    attention: config.MultiHead, inputs: int, batch: MicroBatch, *, is_first: bool
) -> int:
    """Queries, keys and values as the products of attention read them, and the heads' output."""
    queries, keys = _inner(attention, inputs), _keys_width(attention, inputs)
    size = batch.narrow(queries)  # the output, heads side by side, that the last projection reads
    match attention:
        case config.SparseKAttention(window_including_self=window):
            # Its own backward pass keeps the inputs, keys and values with a window in front; the
            # loops over chunks read copies of these in float32.
            padded = batch.sequences * (batch.time + window) * keys
            size += 2 * batch.narrow(queries) + 2 * padded * (batch.narrow_bytes + FLOAT32)
            size += batch.wide(inputs) if batch.narrow_bytes < FLOAT32 else 0  # scores are float32
            size += batch.wide(_SPARSEK_FIELDS * _kv_heads(attention))
        case config.CausalAttention() | config.SparseAttention():
            if tiles := _tiles(attention, inputs, batch):
                # And the views' mixture, not yet divided by what their weights sum to.
                size += sum(tile.laid_out for tile in tiles) + batch.wide(queries)
            else:
                size += batch.wide(queries + 2 * keys)
        case _:
            assert_never(attention)
    if attention.qk_norm:  # as projected; then queries and keys normalized, and scaled
        size += batch.narrow(queries + 2 * keys) + 2 * batch.wide(queries + keys)
    if attention.output_gate:  # the gate, and the output before it
        size += 2 * batch.narrow(queries)
    if attention.value_residual and not is_first:  # the values before they were mixed
        size += batch.wide(keys)
    return size


def _latent(attention: config.LatentAttention, inputs: int, batch: MicroBatch) -> int:
    """Queries and keys with their rotary parts, values, the two latents, and the heads' output."""
    inner = _inner(attention, inputs)
    rotary = attention.num_heads * attention.rotary_dim
    size = batch.wide(2 * (inner + rotary) + inner) + batch.narrow(inner)
    for rank, beside in ((attention.kv_rank, attention.rotary_dim), (attention.query_rank or 0, 0)):
        # As projected; normalized; scaled. The norm reads float32.
        size += batch.narrow(rank + beside) + batch.wide(rank) + batch.narrow(rank)
        size += batch.wide(rank) if batch.narrow_bytes < FLOAT32 else 0
    if attention.output_gate:
        size += 2 * batch.narrow(inner)
    return size


def _weights(settings: config.Network, inputs: int, batch: MicroBatch) -> int:
    """The scores' exponentials, and the weights that multiply the values, all float32.

    These are what dropout has left, or without it the normalized ones.
    """
    attention, time = settings.attention, batch.time
    if isinstance(attention, config.SparseKAttention):
        return 0  # computed again in the backward pass, chunk by chunk
    if not _is_dense(attention, time):
        assert not isinstance(attention, config.LatentAttention)
        return 2 * FLOAT32 * sum(tile.scores for tile in _tiles(attention, inputs, batch))
    rows = batch.sequences * attention.num_heads * time
    copies = 3 if rows >= _MANY_ROWS else 2
    return copies * FLOAT32 * rows * time


def _is_dense(attention: config.Attention, time: int) -> bool:
    """Whether all pairs of positions have a score."""
    match attention:
        case config.CausalAttention() | config.SparseAttention():
            return not sparse.saves(attention, time)
        case config.SparseKAttention():
            return False
        case config.LatentAttention():
            return True
        case _:
            assert_never(attention)


class _Tile(NamedTuple):
    """One view of a sparse pattern: how many scores it holds, and the bytes of what it reads."""

    scores: int
    laid_out: int


def _tiles(
    attention: config.CausalAttention | config.SparseAttention, inputs: int, batch: MicroBatch
) -> list[_Tile]:
    """Empty where attention is dense."""
    if _is_dense(attention, batch.time):
        return []
    heads, dim = attention.num_heads, _inner(attention, inputs) // attention.num_heads
    found = []
    for view in sparse.views(attention, batch.time, heads):
        kv_heads = heads if view.heads > 1 else _kv_heads(attention)
        queries, keys = (
            math.prod(jax.eval_shape(lay_out, _array(batch, count, dim)).shape)
            for lay_out, count in ((view.queries, heads), (view.keys, kv_heads))
        )
        scores = queries // dim * view.keys_per_query
        found.append(_Tile(scores, (queries + 2 * keys) * FLOAT32))
    return found


def _array(batch: MicroBatch, heads: int, dim: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch.sequences, heads, batch.time, dim), jnp.float32)


def _inner(attention: config.Attention, inputs: int) -> int:
    """The width of all heads together."""
    if isinstance(attention, config.LatentAttention):
        return attention.num_heads * (attention.head_dim or inputs // attention.num_heads)
    return attention.intermediate_dim or inputs


def _kv_heads(attention: config.MultiHead) -> int:
    return attention.num_kv_heads or attention.num_heads


def _keys_width(attention: config.MultiHead, inputs: int) -> int:
    return _inner(attention, inputs) // attention.num_heads * _kv_heads(attention)


# --- MLP ------------------------------------------------------------------------------------------


def _mlp(kind: config.Activation, hidden: int, batch: MicroBatch) -> int:
    match kind:
        case "gelu":  # x, its error function and what is made of both; x with its bias rounded
            rounded = 1 if batch.narrow_bytes < FLOAT32 else 0
            return batch.narrow((3 + rounded) * hidden)
        case "relu" | "relu2":  # before and after
            return batch.narrow(2 * hidden)
        case "swiglu":  # gate and up; the gate's sigmoid, its SiLU, and that times up
            return batch.narrow(5 * hidden)
        case _:
            assert_never(kind)


def _experts(settings: config.MixtureOfExperts, width: int, batch: MicroBatch) -> int:
    """Each token's copies, where they lie for their experts, and the shares' hidden layers.

    What is beyond an expert's share is computed again in the backward pass.
    """
    experts, top_k = settings.num_experts, settings.top_k
    hidden = settings.hidden_in(width)
    room = Room.for_tokens(batch.tokens, top_k, experts)
    shares = experts * room.share
    rows = room.rows * width * batch.narrow_bytes
    share = MicroBatch(1, shares, batch.narrow_bytes)
    return rows + batch.wide(top_k * width) + _mlp(settings.activation, hidden, share)
