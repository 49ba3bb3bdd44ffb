"""Holds the tokenizers to losslessness, determinism and the three reserved ids."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mainrun import config
from mainrun.data import tokenizers
from mainrun.errors import UserError

SENTENCES = [
    "Return the name of the folder.",
    "Show a window that names <eos> and <pad>, then <unk>.",
    "The quick brown fox returns the folder's name.",
    "Ünïcode näme: 東京 🎉",
] * 5
BPE = tokenizers.fit(config.Bpe(vocab_size=300), SENTENCES)
CHAR = tokenizers.fit(config.Char(), SENTENCES)
BOTH = pytest.mark.parametrize("tokenizer", [BPE, CHAR], ids=["bpe", "char"])

laws = settings(max_examples=300, deadline=None, derandomize=True, database=None)
any_document = st.text().map(str.strip)


def there_and_back(tokenizer, document):
    return tokenizers.decode(tokenizer, tokenizers.encode(tokenizer, [document])[0])


@given(any_document)
@example("")
@example("two  spaces   three")
@example("<eos>")
@example("a <pad><eos> <unk>b")
@example("👩‍👩‍👧 e\u0301 \u200bzero\u200b \ufeffmark \u202eright")
@example("漢字かな交じり文 한국어")
@example("bell \x07 nul \x00 esc \x1b tab\tline\nend\r\nx\x85y\u2028z")
@example("Ġ is the byte alphabet's space, Ċ its newline")
@laws
def test_bpe_gives_back_any_stripped_text(document):
    assert there_and_back(BPE, document) == document


@given(st.text(sorted(set("".join(SENTENCES)))).map(str.strip))
@laws
def test_char_gives_back_any_text_of_seen_characters(document):
    assert there_and_back(CHAR, document) == document


@given(any_document)
@example("\n\n")
@example("e\u0301\r\n\u2028")
@laws
def test_char_has_one_token_a_character_and_unk_for_the_unseen(document):
    seen = sorted(set("".join(SENTENCES)))
    expected = [seen.index(c) + 3 if c in seen else tokenizers.UNK_ID for c in document]
    assert tokenizers.encode(CHAR, [document])[0].tolist() == expected


@BOTH
def test_reserved_ids_are_0_1_2_and_no_text_has_pad_or_eos(tokenizer):
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "<eos>", "<unk>")] == [0, 1, 2]
    for ids in tokenizers.encode(tokenizer, [*SENTENCES, "<eos>", "x<pad>", "a <unk>"]):
        assert not np.isin(ids, [0, 1]).any()


@BOTH
def test_decoding_leaves_out_pad_and_eos_and_shows_unk(tokenizer):
    ids = tokenizers.encode(tokenizer, ["the fox"])[0].tolist()
    assert tokenizers.decode(tokenizer, [*ids, 1, 0, 0]) == "the fox"
    assert tokenizers.decode(tokenizer, [*ids, 2]) == "the fox<unk>"
    assert tokenizers.decode(tokenizer, []) == ""


def test_bytes_that_are_not_utf8_become_replacement_characters():
    half_an_emoji = tokenizers.encode(BPE, ["🙈"])[0][:-1]
    assert "\ufffd" in tokenizers.decode(BPE, half_an_emoji)


@BOTH
def test_saved_and_loaded_it_encodes_and_decodes_the_same(tokenizer, tmp_path):
    tokenizers.save(tokenizer, tmp_path / "tokenizer.json")
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    tokenizers.save(loaded, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "tokenizer.json").read_bytes()
    texts = [*SENTENCES, "never <eos> seen: ☃", "日本"]
    for before, after in zip(
        tokenizers.encode(tokenizer, texts), tokenizers.encode(loaded, texts), strict=True
    ):
        np.testing.assert_array_equal(before, after)
        assert tokenizers.decode(loaded, after) == tokenizers.decode(tokenizer, before)


def test_a_vocabulary_may_be_smaller_than_asked_for():
    few = tokenizers.fit(config.Bpe(vocab_size=16_000), SENTENCES)
    assert 259 < few.get_vocab_size() < 500
    assert tokenizers.fit(config.Bpe(vocab_size=259), SENTENCES).get_vocab_size() == 259
    assert CHAR.get_vocab_size() == 3 + len(set("".join(SENTENCES)))


FIT_AND_PRINT = """
import hashlib, random
from mainrun import config
from mainrun.data import tokenizers
words = ["".join(random.Random(i).choices("abcdefgh", k=4)) for i in range(4000)]
for settings in (config.Bpe(vocab_size=1500), config.Char()):
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


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"not json",
        b"\xff\xfe",
        b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="tokenizer") as error:
        tokenizers.load(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_tokenizer_is_refused_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"cannot read the tokenizer \(No such file"):
        tokenizers.load(tmp_path / "tokenizer.json")
