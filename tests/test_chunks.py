"""Sums that are taken stretch by stretch: how time is cut, and what has gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun.training import chunks

FEATURES = jax.random.normal(jax.random.key(0), (3, 8, 5))
TABLE = jax.random.normal(jax.random.key(1), (7, 5))
ROWS = jnp.arange(24).reshape(3, 8)


def cost(
    features: jax.Array, table: jax.Array, rows: jax.Array, factor: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return factor * (jnp.tanh(features @ table.T).sum(-1) * rows).sum(), rows.sum()


def test_time_is_cut_into_the_fewest_equal_stretches(subtests: pytest.Subtests) -> None:
    for batch, time, most, expected in [
        (4, 8, 32, 1),
        (4, 8, 31, 2),
        (4, 8, 8, 4),
        (4, 8, 1, 8),
        (1, 7, 3, 7),
        (2, 6, 5, 3),
    ]:
        with subtests.test(batch=batch, time=time, most=most):
            assert chunks.count(batch, time, most_tokens=most) == expected


def test_cutting_is_undone_by_joining_and_keeps_the_batch_together() -> None:
    parts = chunks.cut(ROWS, 4)
    np.testing.assert_array_equal(parts[1], ROWS[:, 2:4])
    np.testing.assert_array_equal(chunks.joined(parts), ROWS)


@pytest.mark.parametrize("number", [1, 2, 8])
def test_the_sum_and_its_gradients_are_those_of_the_whole(number: int) -> None:
    def whole(x: jax.Array, table: jax.Array) -> jax.Array:
        return 2 * cost(x, table, ROWS, jnp.float32(3))[0]

    def ours(x: jax.Array, table: jax.Array) -> jax.Array:
        found, beside = chunks.summed(cost, number, x, table, ROWS, jnp.float32(3))
        assert beside.shape == ()
        return 2 * found  # a cotangent other than 1

    value, gradients = jax.value_and_grad(ours, (0, 1))(FEATURES, TABLE)
    expected, by_autodiff = jax.value_and_grad(whole, (0, 1))(FEATURES, TABLE)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for found, plain in zip(gradients, by_autodiff, strict=True):
        np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-4)


def test_a_frozen_table_has_no_gradient_computed() -> None:
    def text(argnums: int | tuple[int, ...]) -> str:
        def found(x: jax.Array, table: jax.Array) -> jax.Array:
            return chunks.summed(cost, 4, x, table, ROWS, jnp.float32(1))[0]

        return str(jax.make_jaxpr(jax.grad(found, argnums))(FEATURES, TABLE))

    assert text(0).count("dot_general") == 2
    assert text((0, 1)).count("dot_general") == 3


def test_all_logits_are_never_there_at_once() -> None:
    """Of 8 stretches, the step holds an eighth of the logits: they are most of its memory."""

    def found(x: jax.Array, table: jax.Array, number: int) -> jax.Array:
        return chunks.summed(cost, number, x, table, jnp.ones((4, 64)), jnp.float32(1))[0]

    def temporaries(number: int) -> int:
        compiled = (
            jax.jit(jax.grad(found, (0, 1)), static_argnums=2)
            .lower(jnp.zeros((4, 64, 8)), jnp.zeros((4000, 8)), number)
            .compile()
        )
        return compiled.memory_analysis().temp_size_in_bytes

    logits = 4 * 64 * 4000 * 4
    assert temporaries(1) > logits
    # JAX 0.10 holds three of the eight.
    assert temporaries(8) < logits / (3 if jax.__version_info__ >= (0, 11) else 2)


def test_what_is_summed_is_traced_once_and_may_use_what_is_around_it() -> None:
    traced = []

    def total(factor: jax.Array, parts: jax.Array) -> jax.Array:
        def one(part: jax.Array) -> tuple[jax.Array, None]:
            traced.append(part)
            return factor * part.sum(), None

        return chunks.sum_of(one, parts)[0]

    value, gradient = jax.jit(jax.value_and_grad(total))(jnp.float32(2), FEATURES)
    np.testing.assert_allclose(value, 2 * FEATURES.sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, FEATURES.sum(), rtol=1e-5)
    assert len(traced) == 1
