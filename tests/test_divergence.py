"""Steps that are not to be trusted: told from the others, and changing nothing."""

import itertools
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.training import divergence
from mainrun.training.divergence import APPLIED, NOT_FINITE, OVERFLOWED, SPIKED, Guard
from mainrun.training.step import TrainState
from tests.test_step import make, some_batch

WINDOW, DEVIATIONS = 20, 3.0
SETTINGS = config.Divergence(spike_deviations=DEVIATIONS, spike_window=WINDOW)


@partial(jax.jit, static_argnums=(0, 4))
def watch(
    settings: config.Divergence, guard: Guard, loss: float, norm: float, scales_loss: bool = False
) -> tuple[Guard, jax.Array]:
    outcome = divergence.outcome(settings, guard, loss, norm, scales_loss=scales_loss)
    return divergence.observed(settings, guard, loss, outcome), outcome


def watched(losses: list[float], settings: config.Divergence = SETTINGS) -> tuple[Guard, list[int]]:
    guard, outcomes = divergence.initial(), []
    for loss in losses:
        guard, outcome = watch(settings, guard, jnp.float32(loss), jnp.float32(1.0))
        outcomes.append(int(outcome))
    return guard, outcomes


def test_what_is_no_number_is_told_from_what_is(subtests: pytest.Subtests) -> None:
    """Under a loss scale a gradient that is none has overflowed; a loss never does."""
    cases = [
        (2.0, 1.0, APPLIED),
        (math.nan, 1.0, NOT_FINITE),
        (math.inf, 1.0, NOT_FINITE),
        (-math.inf, 1.0, NOT_FINITE),
        (math.nan, math.nan, NOT_FINITE),
        (2.0, math.nan, "gradient"),
        (2.0, math.inf, "gradient"),
    ]
    for scales_loss, (loss, norm, expected) in itertools.product([False, True], cases):
        with subtests.test(scales_loss=scales_loss, loss=loss, norm=norm):
            if expected == "gradient":
                expected = OVERFLOWED if scales_loss else NOT_FINITE
            guard = divergence.initial()
            outcome = watch(SETTINGS, guard, jnp.float32(loss), jnp.float32(norm), scales_loss)[1]
            assert int(outcome) == expected


def spikes(losses: list[float]) -> tuple[list[bool], float, float]:
    """Which losses are, and mean and deviation after them, from the weight of every loss.

    A loss weighs a share of all at first, later a window's share; those before it the rest.
    """
    known, weights = np.zeros(0), np.zeros(0)
    mean = deviation = 0.0
    found = []
    for loss in losses:
        is_spike = len(known) >= WINDOW and loss > mean + DEVIATIONS * deviation
        found.append(bool(is_spike))
        if not is_spike:
            share = max(1 / (len(known) + 1), 1 / WINDOW)
            known, weights = np.append(known, loss), np.append((1 - share) * weights, share)
            mean = (weights * known).sum()
            deviation = math.sqrt((weights * (known - mean) ** 2).sum())
    return found, mean, deviation


def test_spikes_are_those_far_above_the_running_mean() -> None:
    draw = np.random.default_rng(0)
    losses = 2 + 2 * 0.99 ** np.arange(300) + 0.1 * draw.normal(size=300)
    losses += np.where(draw.random(300) < 0.05, 3 * draw.random(300), 0)
    guard, outcomes = watched(losses.tolist())
    expected, mean, deviation = spikes(losses.astype(np.float32).tolist())
    assert outcomes == [SPIKED if spike else APPLIED for spike in expected]
    assert 5 < sum(expected) < 30
    assert int(guard.num_losses) == 300 - sum(expected)
    # float32 sums of hundreds of numbers
    assert float(guard.mean) == pytest.approx(mean, rel=1e-5)
    assert math.sqrt(guard.square) == pytest.approx(deviation, rel=1e-4)


def test_until_a_window_is_known_mean_and_deviation_are_the_plain_ones_and_nothing_spikes() -> None:
    losses = [1.0, 2.0, 1.5, 900.0, 3.0, 2.5]
    guard, outcomes = watched(losses)
    assert outcomes == [APPLIED] * 6
    assert float(guard.mean) == pytest.approx(np.mean(losses), rel=1e-6)
    assert math.sqrt(guard.square) == pytest.approx(np.std(losses), rel=1e-6)


def test_a_window_of_losses_is_enough_to_know_a_spike_and_one_less_is_not() -> None:
    losses = [2.0, 2.1] * (WINDOW // 2)
    assert watched([*losses, 9.0])[1][-1] == SPIKED
    assert watched([*losses[1:], 9.0])[1][-1] == APPLIED


def test_a_fall_is_no_spike_and_without_the_setting_nothing_is() -> None:
    losses = [2.0, 2.1] * WINDOW
    assert watched([*losses, 9.0])[1][-1] == SPIKED
    assert watched([*losses, -5.0])[1][-1] == APPLIED
    assert watched([*losses, 9.0], config.Divergence())[1][-1] == APPLIED


def test_a_loss_that_is_skipped_is_not_what_losses_are_measured_by(
    subtests: pytest.Subtests,
) -> None:
    for loss, norm, outcome in [
        (9.0, 1.0, SPIKED),
        (math.nan, 1.0, NOT_FINITE),
        (2.0, math.inf, OVERFLOWED),
    ]:
        with subtests.test(loss=loss, norm=norm, outcome=outcome):
            before, _ = watched([2.0, 2.1] * WINDOW)
            after, found = watch(SETTINGS, before, jnp.float32(loss), jnp.float32(norm), True)
            assert int(found) == outcome
            for name in ("num_losses", "mean", "square", "returns"):
                np.testing.assert_array_equal(
                    getattr(after, name), getattr(before, name), err_msg=name
                )


def test_steps_in_a_row_are_counted_from_the_last_good_one() -> None:
    """An overflow is neither: it says nothing of the loss."""
    guard, counts = divergence.initial(), []
    overflow = math.inf
    for loss, norm in [
        (math.nan, 1), (2, 1), (math.nan, 1), (2, overflow), (math.inf, 1), (2, overflow), (2, 1),
        (2, overflow), (math.nan, 1),
    ]:  # fmt: skip
        guard, _ = watch(SETTINGS, guard, jnp.float32(loss), jnp.float32(norm), True)
        counts.append(int(guard.in_a_row))
    assert counts == [1, 0, 1, 1, 2, 2, 0, 0, 1]


# ---------------------------------------------------------------------------------------------
# In a step


@cache
def trained() -> tuple:
    """A step, and a state after two good ones, of which the loss has to fall on."""
    settings = config.Divergence(spike_deviations=0.5, spike_window=2)
    training = config.Training(divergence=settings, weight_average=config.Ema(decay=0.9))
    step, state, _ = make(training, dropout=0.0, micro_batches=2)
    for _ in range(3):
        state, metrics = step(state, some_batch())
        assert int(metrics.outcome) == APPLIED
    return step, state


def unchanged(before: TrainState, after: TrainState) -> None:
    """All but the count of steps, and of bad ones."""
    guard = before.guard._replace(in_a_row=before.guard.in_a_row + 1)
    expected = before._replace(step=before.step + 1, guard=guard)
    assert jax.tree.structure(after) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_step_that_is_no_number_changes_no_bit_but_its_count() -> None:
    step, state = trained()
    batch = some_batch()
    batch.weights[0, 0] = math.nan
    after, metrics = step(state, batch)
    assert int(metrics.outcome) == NOT_FINITE
    assert int(metrics.in_a_row) == 1
    unchanged(state, after)


def test_a_spike_changes_no_bit_but_its_count_and_training_goes_on() -> None:
    step, state = trained()
    after, metrics = step(state, some_batch(seed=1))  # other tokens, as hard as at the beginning
    assert int(metrics.outcome) == SPIKED
    unchanged(state, after)
    further, metrics = step(after, some_batch())
    assert int(metrics.outcome) == APPLIED
    assert int(metrics.in_a_row) == 0
    assert int(further.updates) == 4
    assert int(further.step) == 5
