"""The training step of a run, compiled for its shapes, with what that took and what it needs."""

import time
from dataclasses import dataclass
from functools import partial

import jax

from mainrun import memory, parts
from mainrun.config import Config
from mainrun.origin import Base
from mainrun.parts import Parts
from mainrun.training import backend
from mainrun.training.step import TrainState, TrainStep


@dataclass(frozen=True, eq=False)
class Compiled:
    """The training step, ready to run."""

    train_step: TrainStep
    seconds: float  # that making it took
    step_bytes: int  # by the compiler's count
    estimate: memory.Estimate


def compile_step(config: Config, joined: Parts, base: Base | None) -> Compiled:
    """The step of these parts. Raises UserError where it does not fit the device."""
    started = time.perf_counter()
    train_step = parts.train_step(config, joined)
    state, batch = initial_shapes(config, joined, base), parts.batch(config, joined.texts, 0)
    executable = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
    compiled = Compiled(
        executable,
        time.perf_counter() - started,
        memory.executable_bytes(executable),
        memory.estimate(config, joined.network.vocab_size, joined.micro_batches, state),
    )
    memory.check_fits(compiled.step_bytes, backend.memory_limit_bytes())
    return compiled


def initial_shapes(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """The state before the first step, in shapes alone."""
    return jax.eval_shape(_make_state(config, joined), base.params if base else None)


def initial_state(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """The state before the first step. It takes the base's arrays over: one copy is enough."""
    make = jax.jit(_make_state(config, joined), donate_argnums=0)
    return make(base.params if base else None)


def _make_state(config: Config, joined: Parts) -> "partial[TrainState]":
    return partial(parts.initial_state, config, joined)
