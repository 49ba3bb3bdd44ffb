"""What is trained, and the steps that it takes: one that has the device to itself.

Steps are dispatched, a few at a time where they are short, and waited for later: whoever asks for
their metrics gets them with the seconds that the device spent on them. A population's trainees
share theirs (`population.places`).
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from mainrun.training.cluster import Vote
from mainrun.training.feed import Feed
from mainrun.training.step import Metrics, TrainState
from mainrun.training.stretch import Run

MOST_STEPS = 32
"""Of one dispatch. The host's share of a small step fell from 1.2 to 0.65 ms with 8 and to 0.6 with
32 (SPEED 3.4)."""

_DISPATCH_SECONDS = 0.25
"""Of the device's time that a dispatch should take: a stop waits for two of them."""


@runtime_checkable
class Trainee(Protocol):
    """What is trained. Whoever takes the steps changes its state, and so does going back."""

    @property
    def state(self) -> TrainState: ...

    @state.setter
    def state(self, state: TrainState) -> None: ...


class Asked(NamedTuple):
    """Steps that may be taken before anything else is due."""

    first: int  # of them: the number of its batch
    most: int


class Measured(NamedTuple):
    """Of steps that are done: the metrics of each, on the host, and the seconds of all."""

    metrics: list[Metrics]
    seconds: float


class Dispatched(NamedTuple):
    """Steps that the device works on."""

    steps: int
    wait: Callable[[], Measured]


class Alone:
    """A trainee that has the device to itself."""

    def __init__(self, state: TrainState, run: Run, feed: Feed) -> None:
        self.state = state
        self._run, self._feed = run, feed
        self._clock, self._pace = Clock(), Pace(feed.most)
        self._agree = Vote(self._pace.steps)

    def take(self, asked: Asked) -> Dispatched:
        """As many of the steps as go into one dispatch."""
        steps = min(asked.most, self._agree(self._pace.steps))
        given = self._feed(asked.first, steps)
        started = time.perf_counter()
        self.state, metrics = self._run(self.state, given, np.int32(steps))
        for leaf in jax.tree.leaves(metrics):
            leaf.copy_to_host_async()

        def wait() -> Measured:
            found = each(jax.device_get(metrics), steps)
            seconds = self._clock.seconds(started)
            self._pace.observe(seconds / steps)
            return Measured(found, seconds)

        return Dispatched(steps, wait)


class Pace:
    """How many steps to dispatch at once, after how long they took. No result depends on it."""

    def __init__(self, most: int) -> None:
        self.steps = 1
        self._most = most

    def observe(self, seconds_per_step: float) -> None:
        self.steps = max(1, min(self._most, int(_DISPATCH_SECONDS / max(seconds_per_step, 1e-6))))


class Clock:
    """The seconds of steps that are dispatched before the ones ahead of them are done."""

    def __init__(self) -> None:
        self._free = 0.0  # when the device had done what was read last

    def seconds(self, started: float) -> float:
        """Of steps dispatched at `started` and done just now."""
        now = time.perf_counter()
        began, self._free = max(started, self._free), now
        return now - began


def each(metrics: Any, steps: int) -> list[Any]:
    """Those of one step after the other, from rows."""
    return [jax.tree.map(lambda rows, n=n: rows[n], metrics) for n in range(steps)]
