"""The step is pure, exact under accumulation, random only by (key, step, example)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.model.gpt import Network
from mainrun.training import averaging, divergence, noise
from mainrun.training import optimizer as optimizers
from mainrun.training import step as steps
from tests.shown import shown
from tests.test_gpt import CONTEXT, VOCAB, tiny

CONSTANT = optax.constant_schedule(1e-2)
PLAIN, ADAMW = config.Training(), config.AdamW()


def some_batch(seed: int = 0, rows: int = 8) -> Batch:
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, VOCAB, (rows, CONTEXT + 1)).astype(np.int32)
    lengths = draw.integers(1, CONTEXT + 1, rows)
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.cumsum(tokens[:, :-1] % 5 == 0, axis=1, dtype=np.int32),
        weights=(np.arange(CONTEXT) < lengths[:, None]).astype(np.float32),
    )


def make(
    training: config.Training = PLAIN,
    *,
    dropout: float = 0.1,
    micro_batches: int = 1,
    mask_documents: bool = False,
    settings: config.Optimizer = ADAMW,
    samples: averaging.Samples = averaging.EVERY_UPDATE,
) -> tuple:
    network = tiny(dropout=dropout, precision=training.precision)
    optimizer = optimizers.optimizer(settings, CONSTANT, 1.0)
    step = steps.make_train_step(
        network,
        optimizer,
        CONSTANT,
        training,
        micro_batches=micro_batches,
        mask_documents=mask_documents,
        samples=samples,
    )
    return (
        jax.jit(step),
        jax.jit(lambda: steps.init(network, optimizer, jax.random.key(0), training))(),
        network,
    )


@shown("micro_batches, dropout", {"2": (2, 0.0), "4": (4, 0.3), "8": (8, 0.3)}, {"4"}.__contains__)
def test_micro_batches_equal_the_whole_batch_whatever_the_padding(
    micro_batches: int, dropout: float
) -> None:
    whole, state, _ = make(dropout=dropout)
    parts, _, _ = make(dropout=dropout, micro_batches=micro_batches)
    (one, metrics), (many, split) = whole(state, some_batch()), parts(state, some_batch())
    assert float(split.loss) == pytest.approx(float(metrics.loss), abs=1e-6)
    assert float(split.grad_norm) == pytest.approx(float(metrics.grad_norm), abs=1e-6)
    # Adam divides by the root of a squared gradient: compare the moments, which are linear in it.
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(many.opt_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


REGULARISED = config.Regularization(label_smoothing=0.1, z_loss=1e-2, r_drop=2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("training", "tolerance"),
    [
        pytest.param(
            config.Training(regularization=REGULARISED, weight_average=config.Ema(decay=0.9)),
            1e-6,
            id="regularised, averaged",
        ),
        # XLA sums a product of float16 in another order where there are more rows, and its result
        # is rounded by up to 2**-11; gradients here are up to 0.3.
        pytest.param(
            config.Training(precision="float16", regularization=REGULARISED), 1.5e-4, id="float16"
        ),
    ],
)
def test_all_of_training_is_blind_to_how_a_batch_is_cut(
    training: config.Training, tolerance: float
) -> None:
    """One micro-batch of padding alone among them; two steps, so that an average is one of two."""
    sgd = config.Sgd(momentum=0.9)  # linear in the gradient
    found = []
    for micro_batches in (1, 4):
        step, state, _ = make(training, dropout=0.3, micro_batches=micro_batches, settings=sgd)
        for seed in (0, 1):
            batch = some_batch(seed)
            batch.weights[2:4] = 0
            state, metrics = step(state, batch)
        assert int(metrics.outcome) == divergence.APPLIED
        assert metrics.objective > metrics.loss + 0.01
        # But how noisy gradients are: that is what micro-batches tell, and one alone does not.
        found.append((state._replace(noise=noise.none()), metrics._replace(noise_tokens=0)))
    one, many = map(jax.tree.leaves, found)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance)


def test_loss_and_gradient_are_those_of_the_weighted_mean_over_tokens() -> None:
    step, state, network = make(dropout=0.0)
    batch = some_batch()
    logits = np.asarray(network.bind(state.params)(jnp.asarray(batch.inputs)), np.float64)
    log_z = np.log(np.exp(logits).sum(-1))
    nll = log_z - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
    expected = (nll * batch.weights).sum() / batch.weights.sum()
    metrics = step(state, batch)[1]
    assert float(metrics.loss) == pytest.approx(expected, abs=1e-5)

    def mean_nll(params: dict[str, jax.Array]) -> jax.Array:
        log_p = jax.nn.log_softmax(network.bind(params)(jnp.asarray(batch.inputs)))
        picked = jnp.take_along_axis(log_p, batch.targets[..., None], -1)[..., 0]
        return -(picked * batch.weights).sum() / batch.weights.sum()

    squares = [jnp.square(g).sum() for g in jax.grad(mean_nll)(state.params).values()]
    assert float(metrics.grad_norm) == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-4)


def test_padding_has_no_influence() -> None:
    step, state, _ = make()
    batch = some_batch()
    other = batch._replace(targets=np.where(batch.weights > 0, batch.targets, 3).astype(np.int32))
    for a, b in zip(
        jax.tree.leaves(step(state, batch)), jax.tree.leaves(step(state, other)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_masking_documents_changes_the_loss() -> None:
    plain, state, _ = make(dropout=0.0)
    masked, _, _ = make(dropout=0.0, mask_documents=True)
    assert plain(state, some_batch())[1].loss != masked(state, some_batch())[1].loss


@pytest.mark.slow
def test_dropout_is_on_changes_with_the_step_and_repeats() -> None:
    step, state, _ = make(dropout=0.5)
    off, _, _ = make(dropout=0.0)
    later = state._replace(step=state.step + 1)
    first, again, next_step, none = (
        float(f(s, some_batch())[1].loss)
        for f, s in ((step, state), (step, state), (step, later), (off, state))
    )
    assert first == again
    assert len({first, next_step, none}) == 3


def test_examples_of_a_batch_have_masks_of_their_own() -> None:
    """Of rows with the same text, each alone costs what its mask makes of it."""
    step, state, _ = make(dropout=0.5)
    alike = Batch(*(np.repeat(array, 8, axis=0) for array in some_batch(rows=1)))
    losses = {
        float(step(state, alike._replace(weights=alike.weights * row[:, None]))[1].loss)
        for row in np.eye(8, dtype=np.float32)
    }
    assert len(losses) == 8


def test_ten_steps_compile_once_and_lower_the_loss() -> None:
    step, state, _ = make(dropout=0.0)
    losses = []
    for _ in range(10):
        state, metrics = step(state, some_batch())
        losses.append(float(metrics.loss))
    assert step._cache_size() == 1
    assert losses[-1] < losses[0] - 0.3
    assert int(state.step) == 10


def test_bfloat16_trains_as_float32_does_with_float32_weights() -> None:
    """Also that every product of the step has a kernel: some fail at run time only on CPUs."""
    found = {}
    for precision in ("float32", "bfloat16"):
        step, state, _ = make(
            config.Training(precision=precision),
            dropout=0.0,
            micro_batches=2,
            mask_documents=True,
        )
        for _ in range(5):
            state, metrics = step(state, some_batch())
        assert {a.dtype for a in state.params.values()} == {jnp.dtype("float32")}
        found[precision] = float(metrics.loss)
    # The loss is 3.6, computed with 8 bits of mantissa.
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.02)


def test_the_same_seed_makes_the_same_state_and_another_another() -> None:
    network = tiny()
    optimizer = optimizers.optimizer(config.Sgd(), CONSTANT, None)
    one, same, other = (
        steps.init(network, optimizer, jax.random.key(seed), PLAIN) for seed in (1, 1, 2)
    )
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    name = "blocks.0.mlp.up.kernel"
    assert (one.params[name] != other.params[name]).any()
    assert (one.key != other.key).any()


@pytest.mark.slow
def test_the_balance_of_experts_is_minimised_times_its_coefficient() -> None:
    found = {}
    for coefficient in (0.0, 0.5):
        mlp = config.MixtureOfExperts(hidden=16, balance_coefficient=coefficient)
        network = Network(
            config.Gpt(d_model=16, num_layers=2, dropout=0.0, mlp=mlp),
            vocab_size=VOCAB, context_length=CONTEXT, precision="float32",
        )  # fmt: skip
        optimizer = optimizers.optimizer(config.Sgd(), CONSTANT, None)
        step = steps.make_train_step(
            network, optimizer, CONSTANT, PLAIN, micro_batches=1, mask_documents=False
        )
        make = partial(steps.init, network, optimizer, jax.random.key(0), PLAIN)
        state = jax.jit(make)()
        found[coefficient] = jax.jit(step)(state, some_batch())
    (plain, told), (balanced, other) = found[0.0], found[0.5]
    assert float(told.balance_loss) == float(other.balance_loss) >= 1
    assert float(told.objective) == float(told.loss) == float(other.loss)
    assert float(other.objective) == pytest.approx(float(other.loss + 0.5 * other.balance_loss))
    router = "blocks.0.mlp.router.kernel"
    assert (np.asarray(plain.params[router]) != np.asarray(balanced.params[router])).any()


@pytest.mark.parametrize("applied", [True, False])
def test_a_gpu_keeps_or_takes_the_state_as_a_cpu_does(applied: bool) -> None:
    """On a CPU the step branches; what it does elsewhere is run here all the same."""
    _, state, _ = make()

    def updated(state: steps.TrainState) -> steps.TrainState:
        return jax.tree.map(lambda leaf: leaf + jnp.ones_like(leaf), state)

    ways = [jax.jit(partial(way, jnp.asarray(applied), updated)) for way in (
        steps._branch, steps._select
    )]  # fmt: skip
    branched, selected = (jax.tree.leaves(way(state)) for way in ways)
    expected = jax.tree.leaves(updated(state) if applied else state)
    for one, other, wanted in zip(branched, selected, expected, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, wanted)
