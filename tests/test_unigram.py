"""Holds the unigram pieces to brute force over all segmentations, and to the library's trainer."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mainrun import config
from mainrun.data import python_docs, tokenizers, unigram

laws = settings(max_examples=30, deadline=None, derandomize=True, database=None)
words_of_abc = st.dictionaries(
    st.text("abc", min_size=1, max_size=6), st.integers(1, 9), max_size=5
)


def segmentations(word: str, pieces: set[str]) -> list[list[str]]:
    """Every way to write the word in these pieces."""
    if not word:
        return [[]]
    heads = [word[:n] for n in range(1, len(word) + 1) if word[:n] in pieces]
    return [[head, *rest] for head in heads for rest in segmentations(word[len(head) :], pieces)]


def likelihood(word: str, probabilities: dict[str, float]) -> float:
    return sum(
        math.prod(probabilities[piece] for piece in pieces)
        for pieces in segmentations(word, set(probabilities))
    )


def some_probabilities(pieces: list[str]) -> dict[str, float]:
    raw = np.random.default_rng(0).uniform(0.1, 1, len(pieces))
    return dict(zip(pieces, raw / raw.sum(), strict=True))


@given(words_of_abc)
@laws
def test_seeds_are_the_letters_and_every_repeated_substring(words):
    pieces, _ = unigram._seeds(words, list("abc"))
    counts = Counter()
    for word, count in words.items():
        for a, b in itertools.combinations(range(len(word) + 1), 2):
            counts[word[a:b]] += count
    repeated = {piece for piece, count in counts.items() if count >= 2}
    assert sorted(pieces) == sorted(repeated | set("abc"))


@given(words_of_abc)
@laws
def test_expected_counts_are_the_mean_over_all_segmentations(words):
    pieces, lattice = unigram._seeds(words, list("abc"))
    probabilities = some_probabilities(pieces)
    logs = np.log(np.array(list(probabilities.values())))
    expected, _ = unigram._expectation(lattice, logs)
    means = Counter()
    for word, count in words.items():
        for pieces_of_word in segmentations(word, set(pieces)):
            share = math.prod(probabilities[piece] for piece in pieces_of_word)
            for piece in pieces_of_word:
                means[piece] += count * share / likelihood(word, probabilities)
    np.testing.assert_allclose(expected, [means[piece] for piece in pieces], rtol=1e-9)


@given(st.dictionaries(st.permutations("abcde").map("".join), st.integers(1, 9), max_size=3))
@laws
def test_the_loss_is_what_the_words_lose_without_the_piece(words):
    # Words without a repeated letter: none has a piece twice, and then it is exact.
    pieces, lattice = unigram._seeds(words, list("abcde"))
    probabilities = some_probabilities(pieces)
    _, losses = unigram._expectation(lattice, np.log(np.array(list(probabilities.values()))))
    for piece, loss in zip(pieces, losses, strict=True):
        if len(piece) > 1:
            without = {p: x for p, x in probabilities.items() if p != piece}
            lost = sum(
                count * math.log(likelihood(word, probabilities) / likelihood(word, without))
                for word, count in words.items()
            )
            assert loss == pytest.approx(lost, rel=1e-6, abs=1e-12)


@given(words_of_abc, st.integers(3, 12))
@laws
def test_a_vocabulary_has_all_letters_the_size_asked_for_and_likeliest_first(words, size):
    pieces = unigram.fit(words, "cabd", size)
    names, logs = [p for p, _ in pieces], [x for _, x in pieces]
    assert set("abcd") <= set(names)
    assert len(set(names)) == len(names)
    assert len(names) == max(4, min(size, len(unigram._seeds(words, list("abcd"))[0])))
    assert logs == sorted(logs, reverse=True)
    assert sum(map(math.exp, logs)) == pytest.approx(1, abs=1e-4)  # six decimals
    assert unigram.fit(dict(reversed(words.items())), "cabd", size) == pieces


def test_a_frequent_word_that_shares_nothing_with_others_is_a_piece():
    words = {"harbor": 500, "ab": 3, "abc": 2, "bcd": 2}
    assert unigram.fit(words, "abcdhor", 8)[0][0] == "harbor"


def test_real_sentences_take_no_more_tokens_than_with_the_librarys_trainer():
    sentences = python_docs.read()[:1_000]
    settings = config.Unigram(vocab_size=1_000)
    ours = tokenizers.fit(settings, sentences)
    theirs = Tokenizer(models.Unigram())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.UnigramTrainer(
        vocab_size=settings.vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<pad>", "<eos>", "<unk>"],
        unk_token="<unk>",
        show_progress=False,
    )
    theirs.train_from_iterator(sentences, trainer)
    tokens = [
        sum(len(found.ids) for found in tokenizer.encode_batch_fast(sentences))
        for tokenizer in (ours, theirs)
    ]
    assert ours.get_vocab_size() == theirs.get_vocab_size() == 1_000
    assert 0.8 < tokens[0] / tokens[1] < 1.0, tokens
