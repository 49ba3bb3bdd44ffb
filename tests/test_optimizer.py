"""Schedules against closed forms, optimizers against NumPy."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.errors import UserError
from mainrun.training import optimizer as optimizers


def rates(settings: config.Schedule, total: int = 20) -> list[float]:
    schedule = optimizers.schedule(settings, 2.0, total_steps=total, steps_per_epoch=5)
    return [float(schedule(step)) for step in range(total)]


def duration(steps: int) -> config.Duration:
    return config.Duration(steps=steps)


def test_cosine_without_warmup_is_the_original_assessments() -> None:
    expected = [1.0 + math.cos(math.pi * step / 20) for step in range(20)]
    assert rates(config.Cosine(warmup=duration(0))) == pytest.approx(expected, rel=1e-5)


def test_warmup_rises_evenly_from_above_zero_to_the_peak() -> None:
    for settings in (config.Cosine, config.Linear, config.Constant):
        found = rates(settings(warmup=duration(4)))
        assert found[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0])


def test_linear_and_cosine_end_at_the_final_fraction_and_constant_stays() -> None:
    linear = rates(config.Linear(warmup=duration(0), final_fraction=0.5))
    assert linear == pytest.approx([2 - step / 20 for step in range(20)])
    cosine = optimizers.schedule(
        config.Cosine(warmup=duration(0), final_fraction=0.25),
        2.0,
        total_steps=20,
        steps_per_epoch=5,
    )
    assert float(cosine(20)) == pytest.approx(0.5)
    assert rates(config.Constant()) == [2.0] * 20


def test_warmup_longer_than_the_run_is_an_error() -> None:
    with pytest.raises(UserError, match=r"schedule\.warmup is 21 steps"):
        rates(config.Cosine(warmup=duration(21)))


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([1.0, -1.0])}
GRADIENTS = [
    {"kernel": jnp.array([[0.3, 0.1], [-0.2, 0.5]]) * k, "bias": jnp.array([0.7, -0.4]) * k}
    for k in (1.0, -2.0, 0.5)
]


def updated(settings: config.Optimizer, clip: float | None = None) -> dict[str, np.ndarray]:
    optimizer = optimizers.optimizer(settings, lambda _: jnp.asarray(0.1), clip)
    params, state = PARAMS, optimizer.init(PARAMS)
    for gradient in GRADIENTS:
        updates, state = optimizer.update(gradient, state, params)
        params = {name: params[name] + updates[name] for name in params}
    return {name: np.asarray(array) for name, array in params.items()}


def clipped(gradient: dict, clip: float | None) -> dict[str, np.ndarray]:
    norm = math.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in gradient.values()))
    scale = 1.0 if clip is None else min(1.0, clip / norm)
    return {name: np.asarray(g, np.float64) * scale for name, g in gradient.items()}


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("decay_on", ["matrices", "all"])
def test_sgd_is_momentum_with_coupled_decay(clip: float | None, decay_on: str) -> None:
    settings = config.Sgd(momentum=0.9, weight_decay=0.2, decay_on=decay_on)
    for name, found in updated(settings, clip).items():
        p, velocity = np.asarray(PARAMS[name], np.float64), 0.0
        decay = 0.2 if name == "kernel" or decay_on == "all" else 0.0
        for gradient in GRADIENTS:
            velocity = 0.9 * velocity + clipped(gradient, clip)[name] + decay * p
            p = p - 0.1 * velocity
        np.testing.assert_allclose(found, p, rtol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.6])
@pytest.mark.parametrize("decay_on", ["matrices", "all"])
def test_adamw_is_its_paper(clip: float | None, decay_on: str) -> None:
    settings = config.AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, decay_on=decay_on)
    for name, found in updated(settings, clip).items():
        p, mu, nu = np.asarray(PARAMS[name], np.float64), 0.0, 0.0
        decay = 0.2 if name == "kernel" or decay_on == "all" else 0.0
        for t, gradient in enumerate(GRADIENTS, start=1):
            g = clipped(gradient, clip)[name]
            mu, nu = 0.8 * mu + 0.2 * g, 0.9 * nu + 0.1 * g**2
            adam = (mu / (1 - 0.8**t)) / (np.sqrt(nu / (1 - 0.9**t)) + 1e-3)
            p = p - 0.1 * (adam + decay * p)
        np.testing.assert_allclose(found, p, rtol=1e-5)


def test_steps_come_from_epochs_unless_they_are_given() -> None:
    assert optimizers.num_steps(config.Training(epochs=7.0), 134) == 938
    assert optimizers.num_steps(config.Training(epochs=0.5), 7) == 3
    assert optimizers.num_steps(config.Training(epochs=7.0, max_steps=20), 134) == 20
