"""Holds a corpus's tables to its numbers, to documents that stay data, and to true conclusions."""

import dataclasses
import re

import pytest

from mainrun import config
from mainrun.analysis import corpus as counts
from mainrun.analysis import corpus_tables as tables
from mainrun.analysis.corpus import Compression, Overlap, Packed, Repetition

NASTY = "a | b <script>alert(1)</script> *bold* [link](http://x.y) $x$ `code`"


@pytest.fixture(scope="module")
def texts(corpus):
    """300 sentences by a tokenizer of 300 tokens."""
    overrides = [f"data.source=file:{corpus}", "tokenizer.vocab_size=300"]
    return counts.read(config.load(None, [*overrides, "data.context_length=64"]))


def cells(page: str) -> list[list[str]]:
    """The rows of a table below its header."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in page.splitlines()]
    assert len({len(row) for row in rows}) == 1, "rows of different lengths"
    return [[cell.strip() for cell in row] for row in rows[2:]]


def test_a_notebook_shows_a_page_as_markdown_and_a_console_as_it_stands():
    page = tables.repetitions({"exact": Repetition(1, 2, 3, 0.5)})
    assert page._repr_markdown_() == str(page) == repr(page)
    assert page.startswith("| the same |")


def test_tables_show_what_was_counted():
    overlap = Overlap(7_832, 2_003, 8_329, 497, 96, 1_000)
    assert cells(tables.overlaps({"words": overlap})) == [
        ["words", "7,832", "2,003", "8,329", "497", "9.6 %"]
    ]
    assert cells(tables.repetitions({"exact": Repetition(4, 0, 1, 0.25)})) == [
        ["exact", "4", "0", "1 (25.0 %)"]
    ]
    assert cells(tables.packed([Packed(16, 0.5, 0.25, 0.125, 0.0)])) == [
        ["16", "50.0 %", "25.0 %", "12.5 %", "0.0 %"]
    ]
    assert cells(tables.compressions([Compression("bpe", 1_024, 2.128, 2.854, 0.21)])) == [
        ["bpe", "1,024", "2.13", "2.85", "21.0 %"]
    ]


def test_lengths_and_longest_documents_are_the_corpus_own(texts):
    rows = {row[0]: row[1:] for row in cells(tables.lengths(texts))}
    spread = counts.spread(texts.validation.tokens)
    assert rows["tokens, validation"] == [
        f"{spread.mean:.1f}", *map(str, (spread.median, spread.p95, spread.p99, spread.longest))
    ]  # fmt: skip
    for row in cells(tables.longest(texts)):
        unit, split = row[0].split(", ")
        documents = {"training": texts.train, "validation": texts.validation}[split].documents
        assert documents[int(row[3])] == row[4]
        if unit == "characters":
            assert int(row[1]) == max(map(len, documents))


def test_the_source_says_what_was_read_and_how(texts):
    rows = dict(cells(tables.source(texts)))
    assert rows["for training"] == "270"
    assert rows["for validation"] == "30"
    assert rows["tokenizer"] == "bpe, 300 tokens, fitted on training"
    assert rows["`data.context_length`"] == "64 tokens"
    assert texts.fingerprint.startswith(rows["fingerprint (SHA-256)"])


def test_the_source_says_what_the_tokenizer_has_seen(texts):
    for tokenizer, said in (
        (config.Unigram(fit_on="all"), "unigram, 300 tokens, fitted on both"),
        (config.Tiktoken(encoding="gpt2"), "tiktoken, 300 tokens, gpt2, not fitted here"),
    ):
        settings = dataclasses.replace(texts.settings, tokenizer=tokenizer)
        rows = dict(cells(tables.source(dataclasses.replace(texts, settings=settings))))
        assert rows["tokenizer"] == said


def test_documents_never_become_markup():
    (row,) = cells(tables.leaks([(NASTY, NASTY + "x" * 1_000)]))
    assert re.sub(r"\\(.)", r"\1", row[0]) == NASTY
    assert not re.search(r"(?<!\\)[<*\[$`]", row[0])
    assert row[1].endswith("…")


def test_only_the_first_leaks_are_shown_and_none_is_said():
    assert len(cells(tables.leaks([("a", "a")] * 9, count=2))) == 2
    assert tables.leaks([]) == "No validation document is in training."


# --- conclusions

NO_COPY = Repetition(0, 0, 0, 0.0)


def sentences(texts, curve=(), known=NO_COPY):
    page = tables.conclusions(texts, counts.packed(texts), curve, known)
    found = re.findall(r"^- \*\*(.*?)\.\*\* (.*)$", page, re.MULTILINE)
    assert len(found) == len(page.splitlines()) == 4
    return dict(found)


def test_conclusions_on_windows_name_the_runs_context_length_and_the_smallest_that_does(texts):
    lengths = texts.train.tokens
    said = sentences(texts)
    smallest = counts.whole_in(lengths)
    assert f"{smallest} is the smallest power of two that holds 99 %" in said["Context length"]
    assert f"the longest {lengths.max()}" in said["Context length"]
    (found,) = counts.packed(texts, [64])
    assert said["Packing"].startswith(
        f"At 64 tokens `packing: stream` cuts {100 * found.cut:.1f} %"
    )


def test_the_share_that_a_context_holds_counts_the_end_of_each_document(texts):
    longest = int(texts.train.tokens.max())
    for context_length, whole in ((longest, False), (longest + 1, True)):
        data = dataclasses.replace(texts.settings.data, context_length=context_length)
        settings = dataclasses.replace(texts.settings, data=data)
        said = sentences(dataclasses.replace(texts, settings=settings))["Context length"]
        assert (f"`data.context_length={context_length}` holds 100.0 %" in said) is whole


def curve(*rare):
    points = [(1_024 * 2**i, share) for i, share in enumerate(rare)]
    return [Compression("bpe", size, 2 - 0.1 * i, 1.0, share) for i, (size, share) in
            enumerate(points)]  # fmt: skip


def test_conclusion_on_vocabulary_weighs_the_next_size(texts):
    said = sentences(texts, curve(0.1, 0.4, 0.8))["Vocabulary"]
    assert "2,048 is the largest of the sizes above" in said
    assert "4,096 would save 5.3 % of the tokens and show 80.0 %" in said  # 1.9 to 1.8


def test_conclusion_on_vocabulary_names_no_size_where_there_is_none_to_choose(
    texts, subtests: pytest.Subtests
):
    for rare in [(), (0.1,), (0.8, 0.9)]:
        with subtests.test(rare=rare):
            said = sentences(texts, curve(*rare))["Vocabulary"]
            assert "bpe with 300 tokens" in said
            assert "largest" not in said


def test_conclusion_on_vocabulary_ends_where_no_size_is_larger(texts):
    said = sentences(texts, curve(0.1, 0.2))["Vocabulary"]
    assert said.endswith("2,048 is the largest of the sizes above of which it shows at least half "
                         "more often.")  # fmt: skip


def test_conclusion_on_leakage(texts):
    assert sentences(texts)["Leakage"].startswith("No validation document is in training")
    said = sentences(texts, known=Repetition(0, 0, 21, 0.0053))["Leakage"]
    assert "training has 0.5 % of the validation documents (21)" in said
