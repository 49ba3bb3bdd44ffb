"""The gradient noise scale where the truth is known, and of a step from its own gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.training import noise
from mainrun.training.noise import Noise, Norms
from tests.test_step import make, some_batch


def norms(gradients: list[np.ndarray]) -> Norms:
    """Of micro-batches, each the gradients of its tokens: [tokens, parameters]."""
    full = [g for g in gradients if len(g)]
    return Norms(
        squares=jnp.float32(sum((g.mean(0) ** 2).sum() for g in full)),
        inverse_tokens=jnp.float32(sum(1 / len(g) for g in full)),
        number=jnp.float32(len(full)),
    )


def observe(now: Noise, gradients: list[np.ndarray], decay: float) -> Noise:
    whole = np.concatenate(gradients)
    square = jnp.float32((whole.mean(0) ** 2).sum())
    return OBSERVED(now, norms(gradients), square, jnp.float32(len(whole)), decay=decay)


OBSERVED = jax.jit(noise.observed, static_argnames="decay")


def test_the_smoothed_ratio_is_the_noise_scale_whatever_the_sizes_of_micro_batches() -> None:
    draw = np.random.default_rng(0)
    mean = draw.normal(size=30) / 30**0.5
    deviations = draw.uniform(0.2, 2.0, 30)
    now = noise.none()
    for _ in range(1000):
        sizes = [*draw.integers(1, 40, 3), 0]  # padding alone in one of them
        now = observe(
            now, [mean + deviations * draw.normal(size=(size, 30)) for size in sizes], decay=0.998
        )
    truth = (deviations**2).sum() / (mean**2).sum()
    assert float(noise.scale_tokens(now)) == pytest.approx(truth, rel=0.1)
    # By itself each is as large as the weight of what was observed, which the ratio does not see.
    weight = 1 - 0.998**1000
    assert float(now.variance) / weight == pytest.approx((deviations**2).sum(), rel=0.1)
    assert float(now.signal) / weight == pytest.approx((mean**2).sum(), rel=0.1)


def test_a_single_micro_batch_tells_nothing(subtests: pytest.Subtests) -> None:
    """Nor one among others that are padding alone."""
    for others in [0, 2]:
        with subtests.test(others=others):
            gradients = [np.ones((5, 3)), *[np.zeros((0, 3))] * others]
            for before in (noise.none(), Noise(jnp.float32(3.0), jnp.float32(2.0))):
                after = observe(before, gradients, decay=0.9)
                np.testing.assert_array_equal(after, before)
            assert np.isnan(noise.scale_tokens(observe(noise.none(), gradients, decay=0.9)))


def test_gradients_that_are_no_numbers_tell_nothing(subtests: pytest.Subtests) -> None:
    for bad in [np.nan, np.inf]:
        with subtests.test(bad=bad):
            before = Noise(jnp.float32(3.0), jnp.float32(2.0))
            after = observe(before, [np.ones((2, 3)), np.full((2, 3), bad)], decay=0.9)
            np.testing.assert_array_equal(after, before)


def test_an_estimate_below_zero_is_not_told(subtests: pytest.Subtests) -> None:
    for variance, signal in [(-1.0, 2.0), (2.0, -1.0), (2.0, 0.0)]:
        with subtests.test(variance=variance, signal=signal):
            assert np.isnan(noise.scale_tokens(Noise(jnp.float32(variance), jnp.float32(signal))))


def one_target() -> Batch:
    """All micro-batches want the same token, so that their gradients have something in common."""
    batch = some_batch()
    batch.weights[2:4] = 0
    return batch._replace(targets=np.full_like(batch.targets, 3))


def flat(gradient: dict[str, jax.Array]) -> np.ndarray:
    return np.concatenate([np.asarray(g, np.float64).ravel() for g in gradient.values()])


@pytest.mark.slow
def test_a_step_measures_the_gradients_of_its_own_micro_batches() -> None:
    decay = 0.75
    step, state, network = make(
        config.Training(noise_scale_decay=decay), dropout=0.0, micro_batches=4
    )
    batch = one_target()

    def mean_loss(params: dict[str, jax.Array], part: Batch) -> jax.Array:
        log_p = jax.nn.log_softmax(network.bind(params)(part.inputs))
        picked = jnp.take_along_axis(log_p, part.targets[..., None], -1)[..., 0]
        return -(picked * part.weights).sum() / part.weights.sum()

    gradient = jax.jit(jax.grad(mean_loss))

    parts = [Batch(*(x[start : start + 2] for x in batch)) for start in (0, 4, 6)]
    tokens = np.array([part.weights.sum() for part in parts])
    assert len(set(tokens)) == 3
    variance = signal = 0.0
    for _ in range(2):
        each = np.array([flat(gradient(state.params, part)) for part in parts])
        whole = (tokens[:, None] * each).sum(0) / tokens.sum()
        # |G|² + S/B of both sizes of B, solved for |G|² and S
        mixed = np.array([[1, (1 / tokens).mean()], [1, 1 / tokens.sum()]])
        found = np.linalg.solve(mixed, [(each**2).sum(1).mean(), (whole**2).sum()])
        signal = decay * signal + (1 - decay) * found[0]
        variance = decay * variance + (1 - decay) * found[1]
        state, metrics = step(state, batch)
        # float32 norms, and the difference of two that are alike
        assert float(state.noise.signal) == pytest.approx(signal, rel=1e-3)
        assert float(state.noise.variance) == pytest.approx(variance, rel=1e-3)
        assert float(metrics.noise_tokens) == pytest.approx(variance / signal, rel=2e-3)
    assert variance / signal > 0.1
