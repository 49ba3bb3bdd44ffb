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
from mainrun.training.trainee import Clock, Dispatched, Measured


class PopulationStep(NamedTuple):
    """A step for so many runs at once, compiled."""

    places: int
    run: Any  # hypers, states, batches to states and metrics
    seconds: float  # that compiling took
    step_bytes: int


def compile_for(
    step: Callable[[Any, Any, Any], tuple[Any, Any]],
    places: int,
    hyper: Any,
    state: Any,
    batch: Any,
) -> PopulationStep:
    """The step for so many runs; the arguments are one run's, or their shapes."""
    started = time.perf_counter()
    arguments = jax.tree.map(_abstract, (hyper, state, batch))
    if places > 1:
        step = jax.vmap(step)
        arguments = jax.tree.map(partial(_stacked_shape, places), arguments)
    executable = jax.jit(step, donate_argnums=1).lower(*arguments).compile()
    return PopulationStep(
        places, executable, time.perf_counter() - started, memory.executable_bytes(executable)
    )


class Places:
    def __init__(self, step: PopulationStep) -> None:
        self._step, self._clock = step, Clock()
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

    def take(self, batches: Mapping[int, Any]) -> dict[int, Dispatched]:
        """One step of every place for which there is a batch."""
        assert self._held is not None
        started = time.perf_counter()
        hypers, states = self._held
        some = next(iter(batches.values()))
        rows = [batches.get(place, some) for place in range(len(self))]
        batch = some if len(self) == 1 else jax.tree.map(lambda *parts: np.stack(parts), *rows)
        states, metrics = self._step.run(hypers, states, batch)
        self._held = hypers, states

        @cache
        def measured() -> Measured:
            found = jax.device_get(metrics)
            return Measured(found, self._clock.seconds(started))

        def of(place: int) -> Measured:
            all_of_them = measured()
            if len(self) == 1:
                return all_of_them
            own = jax.tree.map(lambda leaf: leaf[place], all_of_them.metrics)
            return all_of_them._replace(metrics=own)

        return {place: partial(of, place) for place in batches}


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
