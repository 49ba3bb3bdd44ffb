"""What training adds to the likelihood, against NumPy's float64 and the papers' formulas."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.model.gpt import Network
from mainrun.training import loss as losses
from mainrun.training import step as steps
from mainrun.training.loss import Costs, TokenLoss
from tests.shown import shown
from tests.test_gpt import CONTEXT, VOCAB, some_params, tiny
from tests.test_step import make, some_batch

KEYS = jax.random.key_data(jax.random.split(jax.random.key(3), 8))
SECOND = jnp.uint32(0x9E3779B9)  # turns a key into that of R-Drop's second pass

SMOOTHING, Z_LOSS, R_DROP = 0.1, 0.03, 4.0
EACH = {
    "label_smoothing": config.Regularization(label_smoothing=SMOOTHING),
    "z_loss": config.Regularization(z_loss=Z_LOSS),
    "r_drop": config.Regularization(r_drop=R_DROP),
    "all": config.Regularization(label_smoothing=SMOOTHING, z_loss=Z_LOSS, r_drop=R_DROP),
}
NETWORK = tiny(dropout=0.3)


@cache
def params() -> dict[str, jax.Array]:
    return some_params(NETWORK)


@cache
def logits(second: bool = False) -> np.ndarray:
    """Of the first pass or of the second, float64."""
    model = jax.jit(lambda p, keys: NETWORK.bind(p)(jnp.asarray(some_batch().inputs), None, keys))
    return np.asarray(model(params(), KEYS ^ SECOND if second else KEYS), np.float64)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def cross_entropy(logits: np.ndarray, smoothing: float = 0.0) -> np.ndarray:
    """Of the targets, a share of each spread over all tokens; nats."""
    target = np.eye(VOCAB)[some_batch().targets] * (1 - smoothing) + smoothing / VOCAB
    return -(target * log_softmax(logits)).sum(-1)


def divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Kullback and Leibler's, of logits."""
    return (np.exp(log_softmax(p)) * (log_softmax(p) - log_softmax(q))).sum(-1)


def objective(settings: config.Regularization) -> np.ndarray:
    """Of every token, from the logits of one pass or of two."""
    passes = [logits(), logits(second=True)] if settings.r_drop else [logits()]
    each = [
        cross_entropy(found, settings.label_smoothing)
        + settings.z_loss * np.log(np.exp(found).sum(-1)) ** 2
        for found in passes
    ]
    total = np.mean(each, axis=0)
    if settings.r_drop:
        both = (divergence(*passes) + divergence(*passes[::-1])) / 2
        total += settings.r_drop / 2 * both  # eq. 3 of the paper, halved
    return total


def ours(
    settings: config.Regularization, head_tokens: int = losses.ALL
) -> tuple[tuple[jax.Array, Costs], dict[str, jax.Array]]:
    """What is minimised of the batch, its parts, and the gradient."""

    def loss(found: dict[str, jax.Array]) -> tuple[jax.Array, Costs]:
        return losses.training_loss(
            NETWORK.bind(found),
            some_batch(),
            settings,
            mask_documents=False,
            dropout_keys=KEYS,
            head_tokens=head_tokens,
        )

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params())


def plain(settings: config.Regularization) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The objective with all logits at once, and its gradient by plain autodiff."""

    def loss(found: dict[str, jax.Array]) -> jax.Array:
        model, batch = NETWORK.bind(found), some_batch()
        keys = [KEYS, KEYS ^ SECOND] if settings.r_drop else [KEYS]
        passes = [model(jnp.asarray(batch.inputs), None, k) for k in keys]
        target = jax.nn.one_hot(batch.targets, VOCAB)
        target = target * (1 - settings.label_smoothing) + settings.label_smoothing / VOCAB
        each = sum(
            -(target * jax.nn.log_softmax(x)).sum(-1)
            + settings.z_loss * jnp.square(jax.nn.logsumexp(x, -1))
            for x in passes
        ) / len(passes)
        if settings.r_drop:
            first, second = (jax.nn.log_softmax(x) for x in passes)
            both = ((jnp.exp(first) - jnp.exp(second)) * (first - second)).sum(-1)
            each += settings.r_drop / 4 * both
        return (each * batch.weights).sum()

    return jax.jit(jax.value_and_grad(loss))(params())


@pytest.mark.parametrize("settings", EACH.values(), ids=EACH)
def test_each_regulariser_is_its_formula(settings: config.Regularization) -> None:
    (total, costs), _ = ours(settings)
    # The likelihood stays itself: of R-Drop's two passes it is the mean.
    passes = [logits(), logits(second=True)] if settings.r_drop else [logits()]
    likelihood = np.mean([cross_entropy(x) for x in passes], axis=0)
    weights = np.asarray(some_batch().weights, np.float64)
    added = objective(settings) - likelihood
    np.testing.assert_allclose(costs.nll, (likelihood * weights).sum(), rtol=1e-6)
    np.testing.assert_allclose(costs.added, (added * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(total, costs.nll + costs.added, rtol=1e-6)
    assert np.abs(added).mean() > 1e-2
    assert costs.added.dtype == costs.nll.dtype == jnp.float32


def test_the_balance_of_experts_is_the_mean_of_r_drops_two_passes() -> None:
    """Without dropout the passes are alike, and so is what one pass alone has."""
    settings = config.Gpt(
        d_model=16, num_layers=1, dropout=0.0, mlp=config.MixtureOfExperts(hidden=16)
    )
    network = Network(settings, vocab_size=VOCAB, context_length=CONTEXT, precision="float32")

    @jax.jit
    def balances() -> list[jax.Array]:
        model = network.bind(network.init(jax.random.key(0)))
        both = config.Regularization(), EACH["r_drop"]
        costs = (
            losses.training_loss(model, some_batch(), each, mask_documents=False, dropout_keys=KEYS)
            for each in both
        )
        return [found.balance for _, found in costs]

    once, twice = balances()
    assert float(twice) == pytest.approx(float(once), rel=1e-6)
    assert float(once) >= some_batch().weights.sum()


@pytest.mark.slow
@shown("head_tokens", {"all": losses.ALL, "40": 40, "8": 8, "1": 1}, {"8"}.__contains__)
@pytest.mark.parametrize("settings", [config.Regularization(), *EACH.values()], ids=["none", *EACH])
def test_a_few_positions_at_a_time_is_all_at_once(
    settings: config.Regularization, head_tokens: int
) -> None:
    (total, _), gradient = ours(settings, head_tokens)
    expected, by_autodiff = plain(settings)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    for name, array in by_autodiff.items():
        largest = float(jnp.abs(array).max())
        np.testing.assert_allclose(gradient[name], array, atol=2e-6 * largest + 1e-6, err_msg=name)


def test_the_two_passes_drop_different_numbers_and_so_disagree() -> None:
    assert divergence(logits(), logits(second=True)).min() > 1e-3


def test_zero_settings_are_exactly_the_plain_likelihood() -> None:
    (total, costs), _ = ours(config.Regularization())
    found = scored(losses.ALL)
    np.testing.assert_allclose(total, (found.nll * some_batch().weights).sum(), rtol=1e-6)
    assert total == costs.nll
    assert costs.added == 0


@pytest.mark.parametrize("head_tokens", [40, 8, 1])
def test_each_token_is_scored_alike_a_few_at_a_time(head_tokens: int) -> None:
    expected = cross_entropy(logits())
    np.testing.assert_allclose(scored(losses.ALL).nll, expected, atol=1e-5)
    np.testing.assert_allclose(scored(head_tokens).nll, expected, atol=1e-5)


def scored(head_tokens: int) -> TokenLoss:
    def score(found: dict[str, jax.Array]) -> TokenLoss:
        return losses.token_loss(
            NETWORK.bind(found),
            some_batch(),
            mask_documents=False,
            dropout_keys=KEYS,
            head_tokens=head_tokens,
        )

    return jax.jit(score)(params())


def test_a_step_minimises_the_objective_and_reports_the_likelihood() -> None:
    step, state, _ = make(config.Training(regularization=EACH["all"]), dropout=0.3)
    batch, state = some_batch(), state._replace(params=params())
    keys = steps._example_keys(state.key, state.step, len(batch.inputs))
    target = jax.nn.one_hot(batch.targets, VOCAB)
    smooth = target * (1 - SMOOTHING) + SMOOTHING / VOCAB

    def mean(each: jax.Array) -> jax.Array:
        return (each * batch.weights).sum() / batch.weights.sum()

    def minimised(found: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        model, inputs = NETWORK.bind(found), jnp.asarray(batch.inputs)
        passes = [model(inputs, None, k) for k in (keys, keys ^ SECOND)]
        first, second = (jax.nn.log_softmax(x) for x in passes)
        each = -(smooth * (first + second) / 2).sum(-1)
        each += Z_LOSS / 2 * sum(jnp.square(jax.nn.logsumexp(x, -1)) for x in passes)
        each += R_DROP / 4 * ((jnp.exp(first) - jnp.exp(second)) * (first - second)).sum(-1)
        return mean(each), mean(-(target * (first + second) / 2).sum(-1))

    metrics = step(state, batch)[1]
    (objective, loss), gradient = jax.jit(jax.value_and_grad(minimised, has_aux=True))(params())
    assert float(metrics.objective) == pytest.approx(float(objective), rel=1e-5)
    assert float(metrics.loss) == pytest.approx(float(loss), rel=1e-5)
    norm = np.sqrt(sum(float(jnp.square(g).sum()) for g in gradient.values()))
    assert float(metrics.grad_norm) == pytest.approx(norm, rel=1e-4)
