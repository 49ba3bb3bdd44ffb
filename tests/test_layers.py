"""Layers against NumPy written from their definitions, and dropout against statistics."""

import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mainrun import config
from mainrun.model import head, layers
from mainrun.model.initializers import Initializer

INIT = Initializer("normal", d_model=4)
KEYS = jax.random.key_data(jax.random.split(jax.random.key(0), 64))


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def test_linear_and_its_gradients_are_those_of_plain_autodiff() -> None:
    x, kernel, bias, weight = normal(0, 6, 5), normal(1, 5, 3), normal(2, 3), normal(3, 6, 3)

    def plain(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return x @ kernel + bias

    for f, g in zip(
        jax.vjp(layers.linear, x, kernel, bias)[1](weight),
        jax.vjp(plain, x, kernel, bias)[1](weight),
        strict=True,
    ):
        np.testing.assert_allclose(f, g, rtol=1e-6)
    np.testing.assert_allclose(layers.linear(x, kernel, bias), plain(x, kernel, bias), rtol=1e-6)


def test_unembed_and_its_gradients_are_those_of_plain_autodiff() -> None:
    x, table, weight = normal(0, 6, 5), normal(1, 7, 5), normal(2, 6, 7)
    ours, theirs = (jax.vjp(f, x, table)[1](weight) for f in (head.unembed, lambda x, e: x @ e.T))
    for f, g in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(f, g, rtol=1e-5, atol=1e-6)


def test_gradients_of_weights_are_float32_under_bfloat16(subtests: pytest.Subtests) -> None:
    for call in [layers.linear, head.unembed]:
        with subtests.test(call.__name__):
            x, kernel = normal(0, 6, 5).astype(jnp.bfloat16), normal(1, 5, 5)
            arguments = (x, kernel, normal(2, 5)) if call is layers.linear else (x, kernel)
            out, pull = jax.vjp(jax.jit(call), *arguments)
            dx, dkernel = pull(jnp.ones_like(out))[:2]
            assert (dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32)


def test_layer_norm_is_its_definition() -> None:
    x = np.asarray(normal(0, 2, 3, 8)) * 3 + 1
    norm = layers.LayerNorm(8, eps=1e-5, bias=True)
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)


def test_rms_norm_is_its_definition() -> None:
    x = np.asarray(normal(0, 2, 3, 8)) * 3 + 1
    expected = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-2)
    ours = layers.RmsNorm(8, eps=1e-2)(jnp.asarray(x))
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)


def test_norms_compute_in_float32_under_bfloat16() -> None:
    x = jnp.asarray(normal(0, 2, 3, 8) + 300, jnp.bfloat16)  # bfloat16 statistics would be noise
    for norm in (layers.LayerNorm(8, eps=1e-5, bias=False), layers.RmsNorm(8, eps=1e-5)):
        ours, wide = norm(x), norm(x.astype(jnp.float32))
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_allclose(ours.astype(jnp.float32), wide, rtol=1e-2, atol=1e-2)


def normal_cdf(x: float) -> float:
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


ACTIVATIONS = {
    "gelu": lambda x: x * np.vectorize(normal_cdf)(x),
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "swiglu": lambda x: x[..., :6] / (1 + np.exp(-x[..., :6])) * x[..., 6:],
}


def test_the_mlp_is_its_definition(subtests: pytest.Subtests) -> None:
    for kind, bias in itertools.product(typing.get_args(config.Activation), [True, False]):
        with subtests.test(kind=kind, bias=bias):
            mlp = layers.Mlp(
                config.DenseMlp(kind, hidden=6),
                4,
                init=INIT,
                out_init=INIT,
                bias=bias,
                rngs=nnx.Rngs(0),
            )
            if bias:
                mlp.up.bias[...] = mlp.up.bias[...] + 0.3
            # Where the exact and the tanh form of GELU differ.
            x = np.asarray(normal(0, 1, 3, 4)) * 50
            up = np.asarray(x @ mlp.up.kernel[...] + (mlp.up.bias[...] if bias else 0), np.float64)
            expected = ACTIVATIONS[kind](up) @ mlp.down.kernel[...]
            np.testing.assert_allclose(mlp(jnp.asarray(x)), expected, rtol=2e-5, atol=1e-5)


def test_the_hidden_width_is_four_times_the_width_where_none_is_set() -> None:
    mlp = layers.Mlp(config.DenseMlp(), 4, init=INIT, out_init=INIT, bias=True, rngs=nnx.Rngs(0))
    assert mlp.up.kernel[...].shape == (4, 16)


def test_dropout_drops_the_fraction_and_keeps_the_mean() -> None:
    dropped = layers.dropout(jnp.ones((64, 40, 50)), KEYS, 0, 0.3)
    # 128,000 draws: the standard error of the fraction is 0.0013
    assert float((dropped == 0).mean()) == pytest.approx(0.3, abs=0.006)
    assert float(dropped.max()) == pytest.approx(1 / 0.7)
    per_example = (dropped == 0).mean((1, 2))
    assert float(jnp.std(per_example)) == pytest.approx(math.sqrt(0.3 * 0.7 / 2000), rel=0.35)


def test_dropout_without_keys_or_rate_is_nothing() -> None:
    x = normal(0, 2, 3)
    np.testing.assert_array_equal(layers.dropout(x, None, 0, 0.5), x)
    np.testing.assert_array_equal(layers.dropout(x, KEYS[:2], 0, 0.0), x)


def test_masks_of_places_examples_sites_and_layers_are_unrelated() -> None:
    """Two independent masks at rate 1/2 agree in half of 100,000 places, give or take 0.0016."""

    def mask(keys: jax.Array, site: int) -> np.ndarray:
        return np.asarray(layers.dropout(jnp.ones((64, 1600)), keys, site, 0.5) == 0)

    one = mask(KEYS, 0)
    others = [
        mask(KEYS, 1),
        mask(layers.fold(KEYS, 1), 0),
        mask(layers.fold(KEYS, 2), 0),
        np.roll(one, 1, axis=0),
        np.roll(one, 1, axis=1),
        np.roll(one, 32, axis=1),
    ]
    for other in others:
        assert (one == other).mean() == pytest.approx(0.5, abs=0.01)


def test_an_examples_mask_does_not_depend_on_its_batch() -> None:
    x = jnp.ones((8, 5, 7))
    whole = layers.dropout(x, KEYS[:8], 3, 0.4)
    parts = [layers.dropout(x[i : i + 2], KEYS[i : i + 2], 3, 0.4) for i in range(0, 8, 2)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))


def test_the_gradient_of_dropout_uses_the_mask_of_the_forward_pass() -> None:
    x = normal(0, 4, 50)
    out, pull = jax.vjp(lambda x: layers.dropout(x, KEYS[:4], 0, 0.5), x)
    np.testing.assert_allclose(pull(jnp.ones_like(x))[0], np.where(out == 0, 0.0, 2.0))
