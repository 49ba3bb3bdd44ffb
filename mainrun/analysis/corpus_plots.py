"""Pictures of a corpus: lengths, windows, vocabularies; figures that a notebook shows.

Blue is training or the first thing compared, orange validation or the second, as in `plots`; grey
is a setting of the run. Everything drawn was counted by `corpus`.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mainrun.analysis import corpus
from mainrun.analysis.corpus import Compression, Corpus, Lengths, Packed

_TRAIN, _VALIDATION, _PALE, _SETTING = "#2a6fbb", "#d9541e", "#b9cfe8", "#777777"
_KINDS = {"bpe": "#2a6fbb", "unigram": "#d9541e", "wordpiece": "#3a8f4d"}
_DPI = 100  # a notebook is committed with its pictures


class Picture(Figure):
    """A figure that a notebook shows by itself: without pyplot, and without a magic command."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        # Without the version of Matplotlib: the same numbers give the same bytes.
        self.savefig(file, format="png", metadata={"Software": None})
        return file.getvalue()


def lengths(texts: Corpus) -> Picture:
    """How many documents have which length, in characters and in tokens."""
    figure, (left, right) = _figure()
    _histogram(left, texts.train.characters, texts.validation.characters)
    _histogram(right, texts.train.tokens, texts.validation.tokens)
    _mark(right, texts.settings.data.context_length, "context length")
    above: dict[str, Any] = {"loc": "upper center", "ncols": 2}
    _label(left, "Length in characters", "characters", "% of the documents", **above)
    _label(right, "Length in tokens", "tokens, without <eos>", "% of the documents", **above)
    return figure


def packed(found: Sequence[Packed], chosen: int) -> Picture:
    """What windows do to documents and tokens, by context length; `chosen` is the run's."""
    figure, (left, right) = _figure()
    x = [each.context_length for each in found]
    _line(left, x, [100 * each.cut for each in found], _TRAIN, "cut by packing: stream")
    _line(left, x, [100 * each.longer for each in found], _VALIDATION, "longer than a window")
    _line(
        right, x, [100 * each.headless for each in found], _TRAIN,
        "stream: tokens without their beginning",
    )  # fmt: skip
    _line(
        right, x, [100 * each.padding for each in found], _VALIDATION,
        "documents: places that are padding",
    )  # fmt: skip
    for axes in (left, right):
        _doublings(axes, x)
        axes.set_ylim(bottom=0)
        _mark(axes, chosen, "context length")
    unit = "context length (tokens)"
    _label(left, "Documents in more than one window", unit, "% of the documents")
    _label(right, "What either packing costs", unit, "% of the tokens, of the places")
    return figure


def compressions(found: Sequence[Compression], chosen: int) -> Picture:
    """Tokens per word and rarely shown tokens, by vocabulary size; `chosen` is the run's."""
    figure, (left, right) = _figure()
    for kind, color in _KINDS.items():
        curve = corpus.curve(found, kind)
        x = [each.vocab_size for each in curve]
        _line(left, x, [each.tokens_per_word for each in curve], color, kind)
        _line(right, x, [100 * each.rare for each in curve], color, kind)
    right.set_ylim(bottom=0)
    for axes in (left, right):
        _doublings(axes, corpus.VOCAB_SIZES)
        _mark(axes, chosen, "this run's")
    for each in corpus.curve(found, "char"):
        _mention(left, f"char: {each.tokens_per_word:.2f} (off the scale)")
    _label(left, "Tokens per word (validation)", "vocabulary (tokens)", "tokens per word")
    title = f"Tokens that training shows fewer than {corpus.RARE} times"
    _label(right, title, "vocabulary (tokens)", "% of the vocabulary")
    return figure


def _histogram(axes: Any, train: Lengths, validation: Lengths) -> None:
    """Shares of documents by length, with what 95 % and 99 % of training do not exceed."""
    found = corpus.spread(train)
    end = min(max(train.max(), validation.max()), 2 * found.p99)  # a few monsters hide the rest
    width = -(-int(end) // 50)
    bins = np.arange(0, end + 2 * width, width) - 0.5  # lengths are whole numbers
    for values, color, label, kind in (
        (train, _PALE, "training", "stepfilled"),
        (validation, _VALIDATION, "validation", "step"),
    ):
        weights = np.full(len(values), 100 / len(values))
        axes.hist(values, bins, weights=weights, color=color, label=label, histtype=kind)
    for length, name, style in ((found.p95, "95 %", "--"), (found.p99, "99 %", ":")):
        label = f"{name} have at most {length:,}"
        axes.axvline(length, color=_TRAIN, linewidth=1.2, linestyle=style, label=label)
    axes.set_xlim(0, bins[-1])
    axes.set_ylim(top=1.35 * axes.get_ylim()[1])  # room for the legend


def _line(axes: Any, x: Sequence[int], y: Sequence[float], color: str, label: str) -> None:
    axes.plot(x, y, color=color, marker="o", markersize=4, linewidth=1.6, label=label)


def _mark(axes: Any, value: int, name: str) -> None:
    low, high = axes.get_xlim()
    label = f"{name}: {value:,}"
    if low <= value <= high:
        axes.axvline(value, color=_SETTING, linewidth=1, label=label)
    else:
        _mention(axes, f"{label} (off the scale)")


def _mention(axes: Any, text: str) -> None:
    """A line of the legend that stands for nothing drawn."""
    axes.plot([], [], linestyle="none", label=text)


def _doublings(axes: Any, sizes: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])


def _figure() -> tuple[Picture, Any]:
    figure = Picture(figsize=(9.6, 3.4), dpi=_DPI, layout="constrained")
    return figure, figure.subplots(1, 2)


def _label(axes: Any, title: str, x: str, y: str, **legend: Any) -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, edgecolor="none", framealpha=0.9, **legend)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
