"""The spread of initial weights is what each name promises."""

import jax
import numpy as np
import pytest

from mainrun import config
from mainrun.model.initializers import Initializer

SHAPE = (200, 600)  # inputs, outputs


def test_weights_have_the_deviation_of_their_kind(subtests: pytest.Subtests) -> None:
    cases = [
        ("normal", 0.02),
        ("xavier", (2 / 800) ** 0.5),
        ("kaiming", (2 / 200) ** 0.5),
        ("uniform", 64**-0.5 / 3**0.5),
    ]
    for kind, deviation in cases:
        with subtests.test(kind=kind, deviation=deviation):
            init = Initializer.of(config.Gpt(d_model=64, init=kind))
            weights = np.asarray(init(jax.random.key(0), SHAPE))
            # 120,000 draws: the deviation of their deviation is 0.2 %
            assert weights.std() == pytest.approx(deviation, rel=0.02)
            assert abs(weights.mean()) < 0.02 * deviation
            if kind == "uniform":
                assert np.abs(weights).max() <= 64**-0.5
            else:
                assert np.abs(weights).max() > 3.5 * deviation, "not cut off, as PyTorch's are not"


def test_an_embedding_begins_as_the_head_that_it_is_tied_to() -> None:
    """PyTorch's weight [vocab, width] has the width for its fan in."""
    init = Initializer.of(config.Gpt(d_model=64, init="kaiming"))
    table = np.asarray(init.embedding(jax.random.key(0), 1000, 64))
    assert table.std() == pytest.approx((2 / 64) ** 0.5, rel=0.02)


def test_a_stack_of_experts_begins_as_each_alone() -> None:
    init = Initializer.of(config.Gpt(d_model=64, init="xavier"))
    weights = np.asarray(init(jax.random.key(0), (5, *SHAPE)))
    assert weights.std() == pytest.approx((2 / 800) ** 0.5, rel=0.02)


def test_a_factor_scales() -> None:
    init = Initializer.of(config.Gpt(init="uniform"))
    plain, half = (i(jax.random.key(0), SHAPE) for i in (init, init.scaled(0.5)))
    np.testing.assert_allclose(half, 0.5 * np.asarray(plain), rtol=1e-6)
