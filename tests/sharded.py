"""A train step and an evaluation on a mesh against the same on one device, in a process of its own.

`python -m tests.sharded 2,2,2 NAME ...` with eight virtual devices prints, for each variant, a line
of JSON: the largest differences, and what share of the state one device holds.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.model.gpt import Network
from mainrun.training import evaluate, mesh, optimizer, step
from mainrun.training.mesh import ONE, Layout
from mainrun.training.step import Metrics, TrainState
from tests import variants

BATCH = 8
OPTIMIZERS = {"adamw": config.AdamW(), "muon": config.Muon(), "adafactor": config.Adafactor(),
              "schedule_free": config.ScheduleFreeAdamW()}  # fmt: skip


def batch() -> Batch:
    rng = np.random.default_rng(3)
    shape = BATCH, variants.CONTEXT
    inputs, targets = (rng.integers(0, variants.VOCAB, shape, np.int32) for _ in range(2))
    ends = (inputs == 1).cumsum(1, dtype=np.int32)
    return Batch(inputs, targets, ends, (rng.random(shape) < 0.9).astype(np.float32))


def after_two_steps(
    network: Network, settings: config.Optimizer, layout: Layout
) -> tuple[TrainState, Metrics, np.ndarray]:
    """The state, the last metrics, and the likelihood of every target under it."""
    training = config.Training(batch_size=BATCH)
    made = optimizer.optimizer(settings, lambda _: 1e-3, 1.0)
    options = {"mask_documents": True, "micro_batches": 2, "layout": layout, "head_tokens": 64}
    train_step = step.make_train_step(network, made, lambda _: 1e-3, training, **options)

    def initial() -> TrainState:
        return step.init(network, made, jax.random.key(0), training)

    shapes = layout.on_devices(jax.eval_shape(initial))
    state = jax.jit(initial, **layout.jit_options([], shapes))()
    some = jax.tree.map(layout.put, batch())
    results = shapes, jax.eval_shape(train_step, shapes, some)[1]
    taken = jax.jit(train_step, **layout.jit_options((shapes, some), results))
    for _ in range(2):
        state, metrics = taken(state, some)
    score = evaluate.make_score_batch(network, **options)
    return state, metrics, np.asarray(score(state.params, some).nll)


def compare(name: str, layout: Layout) -> dict[str, float]:
    """The largest differences between the layout and one device."""
    network, settings = variants.networks()["gpt"], config.AdamW()
    if name in OPTIMIZERS:
        settings = OPTIMIZERS[name]
    else:
        network = variants.networks()[name]
    bound = Network(
        dataclasses.replace(network, dropout=0.1),
        vocab_size=variants.VOCAB,
        context_length=variants.CONTEXT,
        precision="float32",
    )
    alone, spread = (after_two_steps(bound, settings, each) for each in (ONE, layout))

    def apart(ours: object, theirs: object) -> float:
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
        return max(float(jnp.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in pairs)

    leaves = jax.tree.leaves(spread[0])
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return {
        "loss": apart(spread[1].loss, alone[1].loss),
        "params": apart(spread[0].params, alone[0].params),
        "nll": apart(spread[2], alone[2]),
        "held": held / sum(leaf.nbytes for leaf in leaves),
    }


def main(sizes: str, *names: str) -> None:
    data, fsdp, model = map(int, sizes.split(","))
    layout = mesh.layout(config.Mesh(data, fsdp, model), BATCH // 2, jax.devices())
    for name in names:
        print(json.dumps({"name": name, **compare(name, layout)}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
