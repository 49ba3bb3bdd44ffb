"""The training steps of a run, compiled for their shapes, with what that took and what it needs."""

import time
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np

from mainrun import memory, parts
from mainrun.config import Config
from mainrun.origin import Base
from mainrun.parts import Parts
from mainrun.training import backend
from mainrun.training.feed import Feed
from mainrun.training.step import TrainState
from mainrun.training.stretch import Run, stretch
from mainrun.training.trainee import MOST_STEPS


@dataclass(frozen=True, eq=False)
class Compilation:
    """What compiling took, and what it says."""

    seconds: float
    step_bytes: int  # by the compiler's count
    estimate: memory.Estimate


@dataclass(frozen=True, eq=False)
class Compiled:
    """Training steps, ready to run, and what feeds them."""

    run: Run
    feed: Feed
    compilation: Compilation


def compile_step(config: Config, joined: Parts, base: Base | None) -> Compiled:
    """The steps of these parts. Raises UserError where one does not fit the device."""
    started, limit = time.perf_counter(), backend.memory_limit_bytes()
    feed = parts.feed(config, joined, MOST_STEPS, limit_bytes=limit)
    run = stretch(parts.train_step(config, joined), feed.batch_at, feed.most)
    state = initial_shapes(config, joined, base)
    vocab_size, layout = joined.network.vocab_size, joined.layout
    share = layout.share_of(config)
    estimate = memory.estimate(share, vocab_size, joined.micro_batches, layout.held(state))
    memory.check_possible(estimate, limit, config, vocab_size)
    given = state, feed(0, 1), np.int32(1)
    options = layout.jit_options(given, (state, 0))  # metrics lie everywhere
    executable = jax.jit(run, donate_argnums=0, **options).lower(*given).compile()
    seconds, step_bytes = time.perf_counter() - started, memory.executable_bytes(executable)
    memory.check_fits(step_bytes, limit, config, vocab_size)
    return Compiled(executable, feed, Compilation(seconds, step_bytes, estimate))


def initial_shapes(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """The state before the first step: shapes alone, and where on a mesh its arrays lie."""
    shapes = jax.eval_shape(_make_state(config, joined), base.params if base else None)
    return joined.layout.on_devices(shapes)


def initial_state(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """The state before the first step. It takes the base's arrays over: one copy is enough."""
    layout = joined.layout
    shapes = None if layout.is_one else initial_shapes(config, joined, base)
    given = {n: layout.put(array) for n, array in base.params.items()} if base else None
    options = layout.jit_options([given], shapes)
    return jax.jit(_make_state(config, joined), donate_argnums=0, **options)(given)


def _make_state(config: Config, joined: Parts) -> "partial[TrainState]":
    return partial(parts.initial_state, config, joined)
