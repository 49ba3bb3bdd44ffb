"""What is trained, and the steps that it takes: one that has the device to itself.

A step is dispatched, and waited for later: whoever asks for its metrics gets them with the seconds
that the device spent on it. A population's trainees share theirs (`population.places`).
"""

import time
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax

from mainrun.data.batches import Batch
from mainrun.training.step import Metrics, TrainState, TrainStep


@runtime_checkable
class Trainee(Protocol):
    """What is trained. Whoever takes the steps changes its state, and so does going back."""

    @property
    def state(self) -> TrainState: ...

    @state.setter
    def state(self, state: TrainState) -> None: ...


class Measured(NamedTuple):
    """Of a step that is done: its metrics, on the host, and the seconds that it took."""

    metrics: Metrics
    seconds: float


Dispatched = Callable[[], Measured]
"""A step that the device works on; calling it waits for the end."""


class Alone:
    """A trainee that has the device to itself."""

    def __init__(
        self, state: TrainState, train_step: TrainStep, batch: Callable[[int], Batch]
    ) -> None:
        self.state = state
        self._train_step, self._batch, self._clock = train_step, batch, Clock()

    def take(self, index: int) -> Dispatched:
        """The step on the batch of this index."""
        started = time.perf_counter()
        self.state, metrics = self._train_step(self.state, self._batch(index))
        return lambda: Measured(jax.device_get(metrics), self._clock.seconds(started))


class Clock:
    """The seconds of steps that are dispatched before the ones ahead of them are done."""

    def __init__(self) -> None:
        self._free = 0.0  # when the device had done what was read last

    def seconds(self, started: float) -> float:
        """Of a step dispatched at `started` and done just now."""
        now = time.perf_counter()
        began, self._free = max(started, self._free), now
        return now - began
