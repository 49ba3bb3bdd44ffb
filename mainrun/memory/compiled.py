"""The compiler's own count of a training step's bytes, and whether the device has them."""

import jax
import numpy as np
import optax

from mainrun import parts
from mainrun.config import Config
from mainrun.data.batches import Batch
from mainrun.errors import UserError
from mainrun.model import lora
from mainrun.training import backend, optimizer, step
from mainrun.training.step import TrainState

_SPARE = 0.95  # of the device's memory: the runtime needs some besides the step


def executable_bytes(executable: jax.stages.Compiled) -> int:
    """By the compiler's count: arguments, results that do not reuse them, and temporaries.

    Its own `peak_memory_in_bytes` leaves the temporaries out on a CPU (SPEED section 5).
    """
    found = executable.memory_analysis()
    assert found is not None
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def check_fits(step_bytes: int, limit_bytes: int | None) -> None:
    """Raises UserError, naming the remedy, for a step that is larger than the device's memory."""
    if not fits(step_bytes, limit_bytes):
        raise UserError(too_large(step_bytes, limit_bytes))


def fits(step_bytes: int, limit_bytes: int | None) -> bool:
    """Whether the device has so much; where what it has is unknown, yes."""
    return limit_bytes is None or step_bytes <= _SPARE * limit_bytes


def too_large(step_bytes: int, limit_bytes: int | None) -> str:
    """That it does not fit, and what would help."""
    assert limit_bytes is not None
    return (
        f"a training step needs {gibibytes(step_bytes)}, the device has "
        f"{gibibytes(limit_bytes)}: raise training.grad_accumulation (auto: as far as needed) or "
        "make the model, training.batch_size or data.context_length smaller"
    )


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"


def step_bytes(config: Config, vocab_size: int, micro_batches: int) -> int:
    """The compiler's count for the step of these settings, compiled for shapes alone.

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
        head_tokens=backend.head_tokens(vocab_size),
    )
    state, batch = abstract_state(config, vocab_size), abstract_batch(config)
    lowered = jax.jit(train_step, donate_argnums=0).lower(state, batch)
    # It will not run, so fast machine code is not worth its time; the count is the same (two
    # layers on a CPU: 3.4 s instead of 5.0). Not tried on a GPU.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return executable_bytes(lowered.compile(options))


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
