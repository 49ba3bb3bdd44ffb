"""Holds every kind of tokenizer to losslessness, determinism and the three reserved names."""

import dataclasses
import os
import random
import subprocess
import sys
import typing

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from mainrun import config
from mainrun.data import tokenizers
from mainrun.errors import UserError
from tests.tiktoken_files import TiktokenFiles

SENTENCES = [
    "Return the name of the folder.",
    "Show a window that names <eos> and <pad>, then <unk>.",
    "The quick brown fox returns the folder's name.",
    "Ünïcode näme: 東京 🎉",
    " ".join("".join(random.Random(i).choices("aeioumnr", k=6)) for i in range(100)),
] * 5
SEEN = sorted(set("".join(SENTENCES)))
KINDS = typing.get_args(typing.get_args(config.Tokenizer)[0])
RESERVED = ["<pad>", "<eos>", "<unk>"]

laws = settings(max_examples=200, deadline=None, derandomize=True, database=None)


def is_fitted(kind) -> bool:
    """Whether the documents decide the vocabulary, in which our names then come first."""
    return kind is not config.Tiktoken


def knows(kind, text: str) -> str:
    """The text as the kind can represent it: all but characters represent bytes."""
    return "".join(c if c in SEEN else "<unk>" for c in text) if kind is config.Char else text


def small(kind):
    """Settings of this kind for the sentences: enough for more than bytes."""
    has_size = "vocab_size" in {field.name for field in dataclasses.fields(kind)}
    return kind(vocab_size=600) if has_size else kind()


@pytest.fixture(scope="module")
def fitted():
    """A tokenizer of each kind."""
    with pytest.MonkeyPatch.context() as patch:
        TiktokenFiles.of(SENTENCES).install(patch)
        return {kind: tokenizers.fit(small(kind), SENTENCES) for kind in KINDS}


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind().kind)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer(fitted, kind):
    return fitted[kind]


def there_and_back(tokenizer, document):
    return tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, [document])[0])


@given(document=st.text().map(str.strip))
@example(document="")
@example(document="two  spaces   three")
@example(document="<eos>")
@example(document="a <pad><eos> <unk>b")
@example(document="the <pad> of <eos>, <unk>")
@example(document="👩‍👩‍👧 e\u0301 \u200bzero\u200b \ufeffmark \u202eright")
@example(document="漢字かな交じり文 한국어")
@example(document="bell \x07 nul \x00 esc \x1b tab\tline\nend\r\nx\x85y\u2028z")
@example(document="Ġ is the byte alphabet's space, Ċ its newline")
@example(document="x##! ## #a ##a a## ##return")  # BERT's sign for the inside of a word
@example(document="\u2581 is SentencePiece's space")
@example(document="a" * 20_000 + "\u0301" * 101 + "!" * 100)  # words that never end
@laws
def test_any_stripped_text_is_given_back(kind, tokenizer, document):
    assert there_and_back(tokenizer, document) == knows(kind, document)


@given(text=st.text(st.sampled_from(" \t\n\u3000<s>'x") | st.characters(exclude_categories=["Cs"])))
@example(text=" ")
@example(text="   x ")
@example(text="\n x")
@laws
def test_of_other_text_one_space_at_the_beginning_is_lost_at_most(kind, tokenizer, text):
    back = there_and_back(tokenizer, text)
    assert knows(kind, text) in (back, " " + back)


def test_the_reserved_names_have_ids_and_ids_have_no_gap(fitted, subtests: pytest.Subtests):
    for kind, tokenizer in fitted.items():
        with subtests.test(kind=kind().kind):
            ids = [tokenizers.special_id(tokenizer, name) for name in RESERVED]
            assert len(set(ids)) == 3
            if is_fitted(kind):
                assert ids == [0, 1, 2]  # as in every run there is
            size = tokenizer.get_vocab_size()
            assert sorted(tokenizer.get_vocab().values()) == list(range(size))
            assert size >= 600 or kind is config.Char


def test_no_text_has_a_reserved_id(fitted, subtests: pytest.Subtests):
    texts = [*SENTENCES, "<eos>", "x<pad>", "a <unk>", "<|endoftext|>", "nul \x00", "☃" * 300]
    for kind, tokenizer in fitted.items():
        with subtests.test(kind=kind().kind):
            ids = [tokenizers.special_id(tokenizer, name) for name in RESERVED]
            found = np.concatenate(tokenizers.encode(tokenizer, texts))
            unknown = kind is config.Char  # the only one to which something is
            assert not np.isin(found, ids[:2]).any()
            assert np.isin(found, ids[2]).any() == unknown
            assert found.max() < tokenizer.get_vocab_size()


def test_decoding_leaves_out_pad_and_eos_and_shows_unk(fitted, subtests: pytest.Subtests):
    for kind, tokenizer in fitted.items():
        with subtests.test(kind=kind().kind):
            pad, eos, unk = (tokenizers.special_id(tokenizer, name) for name in RESERVED)
            ids = tokenizers.encode(tokenizer, ["the fox"])[0].tolist()
            assert tokenizers.decode(tokenizer, [eos, *ids, eos, pad, pad]) == "the fox"
            assert tokenizers.decode(tokenizer, [*ids, unk]) == "the fox<unk>"
            assert tokenizers.decode(tokenizer, []) == ""
            # A model's vocabulary may be padded to more than the tokenizer's.
            assert tokenizers.decode(tokenizer, [*ids, tokenizer.get_vocab_size() + 5]) == "the fox"


def test_bytes_that_are_not_utf8_become_replacement_characters(fitted, subtests: pytest.Subtests):
    for kind, tokenizer in fitted.items():
        with subtests.test(kind=kind().kind):
            if kind is not config.Char:
                half_an_emoji = tokenizers.encode(tokenizer, ["🙈"])[0][:-1]
                assert "\ufffd" in tokenizers.decode(tokenizer, half_an_emoji)


def test_saved_and_loaded_it_encodes_and_decodes_the_same(
    fitted, tmp_path, subtests: pytest.Subtests
):
    first, again = tmp_path / "tokenizer.json", tmp_path / "again.json"
    texts = [*SENTENCES, "never <eos> seen: ☃", "日本", "x##!", "a" * 300]
    for kind, tokenizer in fitted.items():
        with subtests.test(kind=kind().kind):
            tokenizers.save(tokenizer, first)
            loaded = tokenizers.load(first)
            tokenizers.save(loaded, again)
            assert again.read_bytes() == first.read_bytes()
            for before, after in zip(
                tokenizers.encode(tokenizer, texts), tokenizers.encode(loaded, texts), strict=True
            ):
                np.testing.assert_array_equal(before, after)
                assert tokenizers.decode(loaded, after) == tokenizers.decode(tokenizer, before)
            for name in RESERVED:
                assert tokenizers.special_id(loaded, name) == tokenizers.special_id(tokenizer, name)


def test_the_order_of_documents_means_nothing(fitted, subtests: pytest.Subtests):
    for kind, tokenizer in fitted.items():
        with subtests.test(kind=kind().kind):
            with pytest.MonkeyPatch.context() as patch:
                TiktokenFiles.of(SENTENCES).install(patch)
                again = tokenizers.fit(small(kind), (text for text in reversed(SENTENCES)))
            assert again.to_str() == tokenizer.to_str()


def test_the_vocabulary_is_as_large_as_asked_for_where_the_documents_allow_it(kind):
    if "vocab_size" not in {field.name for field in dataclasses.fields(kind)}:
        return
    with pytest.raises(ValidationError) as refused:
        kind(vocab_size=1)
    smallest = refused.value.errors()[0]["ctx"]["ge"]
    for size in (smallest, 550, 600):
        assert tokenizers.fit(kind(vocab_size=size), SENTENCES).get_vocab_size() == size
    for documents in ([], [""], ["a"], SENTENCES[:2]):
        size = tokenizers.fit(kind(), documents).get_vocab_size()
        assert smallest <= size < 2_000


@given(document=st.text().map(str.strip))
@example(document="\n\n")
@example(document="e\u0301\r\n\u2028")
@laws
def test_char_has_one_token_a_character_and_unk_for_the_unseen(document):
    expected = [SEEN.index(c) + 3 if c in SEEN else 2 for c in document]
    assert tokenizers.encode(CHAR, [document])[0].tolist() == expected
    assert CHAR.get_vocab_size() == 3 + len(SEEN)


CHAR = tokenizers.fit(config.Char(), SENTENCES)


def test_word_piece_spells_every_byte_at_a_words_beginning_and_inside():
    tokenizer = tokenizers.fit(config.WordPiece(vocab_size=515), SENTENCES)
    tokens = set(tokenizer.get_vocab()) - set(RESERVED)
    inside = {token.removeprefix(" ##") for token in tokens if token.startswith(" ##")}
    assert len(inside) == 256
    assert tokens == inside | {" ##" + letter for letter in inside}
    assert tokenizer.encode("x##!").tokens == ["Ġ", " ##x", "#", " ###", " ##!"]


FIT_AND_PRINT = """
import hashlib, random
from mainrun import config
from mainrun.data import tokenizers
words = ["".join(random.Random(i).choices("abcdefgh", k=4)) for i in range(4000)]
for kind in (config.Bpe, config.Unigram, config.WordPiece):
    settings = kind(vocab_size=1500)
    text = tokenizers.fit(settings, words).to_str()
    print(hashlib.sha256(text.encode()).hexdigest())
"""


def test_fitting_gives_the_same_bytes_on_any_number_of_threads():
    # Words of equal frequency: nearly every merge is a tie.
    outputs = {
        subprocess.run(
            [sys.executable, "-c", FIT_AND_PRINT],
            env=os.environ
            | {
                "TOKENIZERS_PARALLELISM": "true",
                "RAYON_NUM_THREADS": str(threads),
                "PYTHONHASHSEED": str(threads),
            },
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        for threads in (1, 2, 7)
    }
    assert len(outputs) == 1


ENCODE_AND_FORK = """
import os, signal
from mainrun import config
from mainrun.data import tokenizers
tokenizer = tokenizers.fit(config.Bpe(vocab_size=300), ["some text"] * 1000)
tokenizers.encode(tokenizer, ["text"] * 1000)
if os.fork() == 0:
    signal.alarm(20)
    tokenizers.encode(tokenizer, ["text"] * 1000)
    os._exit(0)
raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))
"""


def test_a_forked_process_encodes_too_and_no_warning_is_printed():
    environment = {k: v for k, v in os.environ.items() if k != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ENCODE_AND_FORK],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(tmp_path, subtests: pytest.Subtests):
    cases = [
        b"",
        b"{}",
        b"not json",
        b"\xff\xfe",
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
        b'{"model": {"type": "BPE", "vocab": {"<pad>": 0, "<unk>": 1}, "merges": []}}',
    ]
    for content in cases:
        with subtests.test(content=content):
            path = tmp_path / "tokenizer.json"
            path.write_bytes(content)
            with pytest.raises(UserError, match="tokenizer") as error:
                tokenizers.load(path)
            assert str(path) in str(error.value)
            assert "\n" not in str(error.value)


def test_a_missing_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the tokenizer \(No such file"):
        tokenizers.load(tmp_path / "tokenizer.json")
