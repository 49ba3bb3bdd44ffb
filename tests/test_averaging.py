"""Averages of the weights against sums over all that there were."""

import math
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config, parts
from mainrun.training import averaging
from mainrun.training.averaging import EVERY_UPDATE, Samples
from tests.test_step import make, some_batch


def averages(
    settings: config.WeightAverage, course: np.ndarray, samples: Samples = EVERY_UPDATE
) -> list[np.ndarray]:
    """After each of the parameters of a course."""
    advance = jax.jit(partial(averaging.averaged, settings, samples=samples))
    average = averaging.initial(settings, {"a": jnp.asarray(course[0]) + 7})  # never to be seen
    found = []
    for update, params in enumerate(course, start=1):
        average = advance(average, {"a": params}, jnp.int32(update))
        found.append(np.asarray(average["a"]))
    return found


def some_course(length: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(length, 5)).astype(np.float32)


def moving(course: np.ndarray, decay: float) -> np.ndarray:
    """The exponentially weighted mean of all parameters of a course."""
    weights = decay ** np.arange(len(course), dtype=np.float64)[::-1]
    return np.tensordot(weights, course.astype(np.float64), 1) / weights.sum()


def sampled(course: np.ndarray, samples: Samples) -> np.ndarray:
    """The mean of the samples of a course; its last parameters where there is none."""
    taken = course[samples.start - 1 :: samples.every].astype(np.float64)
    return taken.mean(0) if len(taken) else course[-1]


def test_the_moving_average_forgets_exponentially_and_begins_without_bias(
    subtests: pytest.Subtests,
) -> None:
    for decay in [0.5, 0.99, 0.99999]:
        with subtests.test(decay=decay):
            course = some_course(60)
            for length, found in enumerate(averages(config.Ema(decay=decay), course), start=1):
                # 60 roundings to float32 of numbers up to 3
                np.testing.assert_allclose(found, moving(course[:length], decay), atol=3e-6)


def test_the_average_of_samples_is_their_plain_mean(subtests: pytest.Subtests) -> None:
    for samples in [Samples(1, 1), Samples(3, 4), Samples(12, 1), Samples(20, 9)]:
        with subtests.test(samples=samples):
            course = some_course(25)
            for length, found in enumerate(averages(config.Swa(), course, samples), start=1):
                np.testing.assert_allclose(found, sampled(course[:length], samples), atol=2e-6)


def test_without_an_average_none_is_kept() -> None:
    assert averaging.initial(None, {"a": jnp.ones(3)}) == {}
    assert averaging.averaged(None, {}, {"a": jnp.ones(3)}, jnp.int32(1)) == {}


def test_samples_are_where_the_settings_say_and_at_least_one(
    corpus: Path, tiny: list[str], subtests: pytest.Subtests
) -> None:
    cases = [
        ("{fraction: 0.75}", "{fraction: 0.05}", Samples(30, 2)),
        ("{steps: 0}", "{fraction: 0}", Samples(1, 1)),
        ("{fraction: 1}", "{steps: 7}", Samples(40, 7)),
        ("{steps: 1000}", "{steps: 7}", Samples(40, 7)),  # the last, so that there is one
    ]
    for start, every, expected in cases:
        with subtests.test(start=start, every=every):
            average = f"training.weight_average={{kind: swa, start: {start}, every: {every}}}"
            settings = config.load(None, [*tiny, average])
            assert parts.assemble(settings, parts.read_texts(settings)).samples == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "samples"),
    [
        pytest.param(config.Ema(decay=0.7), EVERY_UPDATE, id="ema"),
        pytest.param(config.Swa(), Samples(2, 2), id="swa"),
    ],
)
def test_a_step_averages_its_parameters_and_a_skipped_one_leaves_the_average(
    settings: config.WeightAverage, samples: Samples
) -> None:
    training = config.Training(weight_average=settings)
    step, state, _ = make(training, dropout=0.0, samples=samples)
    course: list[dict[str, jax.Array]] = []
    for number in range(8):
        batch, before = some_batch(number), state.average
        if number in (2, 5):
            batch.weights[0, 0] = math.nan
        state, _ = step(state, batch)
        if number in (2, 5):
            for name, array in before.items():
                np.testing.assert_array_equal(state.average[name], array, err_msg=name)
            continue
        course.append(state.params)
        for name, array in state.average.items():
            along = np.stack([params[name] for params in course])
            is_ema = isinstance(settings, config.Ema)
            expected = moving(along, 0.7) if is_ema else sampled(along, samples)
            np.testing.assert_allclose(array, expected, atol=1e-6, err_msg=name)
    assert len(course) == 6
    apart = [np.abs(state.average[n] - state.params[n]).max() for n in state.params]
    assert max(apart) > 1e-3
    assert state.all_averaged == state.average
