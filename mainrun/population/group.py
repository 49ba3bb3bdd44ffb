"""Runs of one structure on their way, each to its own end, with one step for all of them.

Every run is as it would be alone: its folder, record, checkpoints, evaluations, and the order in
which they happen. Only its steps are taken together with the others'. Whoever uses a group admits
runs to free places and lets all of them advance until some have ended.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from mainrun import memory, parts
from mainrun.compilation import Compilation
from mainrun.config import Config, structure
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.live_run import LiveRun, Stopping, Watch
from mainrun.model import kernels
from mainrun.opening import Prepared, opened
from mainrun.origin import Base
from mainrun.parts import Parts
from mainrun.population.choice import Choice, choose
from mainrun.population.hyper import Hyper, hyper, hyper_stretch
from mainrun.population.places import Places, PopulationStep, compile_for
from mainrun.training import backend, step
from mainrun.training.feed import Sent
from mainrun.training.loop import Course
from mainrun.training.step import TrainState
from mainrun.training.trainee import Asked, Pace

_MEASURED_STEPS = 6
_MOST_STEPS = 8  # of a dispatch: the batches of all places are sent with it


@dataclass(eq=False)
class Running:
    """A run in its place, until it has ended: well, or with an error."""

    place: int
    run: LiveRun
    feed: Sent
    course: Course
    open: contextlib.ExitStack
    asked: Asked = field(default_factory=lambda: Asked(0, 1))
    has_ended: bool = False
    error: BaseException | None = None


class Trainee:
    """What a run trains, as it stands in its place."""

    def __init__(self, places: Places, place: int) -> None:
        self._places, self._place = places, place

    @property
    def state(self) -> TrainState:
        return self._places.state(self._place)

    @state.setter
    def state(self, state: TrainState) -> None:
        self._places.set_state(self._place, state)


class Group:
    """Runs with the structure of the first, which differ in the settings of these paths."""

    def __init__(self, first: Prepared, paths: frozenset[str], wanted: Choice) -> None:
        """Compiles the step. Raises UserError where it does not fit the device."""
        first = replace(first, joined=_for_members(first, paths))
        self._first, self._paths = first, paths
        self._structure = structure(first.config, paths)
        config, joined = first.config, first.joined
        self._updates = _room(joined.plan.total_steps)
        self._feed, self._pace = self._feed_of(first), Pace(_MOST_STEPS)
        self._run = hyper_stretch(config, joined, paths, self._feed)
        self._initial = jax.jit(self._make_state, donate_argnums=1)
        self._running: dict[int, Running] = {}
        self._shapes = jax.eval_shape(
            self._make_state, jax.random.key(0), first.base.params if first.base else None
        )
        vocab_size, limit = joined.network.vocab_size, backend.memory_limit_bytes()
        estimate = memory.estimate(config, vocab_size, joined.micro_batches, self._shapes)
        memory.check_possible(estimate, limit, config, vocab_size)
        chosen = choose(wanted, self._compile, self._seconds)
        _check_fits(chosen, limit, config, vocab_size)
        self._places = Places(chosen, self._pace)
        self._compilation = Compilation(chosen.seconds, chosen.step_bytes, estimate)

    def __len__(self) -> int:
        """How many are running."""
        return len(self._running)

    @property
    def places(self) -> int:
        return len(self._places)

    def fits(self, prepared: Prepared) -> bool:
        """Whether the run can share this step."""
        ours, theirs = self._first, prepared
        return (
            structure(theirs.config, self._paths) == self._structure
            and ours.joined.network.vocab_size == theirs.joined.network.vocab_size
            and ours.joined.samples == theirs.joined.samples
            and theirs.joined.plan.total_steps <= self._updates
        )

    def admit(self, prepared: Prepared, stopping: Stopping, watch: Watch, label: str) -> Running:
        """The run in a free place; it may have ended already.

        Raises UserError or RunFailed where it cannot begin.
        """
        place = next(p for p in range(self.places) if p not in self._running)
        shared = replace(prepared.joined, network=self._first.joined.network)
        prepared = replace(prepared, joined=shared)
        stack = contextlib.ExitStack()
        run, state, progress = stack.enter_context(
            opened(
                prepared, self._compilation, stopping,
                initial=self._initial_state, watch=watch, label=label,
            )
        )  # fmt: skip
        self._compilation = replace(
            self._compilation, seconds=0.0
        )  # the first run has waited for it
        given = hyper(prepared.config, prepared.joined, self._paths, self._updates)
        self._places.fill(place, given, state)
        del state
        course = run.course(Trainee(self._places, place), progress)
        feed = self._feed_of(prepared)
        running = self._running[place] = Running(place, run, feed, course, stack)
        try:
            self._go_on(running, lambda: next(course))
        except Exception as error:  # XLA's, of the first evaluation
            self._leave(running, error)
        return running

    def advance(self) -> None:
        """Steps of every run, until one of them has something else to do; some may have ended.

        Raises what XLA raises: then the others are lost, and wait to be closed.
        """
        steps = min(self._pace.steps, *(r.asked.most for r in self._running.values()))
        feeds = {p: r.feed(r.asked.first, steps) for p, r in self._running.items()}
        dispatched = self._places.take(feeds, steps)
        for place, running in list(self._running.items()):
            self._go_on(running, partial(running.course.send, dispatched[place]))

    def close(self, error: BaseException) -> list[Running]:
        """Ends all that run with this error; who they were."""
        all_of_them = list(self._running.values())
        for running in all_of_them:
            self._leave(running, error)
        return all_of_them

    def _go_on(self, running: Running, to_next_step: Callable[[], Asked]) -> None:
        try:
            running.asked = to_next_step()
        except StopIteration:
            self._leave(running, None)
        except (RunFailed, UserError, Stopped) as error:
            self._leave(running, error)

    def _leave(self, running: Running, error: BaseException | None) -> None:
        """The place is free, and the run's record says how it has ended."""
        del self._running[running.place]
        if not self._running:
            self._places.clear()
        running.has_ended, running.error = True, error
        running.course.close()
        try:
            if error is None:
                running.open.close()
            else:
                running.open.__exit__(type(error), error, error.__traceback__)
        except (RunFailed, UserError, Stopped) as later:
            running.error = later

    def _make_state(self, key: jax.Array, base: "dict[str, jax.Array] | None") -> TrainState:
        joined, training = self._first.joined, self._first.config.training
        return step.init(joined.network, joined.optimizer, key, training, base)

    def _initial_state(self, config: Config, _: Parts, base: Base | None) -> TrainState:
        return self._initial(jax.random.key(config.seed), base.params if base else None)

    def _compile(self, places: int) -> PopulationStep:
        return compile_for(self._run, places, self._example(), self._shapes, self._feed(0, 1))

    def _seconds(self, compiled: PopulationStep) -> float:
        """What a step takes for each run, measured on states that nobody needs."""
        places, example = Places(compiled, Pace(1)), self._example()
        for place in range(compiled.places):
            state = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), self._shapes)
            places.fill(place, example, state)
        feeds = dict.fromkeys(range(compiled.places), self._feed(0, 1))
        taken = [places.take(feeds, 1)[0].wait().seconds for _ in range(_MEASURED_STEPS)]
        return min(taken[1:]) / compiled.places  # the first one warms up

    def _example(self) -> Hyper:
        return hyper(self._first.config, self._first.joined, self._paths, self._updates)

    def _feed_of(self, prepared: Prepared) -> Sent:
        """Members may differ in their texts, so what they read is sent."""
        return Sent(partial(parts.batch, prepared.config, prepared.texts), _MOST_STEPS)


def _check_fits(chosen: PopulationStep, limit: int | None, config: Config, vocab_size: int) -> None:
    """Raises UserError for steps, of one run or of several at once, that do not fit the device."""
    if chosen.places > 1 and not memory.fits(chosen.step_bytes, limit):
        assert limit is not None
        raise UserError(
            f"a step of {chosen.places} runs side by side needs "
            f"{memory.gibibytes(chosen.step_bytes)}, the device has {memory.gibibytes(limit)}: "
            f"--population {chosen.places // 2} or fewer"
        )
    memory.check_fits(chosen.step_bytes, limit, config, vocab_size)


def _for_members(first: Prepared, paths: frozenset[str]) -> Parts:
    """Its parts, with the attention that members side by side can have."""
    config, network = first.config, first.joined.network
    kernel = kernels.for_members(
        network.kernel,
        masks_documents=config.data.mask_documents,
        own_dropout="model.dropout" in paths and config.model.attention_dropout is None,
    )
    return replace(first.joined, network=network.with_kernel(kernel))


def _room(steps: int) -> int:
    """For so many learning rates and more, that longer runs may share the step."""
    return 1 << steps.bit_length()
