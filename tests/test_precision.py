"""float16's loss scale: its course, and a step that uses it or overflows under it."""

from functools import cache
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mainrun import config
from mainrun.training import divergence, precision
from mainrun.training import optimizer as optimizers
from mainrun.training import step as steps
from mainrun.training.noise import Noise
from mainrun.training.precision import LossScale
from mainrun.training.step import Metrics, TrainState, TrainStep
from tests.test_gpt import tiny
from tests.test_step import CONSTANT, some_batch

SMALL = config.LossScale(initial=8.0, growth_interval=3, min=2.0, max=16.0, limit_at_min=20)


def course(settings: config.LossScale, overflows: list[int], steps: int) -> list[LossScale]:
    """The loss scale after each step; those numbered overflow."""
    advance = jax.jit(lambda scale, finite: precision.next_scale(settings, scale, finite))
    found = [precision.initial(settings)]
    for number in range(steps):
        found.append(advance(found[-1], jnp.asarray(number not in overflows)))
    return found[1:]


def test_the_scale_takes_the_course_of_pytorchs_grad_scaler() -> None:
    """The trace that was recorded from another implementation with the same settings."""
    found = course(SMALL, overflows=[5, 8, 9, 10, 11], steps=15)
    recorded = [8, 8, 16, 16, 16, 8, 8, 8, 4, 2, 2, 2, 2, 2, 4]
    assert [float(s.scale) for s in found] == recorded
    assert int(found[-1].overflows) == 5
    # Twice it overflowed with the least scale, and a good step ends the count.
    assert [int(s.at_min) for s in found] == [0] * 10 + [1, 2, 0, 0, 0]


def test_the_scale_stays_within_its_bounds() -> None:
    never, always = course(SMALL, [], 20), course(SMALL, list(range(20)), 20)
    assert {float(s.scale) for s in never} == {8.0, 16.0}
    assert {float(s.scale) for s in always} == {4.0, 2.0}
    assert int(always[-1].at_min) == 18  # not those that brought it there
    assert int(never[-1].overflows) == 0
    narrow = config.LossScale(initial=3.0, min=2.9, max=3.1, growth_interval=1)
    found = [float(s.scale) for s in course(narrow, [1], 3)]
    np.testing.assert_allclose(found, [3.1, 2.9, 3.1], rtol=1e-6)


def test_growth_waits_for_good_steps_in_a_row() -> None:
    """Two good ones, an overflow, and so on: three in a row never come."""
    found = course(SMALL, list(range(2, 30, 3)), 30)
    assert all(b.scale <= a.scale for a, b in pairwise(found))


# ---------------------------------------------------------------------------------------------
# In a step


@cache
def made(precision: str) -> tuple[TrainStep, TrainState]:
    """A step, compiled; and a state that has taken a step, so that nothing in it is zero."""
    training = config.Training(
        precision=precision,
        loss_scale=config.LossScale(max=2.0**40),
        weight_average=config.Ema(decay=0.9),
    )
    network = tiny(dropout=0.0, precision=precision)
    # The trace of the first gradients is these themselves, and nothing clips them.
    optimizer = optimizers.optimizer(config.Sgd(momentum=0.9), CONSTANT, None)
    step = jax.jit(
        steps.make_train_step(
            network, optimizer, CONSTANT, training, micro_batches=2, mask_documents=False
        )
    )
    return step, jax.jit(lambda: steps.init(network, optimizer, jax.random.key(0), training))()


def gradient(state: TrainState) -> dict[str, np.ndarray]:
    """That of the first step: a trace begins with it."""
    return jax.tree.map(np.asarray, optax.tree.get(state.opt_state, "trace"))


def scaled(state: TrainState, scale: float) -> TrainState:
    return state._replace(loss_scale=state.loss_scale._replace(scale=jnp.float32(scale)))


def taken(precision: str, state: TrainState) -> tuple[TrainState, Metrics]:
    return made(precision)[0](state, some_batch())


@pytest.mark.slow
def test_gradients_of_float16_and_their_noise_are_those_of_float32(
    subtests: pytest.Subtests,
) -> None:
    for scale in [2.0**10, 2.0**15]:
        with subtests.test(scale=scale):
            ours, metrics = taken("float16", scaled(made("float16")[1], scale))
            theirs, expected = taken("float32", made("float32")[1])
            assert float(metrics.loss) == pytest.approx(float(expected.loss), abs=2e-3)
            assert float(metrics.grad_norm) == pytest.approx(float(expected.grad_norm), rel=5e-3)
            for mine, other in zip(ours.noise, theirs.noise, strict=True):
                assert float(mine) == pytest.approx(float(other), rel=1e-2)
            for name, array in gradient(theirs).items():
                # 11 bits of mantissa, in a dozen products one after the other.
                largest = np.abs(array).max()
                np.testing.assert_allclose(
                    gradient(ours)[name], array, atol=1e-2 * largest, err_msg=name
                )


def test_weights_moments_and_average_stay_float32() -> None:
    state, _ = taken("float16", made("float16")[1])
    for part in (state.params, gradient(state), state.average, state.loss_scale.scale):
        assert {a.dtype for a in jax.tree.leaves(part)} == {jnp.dtype("float32")}


def test_an_overflow_changes_no_bit_but_the_scale_and_the_count_of_steps(
    subtests: pytest.Subtests,
) -> None:
    for scale in [2.0**24, 2.0**36]:
        with subtests.test(scale=scale):
            before = scaled(taken("float16", made("float16")[1])[0], scale)
            before = before._replace(noise=Noise(jnp.float32(3.0), jnp.float32(2.0)))
            after, metrics = taken("float16", before)
            assert np.isfinite(metrics.loss)
            assert int(metrics.outcome) == divergence.OVERFLOWED
            overflows = before.loss_scale.overflows + 1
            expected = before._replace(
                step=before.step + 1,
                loss_scale=LossScale(jnp.float32(scale / 2), jnp.int32(0), overflows, jnp.int32(0)),
            )
            assert jax.tree.structure(after) == jax.tree.structure(expected)
            for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
                np.testing.assert_array_equal(a, b)
            assert after.params.keys() == after.average.keys() == gradient(after).keys()
            assert int(after.updates) == 1


def test_the_scale_is_found_by_backing_off_and_training_goes_on() -> None:
    state = scaled(made("float16")[1], 2.0**36)
    outcomes = []
    for _ in range(20):
        state, metrics = taken("float16", state)
        outcomes.append(int(metrics.outcome))
    skipped = outcomes.index(divergence.APPLIED)
    assert skipped > 3
    assert set(outcomes[:skipped]) == {divergence.OVERFLOWED}
    assert set(outcomes[skipped:]) == {divergence.APPLIED}
    assert float(state.loss_scale.scale) == 2.0 ** (36 - skipped)
    assert (int(state.updates), int(state.step)) == (20 - skipped, 20)
    assert int(optax.tree.get(state.opt_state, "count")) == 20 - skipped


def test_small_gradients_survive_scaled_and_vanish_without() -> None:
    """A tiny last norm makes those before it less than 3e-10; float16's least is 6e-8."""

    def small(state: TrainState) -> TrainState:
        name = "final_norm.scale"
        return state._replace(params=state.params | {name: 1e-8 * state.params[name]})

    exact = gradient(taken("float32", small(made("float32")[1]))[0])
    kept = gradient(taken("float16", scaled(small(made("float16")[1]), 2.0**20))[0])
    lost = gradient(taken("float16", scaled(small(made("float16")[1]), 1.0))[0])
    for name in (n for n in exact if n.startswith("blocks.") and n.endswith("kernel")):
        largest = np.abs(exact[name]).max()
        assert 0 < largest < 3e-10
        np.testing.assert_allclose(kept[name], exact[name], atol=0.05 * largest, err_msg=name)
        np.testing.assert_array_equal(lost[name], 0, err_msg=name)
