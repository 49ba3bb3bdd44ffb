"""Holds a corpus's pictures to drawing what was counted, the same bytes for the same numbers."""

import struct

import pytest

from mainrun import config
from mainrun.analysis import corpus as counts
from mainrun.analysis import corpus_plots as plots
from mainrun.analysis.corpus import Compression, Packed

PACKED = [Packed(16, 0.4, 0.8, 0.5, 0.06), Packed(32, 0.1, 0.4, 0.3, 0.01)]
CURVES = [
    *(Compression("bpe", 1024, 2.1, 2.8, 0.2), Compression("bpe", 2048, 1.7, 3.5, 0.3)),
    *(Compression("unigram", 1024, 2.2, 2.7, 0.1), Compression("char", 98, 6.1, 1.0, 0.1)),
]


@pytest.fixture(scope="module")
def texts(corpus):
    overrides = [f"data.source=file:{corpus}", "tokenizer.vocab_size=300"]
    return counts.read(config.load(None, [*overrides, "data.context_length=512"]))


def lines(axes) -> dict[str, list[tuple[float, float]]]:
    """What is drawn by a name of the legend."""
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.get_lines()}


def test_every_picture_is_a_small_png_without_a_date_and_always_the_same(texts):
    for draw in (
        lambda: plots.lengths(texts),
        lambda: plots.packed(PACKED, 32),
        lambda: plots.compressions(CURVES, 2048),
    ):
        png = draw()._repr_png_()
        assert png.startswith(b"\x89PNG")
        assert struct.unpack(">II", png[16:24]) == (960, 340)
        assert len(png) < 100_000
        assert png == draw()._repr_png_()
        assert b"tEXt" not in png


def test_windows_are_drawn_in_percent_at_their_length():
    documents, costs = plots.packed(PACKED, 32).axes
    assert lines(documents)["cut by packing: stream"] == [(16, 80), (32, 40)]
    assert lines(documents)["longer than a window"] == [(16, 40), (32, 10)]
    assert lines(costs)["stream: tokens without their beginning"] == [(16, 50), (32, 30)]
    assert lines(costs)["documents: places that are padding"] == [(16, 6), (32, 1)]
    assert lines(costs)["context length: 32"] == [(32, 0), (32, 1)]


def test_each_kind_of_tokenizer_is_drawn_and_characters_are_named():
    words, rare = plots.compressions(CURVES, 2048).axes
    assert lines(words)["bpe"] == [(1024, 2.1), (2048, 1.7)]
    assert lines(words)["unigram"] == [(1024, 2.2)]
    assert lines(rare)["bpe"] == [(1024, 20), (2048, 30)]
    assert "char: 6.10 (off the scale)" in lines(words)
    assert "char: 6.10 (off the scale)" not in lines(rare)


def test_no_kind_of_tokenizer_is_forgotten():
    found = counts.compressions(["a parser"] * 20, ["a kernel"], vocab_sizes=(520,))
    labels = lines(plots.compressions(found, 520).axes[0]).keys()
    assert {each.kind for each in found} - {"char"} <= labels


def test_bars_hold_every_document_of_a_length(texts):
    characters, tokens = plots.lengths(texts).axes
    for axes, lengths in ((characters, texts.train.characters), (tokens, texts.train.tokens)):
        (outline, _) = axes.patches
        xs, heights = outline.get_xy().T
        for length in set(lengths.tolist()):
            (height,) = {
                h for x, h, after in zip(xs, heights, xs[1:], strict=False) if x < length < after
            }
            inside = (lengths == length).mean()
            assert height == pytest.approx(100 * inside)
    assert "context length: 512 (off the scale)" in lines(tokens)


def test_a_monster_does_not_squeeze_the_others(texts):
    from dataclasses import replace

    long = replace(texts.train, documents=[*texts.train.documents, "x" * 9_000])
    axes, _ = plots.lengths(replace(texts, train=long)).axes
    assert axes.get_xlim()[1] < 4 * counts.spread(long.characters).p99
