"""Honest validation numbers: every token scored exactly once, sums divided once, on the host.

The network gives the negative log likelihood of every token of the text; all figures are sums of
these over different denominators. Batch size only decides how many windows are computed at once.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float64, Int

from mainrun.data.batches import Batch, Windows, take
from mainrun.model.gpt import Network, Params
from mainrun.training.loss import ALL, TokenLoss, token_loss
from mainrun.training.mesh import ONE, Layout

ScoreBatch = Callable[[Params, Batch], TokenLoss]


class Scored(NamedTuple):
    """What the model makes of a text."""

    nll: Float64[np.ndarray, " tokens"]  # nats of every token, in the text's order
    balance: float  # mean balance loss over tokens; 0 without a mixture of experts


@dataclass(frozen=True, eq=False)
class Text:
    """What is scored: the windows, and the size of each document with its end.

    The end of a document counts as one token, as one byte, and as the five characters `<eos>`
    (the original assessment's denominator).
    """

    windows: Windows
    tokens: Int[np.ndarray, " documents"]
    characters: Int[np.ndarray, " documents"]
    utf8_bytes: Int[np.ndarray, " documents"]

    @classmethod
    def of(cls, documents: Sequence[str], lengths: Sequence[int], windows: Windows) -> "Text":
        """From the documents and their lengths in tokens, the end not counted."""
        return cls(
            windows=windows,
            tokens=np.array(lengths) + 1,
            characters=np.array([len(d) + len("<eos>") for d in documents]),
            utf8_bytes=np.array([len(d.encode()) + 1 for d in documents]),
        )


def make_score_batch(
    network: Network,
    *,
    micro_batches: int,
    mask_documents: bool,
    head_tokens: int = ALL,
    layout: Layout = ONE,
) -> ScoreBatch:
    """The loss of every target of a batch, dropout off; compiled once for a network."""
    return partial(
        _score_batch,
        network,
        micro_batches=micro_batches,
        mask_documents=mask_documents,
        head_tokens=head_tokens,
        layout=layout,
    )


_STATIC = "network", "micro_batches", "mask_documents", "head_tokens", "layout"


@partial(jax.jit, static_argnames=_STATIC)
def _score_batch(
    network: Network,
    params: Params,
    batch: Batch,
    *,
    micro_batches: int,
    mask_documents: bool,
    head_tokens: int,
    layout: Layout,
) -> TokenLoss:
    def part(rows: Batch) -> TokenLoss:
        model = network.bind(layout.to_compute(params))
        return token_loss(
            model,
            rows,
            mask_documents=mask_documents,
            dropout_keys=None,
            head_tokens=head_tokens,
        )

    parts = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    parts = layout.micro_batches(parts)
    scored = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), jax.lax.map(part, parts))
    return layout.everywhere(scored)  # every process reads it


def score(
    score_batch: ScoreBatch,
    params: Params,
    windows: Windows,
    batch_size: int,
    before_batch: Callable[[], None] = lambda: None,
) -> Scored:
    """Every token of the text, once.

    `before_batch` may raise to give up: an evaluation is long, and somebody may want to stop.
    """
    positions = windows.positions
    nll = np.full(int(positions.max()) + 1, np.nan)
    balance = np.zeros(len(windows))
    waiting: tuple[Int[np.ndarray, " batch"], TokenLoss] | None = None
    for rows, batch in _batches(windows, batch_size):
        before_batch()
        dispatched = rows, score_batch(params, batch)
        _store(waiting, positions, nll, balance)  # of the last, while the device does this one
        waiting = dispatched
    _store(waiting, positions, nll, balance)
    in_window = (positions >= 0).sum(1)
    assert len(nll) == in_window.sum()  # each position is some window's, once
    return Scored(nll, float((balance * in_window).sum() / len(nll)))


def metrics(
    scored: Scored, text: Text, *, batch_size: int, context_length: int
) -> dict[str, float]:
    """The `val/` metrics. Batch size and context move `val/loss_mainrun` and its coverage only."""
    nll = scored.nll
    total = float(nll.sum())
    per_document = np.add.reduceat(nll, np.cumsum(text.tokens) - text.tokens)
    characters = int(text.characters.sum())
    loss, per_token = total / characters, total / len(nll)
    seen = _seen_by_mainrun(len(nll), batch_size, context_length)
    return {
        "val/loss": loss,
        "val/loss_stderr": _standard_error(per_document, text.characters),
        "val/nats_per_token": per_token,
        "val/perplexity": math.exp(min(per_token, 700.0)),
        "val/bits_per_byte": total / math.log(2) / int(text.utf8_bytes.sum()),
        "val/loss_mainrun": float(nll[seen].sum()) / characters,
        "val/coverage_mainrun": float(seen.mean()),
        "val/tokens": len(nll),
    } | ({"val/balance_loss": scored.balance} if scored.balance else {})


def _batches(
    windows: Windows, batch_size: int
) -> Iterator[tuple[Int[np.ndarray, " batch"], Batch]]:
    """Every window once; the last batch is filled up with the last window, weightless."""
    for start in range(0, len(windows), batch_size):
        rows = np.arange(start, min(start + batch_size, len(windows)))
        filled = np.minimum(np.arange(start, start + batch_size), len(windows) - 1)
        yield rows, take(windows, filled)


def _store(
    waiting: tuple[Int[np.ndarray, " batch"], TokenLoss] | None,
    positions: np.ndarray,
    nll: np.ndarray,
    balance: np.ndarray,
) -> None:
    if waiting is None:
        return
    rows, scored = waiting
    real = positions[rows] >= 0
    nll[positions[rows][real]] = np.asarray(scored.nll)[: len(rows)][real]
    balance[rows] = np.asarray(scored.balance)[: len(rows)]


def _standard_error(
    nats: Float64[np.ndarray, " documents"], characters: Int[np.ndarray, " documents"]
) -> float:
    """Of sum(nats) / sum(characters) over documents drawn at random: the ratio estimator's
    (Cochran 1977, Sampling Techniques, eq. 2.46). NaN for a single document."""
    count = len(nats)
    if count < 2:
        return math.nan
    residual = nats - nats.sum() / characters.sum() * characters
    return float(np.sqrt(count / (count - 1) * np.square(residual).sum()) / characters.sum())


def _seen_by_mainrun(num_tokens: int, batch_size: int, context_length: int) -> np.ndarray:
    """Which tokens the original assessment's evaluation scores: it walks the text in strides of
    batch × context + 1, takes the first token of each stride as input only, and drops the tail
    that fills no stride. Ours are scored in our windows, so the two can differ by what the model
    may look back at, never by which tokens count."""
    stride = batch_size * context_length + 1
    index = np.arange(num_tokens)
    return (index % stride != 0) & (index < num_tokens // stride * stride)
