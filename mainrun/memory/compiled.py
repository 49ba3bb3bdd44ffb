"""The compiler's own count of a training step's bytes, and whether the device has them."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import SingleDeviceSharding

from mainrun import parts
from mainrun.config import Config
from mainrun.data.batches import Batch
from mainrun.memory import scratch
from mainrun.model import lora
from mainrun.training import backend, optimizer, step
from mainrun.training.step import TrainState

SPARE = 0.95  # of the device's memory: the runtime needs some besides the step


def executable_bytes(executable: jax.stages.Compiled) -> int:
    """By the compiler's count: arguments, results that do not reuse them, and temporaries.

    Its own `peak_memory_in_bytes` leaves the temporaries out on a CPU (SPEED section 5), and what
    products pack there is in none of its figures (`scratch`).
    """
    found = executable.memory_analysis()
    assert found is not None
    device = next(iter(jax.tree.leaves(executable.input_shardings)[0].device_set))
    packed = scratch.packed_bytes(executable.as_text() or "") if device.platform == "cpu" else 0
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
        + packed
    )


def fits(step_bytes: int, limit_bytes: int | None) -> bool:
    """Whether the device has so much; where what it has is unknown, yes."""
    return limit_bytes is None or step_bytes <= SPARE * limit_bytes


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def step_bytes(
    config: Config, vocab_size: int, micro_batches: int, device: jax.Device | None = None
) -> int:
    """The compiler's count for the step of these settings, compiled for shapes alone.

    `device` is one that need not be here (see `target`); None: this machine's.
    Without the schedule of the learning rate, which takes a few numbers and needs the corpus.
    """
    network, made = parts.build_network(config, vocab_size), _optimizer(config)
    train_step = step.make_train_step(
        network,
        made,
        optax.constant_schedule(config.optimizer.learning_rate),
        config.training,
        micro_batches=micro_batches,
        mask_documents=config.data.mask_documents,
        head_tokens=backend.head_tokens(vocab_size, None if device is None else device.platform),
    )
    state, batch = abstract_state(config, vocab_size), abstract_batch(config)
    if device is not None:
        state, batch = jax.tree.map(partial(_placed, SingleDeviceSharding(device)), (state, batch))
    lowered = jax.jit(train_step, donate_argnums=0).lower(state, batch)
    # It will not run, so fast machine code is not worth its time; the count is the same (two
    # layers on a CPU: 3.4 s instead of 5.0). Not tried on a GPU.
    is_cpu = (device or jax.devices()[0]).platform == "cpu"
    options: dict[str, Any] | None = {"xla_backend_optimization_level": 0} if is_cpu else None
    return executable_bytes(lowered.compile(options))


def _placed(sharding: SingleDeviceSharding, array: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)


def abstract_state(config: Config, vocab_size: int) -> TrainState:
    """The shapes of a run's state; under adapters its base is taken to fit."""
    network, made = parts.build_network(config, vocab_size), _optimizer(config)

    def initial() -> TrainState:
        key = jax.random.key(0)
        base = None if config.model.lora is None else lora.split(network.init(key))[1]
        return step.init(network, made, key, config.training, base)

    return jax.eval_shape(initial)


def abstract_batch(config: Config) -> Batch:
    """The shapes of a step's batch."""
    shape = config.training.batch_size, config.data.context_length
    ids = jax.ShapeDtypeStruct(shape, np.int32)
    return Batch(ids, ids, ids, jax.ShapeDtypeStruct(shape, np.float32))  # type: ignore[arg-type]


def _optimizer(config: Config) -> optimizer.Optimizer:
    rate = optax.constant_schedule(config.optimizer.learning_rate)
    return optimizer.optimizer(config.optimizer, rate, config.training.grad_clip)
