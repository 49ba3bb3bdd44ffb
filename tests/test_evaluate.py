"""Every token once; sums over documents, characters and bytes against plain Python."""

import math

import jax
import numpy as np
import pytest

from mainrun.data import batches
from mainrun.errors import Stopped
from mainrun.training import evaluate
from tests.test_gpt import CONTEXT, VOCAB, some_params, tiny

EOS, PAD = 1, 0
DOCUMENTS = ["caf\u00e9", "a b", "", "x" * 40, "\U0001f600 yes", "end"]
IDS = [
    np.random.default_rng(i).integers(2, VOCAB, length).astype(np.int32)
    for i, length in enumerate((3, 2, 0, 30, 4, 1))
]


def text(packing: str = "stream") -> evaluate.Text:
    windows = batches.pack(IDS, context_length=CONTEXT, packing=packing, eos_id=EOS, pad_id=PAD)
    return evaluate.Text.of(DOCUMENTS, [len(ids) for ids in IDS], windows)


@pytest.fixture(scope="module")
def model() -> tuple:
    network = tiny()
    return network, some_params(network)


def scored(
    model: tuple,
    packing: str = "stream",
    batch_size: int = 2,
    micro_batches: int = 1,
    mask: bool = False,
) -> np.ndarray:
    network, params = model
    score_batch = evaluate.make_score_batch(
        network, micro_batches=micro_batches, mask_documents=mask
    )
    return evaluate.score(score_batch, params, text(packing).windows, batch_size).nll


def figures(nll: np.ndarray, packing: str = "stream", context_length: int = 10) -> dict[str, float]:
    found = evaluate.Scored(nll, balance=0.0)
    return evaluate.metrics(found, text(packing), batch_size=1, context_length=context_length)


def brute_force(model: tuple) -> list[float]:
    """One token after the other, each with what stands before it in its window."""
    network, params = model
    forward = jax.jit(lambda t: jax.nn.log_softmax(network.bind(params)(t)))
    stream = [EOS, *(int(t) for ids in IDS for t in (*ids, EOS))]
    nats = []
    for place in range(1, len(stream)):
        start = (place - 1) // CONTEXT * CONTEXT
        seen = stream[start:place] + [PAD] * (CONTEXT - (place - start))
        nats.append(-float(forward(np.array([seen]))[0, place - start - 1, stream[place]]))
    return nats


def test_every_token_is_scored_once_with_what_its_window_shows_it(model: tuple) -> None:
    np.testing.assert_allclose(scored(model), brute_force(model), atol=1e-5)


def test_batch_size_does_not_move_a_metric(model: tuple, subtests: pytest.Subtests) -> None:
    def loss(packing: str, **sizes: int) -> float:
        return figures(scored(model, packing, **sizes), packing, context_length=1)["val/loss"]

    for packing in ["stream", "documents"]:
        expected = loss(packing, batch_size=2)
        for batch_size, micro_batches in [(1, 1), (3, 1), (4, 4), (64, 8)]:
            with subtests.test(packing=packing, batch_size=batch_size, micro_batches=micro_batches):
                found = loss(packing, batch_size=batch_size, micro_batches=micro_batches)
                assert found == pytest.approx(expected, abs=1e-6)


def test_masked_documents_score_alike_however_they_are_packed(model: tuple) -> None:
    """Only positions differ; with none (zeros), a document that fits a window scores the same."""
    network, params = model
    positions = "position_embedding.embedding"
    without = network, params | {positions: 0 * params[positions]}
    stream, packed = (scored(without, p, mask=True) for p in ("stream", "documents"))
    whole = slice(0, 4)  # the first document lies in one window either way
    np.testing.assert_allclose(stream[whole], packed[whole], atol=1e-5)


def test_metrics_are_sums_divided_once() -> None:
    nll = np.random.default_rng(0).random(sum(len(ids) + 1 for ids in IDS))
    found = figures(nll)
    characters = sum(len(d) + 5 for d in DOCUMENTS)
    utf8 = sum(len(d.encode()) + 1 for d in DOCUMENTS)
    assert found["val/loss"] == pytest.approx(nll.sum() / characters)
    assert found["val/nats_per_token"] == pytest.approx(nll.mean())
    assert found["val/perplexity"] == pytest.approx(math.exp(nll.mean()))
    assert found["val/bits_per_byte"] == pytest.approx(nll.sum() / math.log(2) / utf8)
    assert found["val/tokens"] == len(nll)


def test_the_original_assessments_figure_skips_its_tail() -> None:
    """46 tokens, strides of 1 × 10 + 1: four whole strides, of which ten tokens each count."""
    nll = np.arange(46.0)
    found = figures(nll)
    counted = [i for stride in range(4) for i in range(stride * 11 + 1, stride * 11 + 11)]
    assert found["val/coverage_mainrun"] == pytest.approx(40 / 46)
    characters = sum(len(d) + 5 for d in DOCUMENTS)
    assert found["val/loss_mainrun"] == pytest.approx(nll[counted].sum() / characters)


def test_coverage_falls_with_batch_times_context_as_the_arithmetic_says(
    subtests: pytest.Subtests,
) -> None:
    every = evaluate.Scored(np.ones(140_000), balance=0.0)
    for batch_size, context in [(64, 128), (256, 256)]:
        with subtests.test(batch_size=batch_size, context=context):
            found = evaluate.metrics(every, text(), batch_size=batch_size, context_length=context)
            span, scored_tokens, place = batch_size * context + 1, 0, 0
            while place + span <= 140_000:  # the original's loop
                scored_tokens += batch_size * context
                place += span
            assert found["val/coverage_mainrun"] == pytest.approx(scored_tokens / 140_000, rel=1e-9)


def test_the_standard_error_is_the_spread_over_redrawn_documents() -> None:
    draw = np.random.default_rng(0)
    characters = draw.integers(20, 80, 400)
    nats = characters * draw.normal(1.5, 0.2, 400)
    ones = np.ones(400, np.int64)  # token and byte of each document
    found = evaluate.metrics(
        evaluate.Scored(nats, balance=0.0),
        evaluate.Text(text().windows, ones, characters, ones),
        batch_size=1,
        context_length=10,
    )
    again = draw.integers(0, 400, (4000, 400))  # the bootstrap
    spread = (nats[again].sum(1) / characters[again].sum(1)).std()
    assert found["val/loss_stderr"] == pytest.approx(spread, rel=0.05)


def test_an_evaluation_can_be_given_up_between_batches(model: tuple) -> None:
    network, params = model
    score_batch = evaluate.make_score_batch(network, micro_batches=1, mask_documents=False)
    left = iter([None, None])

    def stop_at_third() -> None:
        if next(left, "none") == "none":
            raise Stopped

    with pytest.raises(Stopped):
        evaluate.score(score_batch, params, text().windows, 1, stop_at_third)
