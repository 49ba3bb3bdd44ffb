"""States side by side on the device, each in its place, and the step that moves them all on.

A place is taken, left and taken again by another run while the others go on; places that are empty
are computed like the others, and nobody looks. A single place holds its state as it is. What states
and hyper-parameters are is not known here: trees of arrays.
"""

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Int

from mainrun import memory
from mainrun.training.trainee import Clock, Dispatched, Measured, Pace, each


class PopulationStep(NamedTuple):
    """Steps for so many runs at once, compiled."""

    places: int
    run: Any  # hypers, states, feeds, number of steps to states and metrics
    seconds: float  # that compiling took
    step_bytes: int


def compile_for(
    run: Callable[[Any, Any, Any, Any], tuple[Any, Any]],
    places: int,
    hyper: Any,
    state: Any,
    feed: Any,
) -> PopulationStep:
    """The steps of so many runs; the arguments are one run's, or their shapes.

    `run` takes a number of steps besides, which is the same for all.
    """
    started = time.perf_counter()
    arguments = jax.tree.map(_abstract, (hyper, state, feed))
    if places > 1:
        run = jax.vmap(run, in_axes=(0, 0, 0, None))
        arguments = jax.tree.map(partial(_stacked_shape, places), arguments)
    executable = jax.jit(run, donate_argnums=1).lower(*arguments, np.int32(1)).compile()
    return PopulationStep(
        places, executable, time.perf_counter() - started, memory.executable_bytes(executable)
    )


class Places:
    def __init__(self, step: PopulationStep, pace: Pace) -> None:
        self._step, self._clock, self._pace = step, Clock(), pace
        self._held: tuple[Any, Any] | None = None  # hypers and states

    def __len__(self) -> int:
        return self._step.places

    def fill(self, place: int, hyper: Any, state: Any) -> None:
        if len(self) == 1:
            self._held = hyper, state
        elif self._held is None:
            self._held = jax.tree.map(partial(_repeated, len(self)), (hyper, state))
        else:
            self._held = _put(self._held, place, (hyper, state))

    def clear(self) -> None:
        """Nobody is here: the memory is free."""
        self._held = None

    def state(self, place: int) -> Any:
        """The place's state; it stays there."""
        assert self._held is not None
        states = self._held[1]
        return states if len(self) == 1 else _taken(states, place)

    def set_state(self, place: int, state: Any) -> None:
        assert self._held is not None
        hypers, states = self._held
        self._held = hypers, state if len(self) == 1 else _put(states, place, state)

    def take(self, feeds: Mapping[int, Any], steps: int) -> dict[int, Dispatched]:
        """So many steps of every place for which there is a feed."""
        assert self._held is not None
        started = time.perf_counter()
        hypers, states = self._held
        some = next(iter(feeds.values()))
        rows = [feeds.get(place, some) for place in range(len(self))]
        feed = some if len(self) == 1 else jax.tree.map(lambda *parts: np.stack(parts), *rows)
        states, metrics = self._step.run(hypers, states, feed, np.int32(steps))
        self._held = hypers, states

        @cache
        def measured() -> tuple[Any, float]:
            found, seconds = jax.device_get(metrics), self._clock.seconds(started)
            self._pace.observe(seconds / steps)
            return found, seconds

        def of(place: int) -> Measured:
            found, seconds = measured()
            if len(self) > 1:
                found = jax.tree.map(lambda leaf: leaf[place], found)
            return Measured(each(found, steps), seconds)

        return {place: Dispatched(steps, partial(of, place)) for place in feeds}


@partial(jax.jit, donate_argnums=0)
def _put(stacked: Any, place: Int[Array, ""], one: Any) -> Any:
    return jax.tree.map(lambda many, new: many.at[place].set(new), stacked, one)


@jax.jit
def _taken(stacked: Any, place: Int[Array, ""]) -> Any:
    return jax.tree.map(lambda many: many[place], stacked)


def _repeated(times: int, leaf: Any) -> jax.Array:
    return jax.numpy.repeat(jax.numpy.asarray(leaf)[None], times, axis=0)


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)


def _stacked_shape(times: int, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((times, *leaf.shape), leaf.dtype)
