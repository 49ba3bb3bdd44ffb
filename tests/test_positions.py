"""Sinusoids and rotations against their definitions, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun.model import positions


def test_sinusoids_are_those_of_the_paper(subtests: pytest.Subtests) -> None:
    for width in [8, 7]:
        with subtests.test(width=width):
            places = np.array([0, 1, 5, 300])
            expected = np.zeros((4, width))
            for row, place in enumerate(places):
                for column in range(width):
                    angle = place / 10_000 ** (2 * (column // 2) / width)
                    expected[row, column] = np.cos(angle) if column % 2 else np.sin(angle)
            np.testing.assert_allclose(
                positions.sinusoids(jnp.asarray(places), width), expected, atol=2e-5
            )


def rotated(x: np.ndarray, places: np.ndarray, base: float) -> np.ndarray:
    """Each pair as a complex number, times a unit one."""
    half = x.shape[-1] // 2
    angles = places[:, None] * base ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_rotation_turns_each_pair_by_its_angle() -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 6))
    places = np.array([0, 1, 7, 40])
    ours = positions.rotate(jnp.asarray(x, jnp.float32), jnp.asarray(places), 100.0)
    np.testing.assert_allclose(ours, rotated(x, places, 100.0), atol=1e-5)


def test_a_product_of_rotated_vectors_depends_on_their_distance_alone() -> None:
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in range(2))

    def product(query: int, key: int) -> float:
        turned = [
            positions.rotate(x, jnp.array([place]), 1e4) for x, place in ((q, query), (k, key))
        ]
        return float((turned[0] * turned[1]).sum())

    assert product(7, 3) == pytest.approx(product(107, 103), abs=1e-4)
    assert abs(product(7, 3) - product(7, 4)) > 1e-3
