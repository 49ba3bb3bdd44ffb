"""The step is pure, exact under accumulation, random only by (key, step, example)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.training import optimizer as optimizers
from mainrun.training import step as steps
from tests.test_gpt import CONTEXT, VOCAB, tiny

CONSTANT = optax.constant_schedule(1e-2)


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
    dropout: float = 0.1,
    micro_batches: int = 1,
    mask_documents: bool = False,
    precision: str = "float32",
) -> tuple:
    network = tiny(dropout=dropout, precision=precision)
    optimizer = optimizers.optimizer(config.AdamW(), CONSTANT, 1.0)
    step = steps.make_train_step(
        network, optimizer, CONSTANT, micro_batches=micro_batches, mask_documents=mask_documents
    )
    return jax.jit(step), jax.jit(lambda: steps.init(network, optimizer, 0))(), network


@pytest.mark.parametrize(("micro_batches", "dropout"), [(2, 0.0), (4, 0.3), (8, 0.3)])
def test_micro_batches_equal_the_whole_batch_whatever_the_padding(
    micro_batches: int, dropout: float
) -> None:
    whole, state, _ = make(dropout)
    parts, _, _ = make(dropout, micro_batches)
    (one, metrics), (many, split) = whole(state, some_batch()), parts(state, some_batch())
    assert float(split.loss) == pytest.approx(float(metrics.loss), abs=1e-6)
    assert float(split.grad_norm) == pytest.approx(float(metrics.grad_norm), abs=1e-6)
    # Adam divides by the root of a squared gradient: compare the moments, which are linear in it.
    for a, b in zip(jax.tree.leaves(one.opt_state), jax.tree.leaves(many.opt_state), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


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
    keys = steps._example_keys(jnp.array([1, 2], jnp.uint32), jnp.asarray(3), 100)
    assert len({tuple(key) for key in np.asarray(keys)}) == 100


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
        step, state, _ = make(0.0, micro_batches=2, mask_documents=True, precision=precision)
        for _ in range(5):
            state, metrics = step(state, some_batch())
        assert {a.dtype for a in state.params.values()} == {jnp.dtype("float32")}
        found[precision] = float(metrics.loss)
    # The loss is 3.6, computed with 8 bits of mantissa.
    assert found["bfloat16"] == pytest.approx(found["float32"], abs=0.02)


def test_the_same_seed_makes_the_same_state_and_another_another() -> None:
    network = tiny()
    optimizer = optimizers.optimizer(config.Sgd(), CONSTANT, None)
    one, same, other = (steps.init(network, optimizer, seed) for seed in (1, 1, 2))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(same), strict=True):
        np.testing.assert_array_equal(a, b)
    name = "blocks.0.mlp.up.kernel"
    assert (one.params[name] != other.params[name]).any()
    assert (one.key != other.key).any()
