"""Steps in one dispatch are, bit for bit, the same steps one by one."""

from functools import partial
from typing import Any

import jax
import numpy as np
import pytest

from mainrun import config
from mainrun.training.feed import Sent
from mainrun.training.stretch import stretch
from mainrun.training.trainee import Alone, Asked, Pace
from tests.test_step import make, some_batch

MOST = 5


def batch(index: int) -> Any:
    given = some_batch()
    return given._replace(inputs=np.roll(given.inputs, index, axis=0))


FEED = Sent(batch, MOST)


@pytest.fixture(scope="module")
def compiled() -> tuple[Any, Any]:
    step, state, _ = make(config.Training(precision="float32"), dropout=0.2, micro_batches=2)
    return jax.jit(stretch(step, FEED.batch_at, MOST)), state


def test_however_steps_are_cut_into_dispatches_the_bits_are_the_same(
    compiled: tuple[Any, Any], subtests: pytest.Subtests
) -> None:
    for cuts in [[5], [2, 3], [1, 1, 1, 1, 1]]:
        with subtests.test(cuts=cuts):
            run, state = compiled
            whole, metrics = run(state, FEED(0, 5), np.int32(5))
            losses, first = [], 0
            for steps in cuts:
                state, found = run(state, FEED(first, steps), np.int32(steps))
                losses += np.asarray(found.loss)[:steps].tolist()
                first += steps
            for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(whole), strict=True):
                np.testing.assert_array_equal(one, other)
            assert losses == np.asarray(metrics.loss).tolist()


def test_they_are_the_steps_of_the_plain_step(compiled: tuple[Any, Any]) -> None:
    run, state = compiled
    step, _, _ = make(config.Training(precision="float32"), dropout=0.2, micro_batches=2)
    after, metrics = run(state, FEED(0, 3), np.int32(3))
    for index in range(3):
        state, found = step(state, batch(index))
        assert float(metrics.loss[index]) == pytest.approx(float(found.loss), rel=1e-6)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_step_is_traced_once() -> None:
    """Tracing is most of a start that finds its program compiled: 2.6 s for the baseline when each
    of the two loops traced what is in it once for its shapes and once more to run, 0.7 s now."""
    step, state, _ = make(config.Training(precision="float32"), dropout=0.2, micro_batches=2)
    traced = []

    def counted(state: Any, batch: Any) -> Any:
        traced.append(batch)
        return step(state, batch)

    jax.jit(stretch(counted, FEED.batch_at, MOST)).trace(state, FEED(0, 1), np.int32(1))
    assert len(traced) == 1


def test_a_trainee_takes_no_more_than_it_is_asked_and_than_go_into_a_dispatch(
    compiled: tuple[Any, Any],
) -> None:
    run, state = compiled
    trainee = Alone(state, run, FEED)
    taken, index = [], 0
    for most in (1000, 1000, 1000, 1, 2):
        dispatched = trainee.take(Asked(index, most))
        found = dispatched.wait()
        assert len(found.metrics) == dispatched.steps <= min(most, MOST)
        index += dispatched.steps
        taken.append(dispatched.steps)
    assert taken[0] == 1  # nobody knows yet how long one takes
    assert int(trainee.state.step) == index


def test_short_steps_go_many_to_a_dispatch_and_long_ones_alone(subtests: pytest.Subtests) -> None:
    for seconds, expected in [(1e-9, 8), (0.1, 2), (0.05, 5), (9.0, 1)]:
        with subtests.test(seconds=seconds):
            pace = Pace(8)
            assert pace.steps == 1
            pace.observe(seconds)
            assert pace.steps == expected


@pytest.mark.slow
def test_the_second_dispatch_compiles_nothing(compiled: tuple[Any, Any]) -> None:
    run, state = compiled
    counted = jax.jit(partial(run))
    for steps in (1, MOST):
        counted(state, FEED(0, steps), np.int32(steps))
    assert counted._cache_size() == 1
