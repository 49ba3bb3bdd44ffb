"""Fused attention on eight cards that are not here: compiled for them, nothing is run."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import optax
import pytest

from mainrun import config as configs
from mainrun import parts
from mainrun.memory import cards, compiled, target
from mainrun.model.fused import Kernel, by_cudnn
from mainrun.training import backend, mesh, optimizer, step

BATCH, HEADS, TIME, DIM, VOCAB = 16, 4, 256, 64, 5000
RATE = optax.constant_schedule(0.1)


def eight() -> Sequence[Any]:
    found = target.devices(cards.CARDS["h200"], 8)
    if found is None:
        pytest.skip("needs the CUDA wheels (the extra cuda12), no GPU")
    return found


@pytest.mark.slow
@pytest.mark.parametrize("masks_documents", [False, True])
@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 4, 1), (1, 4, 2), (2, 2, 2)])
def test_each_device_attends_to_its_own_examples_with_its_own_heads(
    sizes: tuple[int, int, int], masks_documents: bool
) -> None:
    """The kernel's operands are not gathered: no device holds more than its part of them."""
    settings = configs.load(
        None,
        [
            f"model.d_model={HEADS * DIM}", f"model.attention.num_heads={HEADS}",
            "model.num_layers=1", "model.dropout=0.0", f"data.context_length={TIME}",
            f"training.batch_size={BATCH}", "training.precision=bfloat16",
        ],
    )  # fmt: skip
    settings = replace(settings, data=replace(settings.data, mask_documents=masks_documents))
    layout = mesh.Layout(*sizes, eight())
    train_step = step.make_train_step(
        parts.build_network(settings, VOCAB).with_kernel(Kernel("cudnn", by_cudnn)),
        optimizer.optimizer(settings.optimizer, RATE, settings.training.grad_clip),
        RATE,
        settings.training,
        micro_batches=1,
        mask_documents=masks_documents,
        head_tokens=backend.head_tokens(VOCAB, "gpu"),
        layout=layout,
    )
    given = (
        layout.on_devices(compiled.abstract_state(settings, VOCAB)),
        compiled.abstract_batch(settings),
    )
    options = layout.jit_options(given, (given[0], 0))
    text = jax.jit(train_step, **options).lower(*given).compile().as_text() or ""
    kernels = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    data, fsdp, model = sizes
    part = f"bf16[{BATCH // (data * fsdp)},{HEADS // model},{TIME},{DIM}]"
    assert len(kernels) == 2, "one forward, one backward"
    for line in kernels:
        assert set(re.findall(rf"bf16\[\d+,\d+,{TIME},{DIM}\]", line)) == {part}
