"""Bytes that a training step takes, reckoned from the settings: by part, when they are most.

A step is a few moments, and its memory is that of the worst: where the forward pass has kept all
that the backward pass needs, somewhere in the backward pass, or where all gradients are there and
their norm is taken. Parameters and the optimizer's state are exact; activations are formulas (see
`activations`). Calibrated with XLA for CPUs; for a GPU it fuses more, and keeps less.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, assert_never

import jax
import jax.numpy as jnp

from mainrun.config import Config, ScheduleFreeAdamW
from mainrun.memory import activations, scratch
from mainrun.memory.activations import FLOAT32, MicroBatch, Parts
from mainrun.memory.compiled import abstract_batch, abstract_state
from mainrun.training import backend
from mainrun.training.step import TrainState

_HALF = 2  # bytes of a number of 16 bits


@dataclass(frozen=True)
class Estimate:
    """A training step at the moment when it takes most memory: bytes of each part."""

    moment: str
    parts: Mapping[str, int]  # all but what stands in blocks
    blocks: tuple[Mapping[str, int], ...]  # what each block has kept, none where it is gone
    activation_bytes: int  # at the end of the forward pass, whenever the peak is

    @property
    def by_part(self) -> dict[str, int]:
        """Bytes of each part, the blocks' together, largest first; none is zero."""
        counted = Counter(self.parts)
        for block in self.blocks:
            counted.update(block)
        return {name: size for name, size in counted.most_common() if size}

    @property
    def total_bytes(self) -> int:
        return sum(self.by_part.values())

    @property
    def dominating(self) -> str:
        """The name of the largest part."""
        return next(iter(self.by_part))


def estimate(
    config: Config,
    vocab_size: int,
    micro_batches: int,
    state: TrainState | None = None,
    *,
    platform: str | None = None,
) -> Estimate:
    """A training step, its batch cut into so many micro-batches.

    `state` gives the shapes, where they are at hand; `platform` is another than this machine's.
    """
    state = state or abstract_state(config, vocab_size)
    platform = platform or jax.default_backend()
    moments = _moments(config, vocab_size, micro_batches, state, platform)
    return max(moments, key=lambda moment: moment.total_bytes)


def _moments(
    config: Config, vocab_size: int, micro_batches: int, state: TrainState, platform: str
) -> Iterator[Estimate]:
    model, is_cut = config.model, micro_batches > 1
    passes = 2 if config.training.regularization.r_drop else 1  # at once, side by side
    batch = MicroBatch(
        passes * config.training.batch_size // micro_batches,
        config.data.context_length,
        jnp.dtype(config.training.precision).itemsize,
    )
    whole = _blocks(config, state, batch)
    blocks = _remembered(config, whole, batch)
    trained = _bytes(state.params)
    always = {
        "parameters": trained,
        "frozen_parameters": _bytes(state.frozen),
        "optimizer_state": _bytes(state.opt_state),
        "weight_average": _bytes(state.average),
        "batch": _bytes(abstract_batch(config)),
    }
    first = {
        "embedding": activations.embedding(model, batch),
        "dropout_index": activations.dropout_index(model, batch),
    }
    at_head = activations.at_head(batch, backend.head_tokens(vocab_size, platform))
    products = activations.products(model, vocab_size, batch, at_head)
    last = {
        "final_norm": activations.final_norm(model, batch),
        "logits": activations.logits(model, vocab_size, at_head),
        # R-Drop keeps the log probabilities, the probabilities and their difference.
        "two_passes": 3 * at_head.wide(vocab_size) if passes > 1 else 0,
    }
    kept = sum(sum(part.values()) for part in (first, *blocks, last))
    moment = functools.partial(Estimate, activation_bytes=kept)

    in_hand = (
        always
        | first
        | {
            "gradient_accumulator": trained if is_cut else 0,
            "gradient_point": trained if isinstance(config.optimizer, ScheduleFreeAdamW) else 0,
            "rounded_weights": _rounded_weights(config, state, is_cut=is_cut),
            "packed_operands": scratch.packed_for(products) if platform == "cpu" else 0,
        }
    )
    gradients = _bytes_of(state.params, "token_embedding" if model.tie_embeddings else "head")
    # Stretch by stretch, the table's gradient is summed up beside the logits: the sum and a part.
    summed = 2 * gradients if at_head.time < batch.time else 0
    yield moment("the end of the forward pass", in_hand | last | {"gradients": summed}, blocks)
    # Of the logits their gradient is left.
    head = last | {"logits": at_head.wide(vocab_size), "gradients": gradients}
    yield moment("the gradient of the head", in_hand | head, blocks)
    for number in reversed(range(len(blocks))):
        own = _bytes_of(state.params, f"blocks.{number}")
        # Micro-batches add a block's gradients to the accumulator as they come.
        gradients = own if is_cut else gradients + own
        for half in activations.halves(whole[number]):
            yield moment(
                f"the backward pass of block {number + 1}",
                in_hand | {"gradients": gradients},
                (*blocks[:number], half),
            )
    # The norm reads the gradients' sums while the update already has their means.
    copies = 1 if config.training.grad_clip is None else 2
    yield moment("the update", always | {"gradients": copies * trained}, ())


def _blocks(config: Config, state: TrainState, batch: MicroBatch) -> tuple[Parts, ...]:
    model = config.model
    blocks = tuple(
        activations.block(model, inputs, outputs, batch, is_first=number == 0)
        for number, (inputs, outputs) in enumerate(pairwise(model.widths))
    )
    for name, array in _named(state).items():
        if skip := re.match(r"skips\.(\d+)\.project", name):
            # The n-th skip leads to the mirror image of the n-th block.
            blocks[-1 - int(skip[1])]["skip"] = batch.narrow(array.shape[-1])
        elif adapter := re.match(r"blocks\.(\d+)\..*adapter\.down$", name):
            assert model.lora is not None
            inputs, rank = array.shape
            # Between its two matrices; and what dropout has left of the input.
            width = rank + (inputs if model.lora.dropout else 0)
            parts = blocks[int(adapter[1])]
            parts["adapters"] = parts.get("adapters", 0) + batch.narrow(width)
    return blocks


def _remembered(config: Config, whole: tuple[Parts, ...], batch: MicroBatch) -> tuple[Parts, ...]:
    """What the forward pass leaves of each block; a skip stands beside the blocks."""
    match config.training.remat:
        case "none":
            return whole
        case "blocks":
            skips = ({"skip": block["skip"]} if "skip" in block else {} for block in whole)
            widths = config.model.widths[1:]
            return tuple(
                activations.remembered(width, batch) | skip
                for width, skip in zip(widths, skips, strict=True)
            )
        case _:
            assert_never(config.training.remat)


def _rounded_weights(config: Config, state: TrainState, *, is_cut: bool) -> int:
    """Copies of the matrices in 16 bits, which XLA:CPU reads as float32 that were rounded.

    Of micro-batches they are made once: in 16 bits for the forward pass, and transposed in float32
    for the backward pass.
    """
    if config.training.precision == "float32":
        return 0
    looked_up = "position_embedding" if config.model.tie_embeddings else ".*embedding"
    numbers = sum(
        int(array.size)
        for name, array in _named(state).items()
        if array.ndim >= 2 and not re.match(looked_up, name)
    )
    return numbers * (_HALF + FLOAT32 if is_cut else FLOAT32)


def _named(state: TrainState) -> dict[str, Any]:
    """Shapes of all parameters, trained or not."""
    return {**state.frozen, **state.params}


def _bytes(tree: Any) -> int:
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(tree))


def _bytes_of(params: Mapping[str, Any], prefix: str) -> int:
    """Of the parameters below that name."""
    return _bytes([array for name, array in params.items() if name.startswith(f"{prefix}.")])
