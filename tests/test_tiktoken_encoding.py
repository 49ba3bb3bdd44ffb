"""Holds the converted encodings to tiktoken's own ids, and its files to our cache folder."""

import hashlib
import os
from collections.abc import Iterator

import numpy as np
import pytest
import tiktoken.load
import tiktoken.registry
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mainrun import config
from mainrun.data import cache, tiktoken_encoding, tokenizers
from mainrun.errors import UserError
from tests.tiktoken_files import ENCODINGS, TiktokenFiles

SENTENCES = [
    "Return the name of the folder, and the folder's names: 12345 of them.",
    "Show THE HEADER's 3rd window\n\tthat returns   several spaces.",
    "Ünïcode näme: 東京 🎉 e\u0301",
]
READ_FILE, CHECK_HASH = tiktoken.load.read_file, tiktoken.load.check_hash
laws = settings(max_examples=150, deadline=None, derandomize=True, database=None)
# What the patterns treat apart, beside any text.
pieces = st.sampled_from(
    ["'s", "'S", "'ll", "'ſ", "’s", "1234567", "²½", "  ", " \n ", "\r\n", "\t", "\x85", "\u3000",
     "/", "#!", "<|endoftext|>", "<eos>", "<pad>", "The", "folder", "Ǆ", "\u0301", "東", "🎉", "İ"]
)  # fmt: skip
texts = st.lists(pieces | st.text(max_size=6), max_size=8).map("".join)


@pytest.fixture(scope="module")
def files() -> Iterator[TiktokenFiles]:
    found = TiktokenFiles.of(SENTENCES * 3)
    with pytest.MonkeyPatch.context() as patch:
        found.install(patch)
        yield found


# r50k_base has gpt2's pattern and p50k_base's format.
@pytest.fixture(scope="module", params=[name for name in ENCODINGS if name != "r50k_base"])
def both(request, files):
    """tiktoken's encoding of this name and our tokenizer of it."""
    tokenizer = tokenizers.fit(config.Tiktoken(encoding=request.param), SENTENCES)
    return tiktoken.get_encoding(request.param), tokenizer


@given(text=texts)
@example(text="")
@example(text=" ")
@example(text="a  b   \n\n  c \n")
@example(text="x" * 500 + " " * 300)
@example(text="AAAaaaÀÉé'LLb'Vec ȺȾ")
@laws
def test_ids_are_tiktokens_own_and_give_back_any_text(both, text):
    encoding, tokenizer = both
    [ids] = tokenizers.encode(tokenizer, [text])
    assert ids.tolist() == encoding.encode_ordinary(text)
    assert tokenizers.decode(tokenizer, ids) == text


def test_ids_are_tiktokens_own_on_real_titles(both, hn_titles):
    encoding, tokenizer = both
    titles = hn_titles.read_text(encoding="utf-8").splitlines()[:2_000]
    ids = [ids.tolist() for ids in tokenizers.encode(tokenizer, titles)]
    assert ids == encoding.encode_ordinary_batch(titles)


def test_every_id_keeps_its_token_and_ours_come_after_the_last(both):
    encoding, tokenizer = both
    assert tokenizers.special_id(tokenizer, tokenizers.EOS) == encoding.eot_token
    size = encoding.n_vocab  # the highest id and one
    assert [tokenizer.token_to_id(name) for name in ("<pad>", "<unk>")] == [size, size + 1]
    assert tokenizer.get_vocab_size() == size + 2
    for i in [*range(0, 2_000, 7), *range(50_000, 50_256, 5)]:
        try:
            token = encoding.decode_single_token_bytes(i)
        except KeyError:  # an id without a token
            assert tokenizer.id_to_token(i) == f"<unused {i}>"
        else:
            assert tokenizers.decode(tokenizer, [i]) == token.decode(errors="replace")


def test_the_known_encodings_have_their_published_end_of_text(files):
    ends = {name: tiktoken.get_encoding(name).eot_token for name in ENCODINGS}
    assert ends == {
        "gpt2": 50256, "r50k_base": 50256, "p50k_base": 50256, "cl100k_base": 100257,
        "o200k_base": 199999,
    }  # fmt: skip


A_OR_B = st.text("ab", min_size=2, max_size=6)


@given(
    tokens=st.lists(A_OR_B, unique=True, max_size=12),
    words=st.lists(st.text("ab", max_size=30), min_size=1, max_size=9),
)
@example(tokens=["aa", "aaa"], words=["aaaaa", "aaaaaaa"])  # two pairs that make aaa
@example(tokens=["aab", "aa"], words=["aaba"])  # aa comes before aab, but is joined before it
@example(tokens=["aba"], words=["aba", "abab"])  # no two parts make it: only a whole word is one
@example(tokens=["abab", "ba", "ab"], words=["abab", "xabab", "aabab"])
@settings(laws, max_examples=60)
def test_any_ranks_give_tiktokens_ids(tokens, words):
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token.encode(): 256 + i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "any", pat_str=r"\w+|\W+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 300}
    )
    tokenizer = tiktoken_encoding.convert(encoding, [], eos="<eos>", others=["<pad>"])
    for word in words:
        assert tokenizer.encode(word).ids == encoding.encode_ordinary(word)


def stand_in(**changes) -> tiktoken.Encoding:
    plain = {
        "pat_str": r"\w+|\W+",
        "mergeable_ranks": {bytes([byte]): byte for byte in range(256)},
        "special_tokens": {"<|endoftext|>": 256},
    }
    return tiktoken.Encoding("stand-in", **(plain | changes))


def test_an_encoding_that_cannot_be_converted_is_refused(subtests: pytest.Subtests):
    cases = [
        ({"special_tokens": {"<|end|>": 256}}, "it has no token <|endoftext|>"),
        # The library takes a whole word from its vocabulary, in which <eos> and <pad> are.
        ({"pat_str": r"\S+|\s+"}, "cannot be written"),
        ({"special_tokens": {"<|endoftext|>": 256, "<pad>": 257}}, "cannot be written"),
        # Oniguruma's possessive interval is none.
        ({"pat_str": r"(?:a{1,2}+)a|[^a]+|a", "mergeable_ranks": {
            **{bytes([byte]): byte for byte in range(256)}, b"aa": 257, b"aaa": 258}},
         "cannot be written"),
    ]  # fmt: skip
    for changes, reason in cases:
        with subtests.test(changes=changes, reason=reason):
            with pytest.raises(UserError, match=r"tokenizer\.encoding=stand-in: ") as error:
                tiktoken_encoding.convert(
                    stand_in(**changes), ["aaaa"], eos="<eos>", others=["<pad>"]
                )
            assert reason in str(error.value)


def test_an_unknown_encoding_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"tokenizer\.encoding=gpt-2 is none") as error:
        tokenizers.fit(config.Tiktoken(encoding="gpt-2"), [])
    assert "gpt2" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """tiktoken without a network and without files; the cache folder it is then given."""
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    monkeypatch.setattr(tiktoken.load, "read_file", READ_FILE)
    monkeypatch.setattr(tiktoken.load, "check_hash", CHECK_HASH)
    monkeypatch.setenv("MAINRUN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTPS_PROXY", "https_proxy"):  # the discard port: nobody answers
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path / "cache" / "tiktoken"


def test_a_failed_download_ends_in_one_line_with_the_remedies(no_network):
    with pytest.raises(UserError, match=r"tokenizer\.encoding=cl100k_base") as error:
        tokenizers.fit(config.Tiktoken(encoding="cl100k_base"), SENTENCES)
    message = str(error.value)
    assert "\n" not in message
    for part in ("cl100k_base.tiktoken", str(no_network), "TIKTOKEN_CACHE_DIR", "tokenizer.kind"):
        assert part in message
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


def test_a_file_with_another_checksum_is_refused(no_network, files, monkeypatch):
    monkeypatch.setattr(tiktoken.load, "read_file", files.read)
    with pytest.raises(UserError, match="Hash mismatch"):
        tokenizers.fit(config.Tiktoken(encoding="gpt2"), SENTENCES)
    assert not any(no_network.glob("*"))


@pytest.mark.parametrize("variable", [None, "TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"])
def test_ranks_are_fetched_once_into_our_cache_or_the_users_own(
    variable, no_network, files, monkeypatch, tmp_path
):
    files.install(monkeypatch)
    folder = no_network
    if variable:
        folder = tmp_path / "mine"
        monkeypatch.setenv(variable, str(folder))
    files.asked.clear()
    for _ in range(2):
        monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})  # as in a new process
        tiktoken_encoding.load("o200k_base")
    [address] = files.asked
    assert [p.name for p in folder.iterdir()] == [hashlib.sha1(address.encode()).hexdigest()]
    assert cache.folder() == tmp_path / "cache"


PLUGIN = """
from tiktoken.load import load_tiktoken_bpe

def house():
    return {{
        "name": "house",
        "pat_str": r"\\w+|\\W+",
        "mergeable_ranks": load_tiktoken_bpe("{address}", expected_hash="{digest}"),
        "special_tokens": {{"<|endoftext|>": 1000}},
    }}

ENCODING_CONSTRUCTORS = {{"house": house}}
"""


def test_a_plugins_encoding_is_read_from_the_cache_with_its_checksum(
    no_network, files, monkeypatch, tmp_path
):
    address = "https://files.invalid/house.tiktoken"
    body = files.read(address)
    no_network.mkdir(parents=True)
    (no_network / hashlib.sha1(address.encode()).hexdigest()).write_bytes(body)
    plugin = tmp_path / "site" / "tiktoken_ext" / "house_encodings.py"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(PLUGIN.format(address=address, digest=hashlib.sha256(body).hexdigest()))
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(tiktoken.registry, "ENCODING_CONSTRUCTORS", None)
    tiktoken.registry._available_plugin_modules.cache_clear()
    try:
        tokenizer = tokenizers.fit(config.Tiktoken(encoding="house"), SENTENCES)
    finally:
        tiktoken.registry._available_plugin_modules.cache_clear()
    expected = tiktoken.get_encoding("house").encode_ordinary_batch(SENTENCES)
    for ids, theirs in zip(tokenizers.encode(tokenizer, SENTENCES), expected, strict=True):
        np.testing.assert_array_equal(ids, theirs)
