"""A config's own training steps: timed one at a time, some of them traced, then as training does.

One at a time, nothing overlaps, so a step's time has parts: input (the host says what its batch
is), dispatch (the host's call, which sends what does not lie on the device), compute (until all of
it is there). Training dispatches ahead, several short steps at once, which hides the first two; its
tokens a second are what utilisation is counted by. A trace slows steps down, so no traced step is
timed. Compiling does not look into JAX's cache: it takes what it takes a machine the first time.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

import jax
import numpy as np

from mainrun.compilation import compile_step, initial_state
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.model.gpt import num_parameters
from mainrun.opening import prepare
from mainrun.profile.trace import traced
from mainrun.training import backend, flops, peaks
from mainrun.training.feed import Feed
from mainrun.training.step import TrainState
from mainrun.training.stretch import Run
from mainrun.training.trainee import Alone, Asked, Dispatched

Tell = Callable[[str], None]

WARM_UP = 3
_TRACED = 3


@dataclass(frozen=True)
class Chosen:
    """Which steps are timed and traced. Numbers count from 1, as a run's do."""

    steps: int = 10  # timed one at a time; and as many dispatches as training makes them
    trace: range | None = None  # None: the first few after those that are timed

    @property
    def traced(self) -> range:
        first = WARM_UP + self.steps + 1
        return range(first, first + _TRACED) if self.trace is None else self.trace


class Split(NamedTuple):
    """Seconds of one step that has the machine to itself."""

    input: float
    dispatch: float
    compute: float

    @property
    def total(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Measured:
    """What the steps of one config took."""

    splits: list[Split]
    seconds: float  # of a step as training takes them, in the mean
    steps_per_dispatch: float
    tokens_per_step: int
    micro_batches: int
    parameters: int
    flops: flops.Flops  # of a token in training
    precision: str
    device: str
    peak_flops: float | None  # a second, by the data sheet, of all devices
    measured_peak_flops: float  # a second, of all devices
    peak_memory_bytes: int
    step_bytes: int  # by the compiler's count
    compile_seconds: float
    traced: range  # empty: no trace
    trace: Path | None  # for Perfetto

    @property
    def split(self) -> Split:
        """Medians of the parts."""
        return Split(*(median(part) for part in zip(*self.splits, strict=True)))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens_per_step / self.seconds

    @property
    def utilisation(self) -> float:
        """Of the data sheet's peak, or where there is none, of the measured one."""
        peak = self.peak_flops or self.measured_peak_flops
        return self.tokens_per_second * self.flops.total / peak


def measure(config: Config, chosen: Chosen, trace_dir: Path | None, *, tell: Tell) -> Measured:
    """The steps of a new run with this config, of which nothing is kept but the trace.

    Raises UserError for what cannot be read or does not fit, and for steps that the run has not.
    """
    with _cache_disabled():
        prepared = prepare(config, None, "", command=())
        config, joined = prepared.config, prepared.joined
        chosen_traced = chosen.traced if trace_dir else range(0)
        _check(chosen_traced, joined.plan.total_steps)
        tell("compiling the training step")
        compiled = compile_step(config, joined, prepared.base)
        state = initial_state(config, joined, prepared.base)
        parameters = num_parameters(state.all_params)
        alone = _OneAtATime(compiled.run, compiled.feed, state)
        del state
        tell(f"taking {WARM_UP} steps to warm up, then {chosen.steps} one at a time")
        splits, trace = _walked(alone, chosen.steps, chosen_traced, trace_dir, tell)
        tell(f"as training takes them, {chosen.steps} dispatches")
        trainee = Alone(alone.release(), compiled.run, compiled.feed)
        seconds, steps_per_dispatch = _in_training(trainee, chosen.steps)
        peak_memory_bytes = backend.peak_memory_bytes()
        del trainee
        tell("measuring the device's peak")
        precision = config.training.precision
        peak = peaks.of_device(jax.local_devices()[0].device_kind, precision)
        # Those of a CPU are the same cores.
        devices = 1 if jax.default_backend() == "cpu" else joined.layout.devices
        return Measured(
            splits=splits,
            seconds=seconds,
            steps_per_dispatch=steps_per_dispatch,
            tokens_per_step=joined.plan.tokens_per_step,
            micro_batches=joined.micro_batches,
            parameters=parameters,
            flops=flops.training(joined.network, config.training.regularization),
            precision=precision,
            device=backend.describe_device(),
            peak_flops=peak and devices * peak,
            measured_peak_flops=devices * peaks.measured(precision),
            peak_memory_bytes=peak_memory_bytes,
            step_bytes=compiled.compilation.step_bytes,
            compile_seconds=compiled.compilation.seconds,
            traced=chosen_traced,
            trace=trace,
        )


class _OneAtATime:
    """Steps of which each is done before the next begins."""

    def __init__(self, run: Run, feed: Feed, state: TrainState) -> None:
        self._run, self._feed = run, feed
        self._state: TrainState | None = state

    def take(self, number: int) -> Split:
        """Its parts are named in a trace; where there is none, that costs nothing to speak of."""
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            started = time.perf_counter()
            with jax.profiler.TraceAnnotation("input"):
                given = self._feed(number - 1, 1)
            fed = time.perf_counter()
            with jax.profiler.TraceAnnotation("dispatch"):
                self._state, metrics = self._run(self.release(), given, np.int32(1))
            called = time.perf_counter()
            with jax.profiler.TraceAnnotation("compute"):
                jax.block_until_ready((self._state, metrics))
            return Split(fed - started, called - fed, time.perf_counter() - called)

    def release(self) -> TrainState:
        """The state, which whoever has it now may take over."""
        assert self._state is not None
        state, self._state = self._state, None
        return state


def _walked(
    alone: _OneAtATime, steps: int, chosen: range, trace_dir: Path | None, tell: Tell
) -> tuple[list[Split], Path | None]:
    """So many timed steps, and the trace of the chosen ones, wherever among the others they lie."""
    found: dict[int, Split] = {}
    last = WARM_UP + steps
    if not chosen or trace_dir is None:
        found.update(_taken(alone, range(1, last + 1)))
        return _timed(found, steps), None
    found.update(_taken(alone, range(1, chosen.start)))
    tell(f"tracing steps {chosen.start} to {chosen.stop - 1}")
    with traced(trace_dir) as trace:
        for _ in _taken(alone, chosen):
            pass
    missing = steps - len(_timed(found, steps))
    warm = max(0, WARM_UP + 1 - chosen.stop)
    found.update(_taken(alone, range(chosen.stop, chosen.stop + warm + missing)))
    return _timed(found, steps), trace.for_perfetto


def _taken(alone: _OneAtATime, numbers: Iterable[int]) -> Iterator[tuple[int, Split]]:
    for number in numbers:
        yield number, alone.take(number)


def _timed(found: dict[int, Split], steps: int) -> list[Split]:
    return [split for number, split in found.items() if number > WARM_UP][:steps]


def _in_training(trainee: Alone, dispatches: int) -> tuple[float, float]:
    """Seconds of a step, and steps of a dispatch, where each is dispatched before the last is done.

    The first ones, by which training finds out how many steps a dispatch shall have, do not count.
    """
    first = int(trainee.state.step)
    for _ in range(2):
        first += _wait(trainee.take(Asked(first, _MANY)))
    started, steps = time.perf_counter(), 0
    waiting: Dispatched | None = None
    for _ in range(dispatches):
        dispatched = trainee.take(Asked(first + steps, _MANY))
        steps += dispatched.steps
        if waiting is not None:
            waiting.wait()
        waiting = dispatched
    if waiting is not None:
        waiting.wait()
    return (time.perf_counter() - started) / steps, steps / dispatches


_MANY = 2**30  # steps before anything else is due


def _wait(dispatched: Dispatched) -> int:
    dispatched.wait()
    return dispatched.steps


def _check(chosen: range, total_steps: int) -> None:
    if chosen and chosen.stop - 1 > total_steps:
        raise UserError(
            f"there is no step {chosen.stop - 1} to trace: the run has {total_steps}; choose "
            "others with --trace=FIRST-LAST, lower --steps, or raise training.max_steps"
        )


@contextmanager
def _cache_disabled() -> Iterator[None]:
    before = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
