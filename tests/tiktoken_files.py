"""A stand-in for the files that tiktoken downloads: the real formats, with merges fitted here.

tiktoken's own code runs on them, from the name of an encoding to its ids: constructors, patterns,
special tokens, cache and parsing. Two things are replaced, as there is no network: what fetches an
address, and the comparison with the checksum of a file that is not here.
"""

import base64
import dataclasses
import json
from collections.abc import Iterable
from itertools import islice, product

import pytest
import tiktoken.load
import tiktoken.registry
from tokenizers import pre_tokenizers

from mainrun import config
from mainrun.data import tokenizers

NUM_RANKS = {"r50k_base": 50_256, "p50k_base": 50_280}  # what their constructors insist on
ENCODINGS = ["gpt2", "r50k_base", "p50k_base", "cl100k_base", "o200k_base"]


@dataclasses.dataclass
class TiktokenFiles:
    """What each address of tiktoken's answers, and the addresses that were asked for."""

    merges: list[tuple[str, str]]
    asked: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, documents: Iterable[str]) -> "TiktokenFiles":
        """Merges of these documents, then pairs of bytes up to GPT-2's 50,000."""
        fitted = json.loads(tokenizers.fit(config.Bpe(vocab_size=700), documents).to_str())
        merges = dict.fromkeys(map(tuple, fitted["model"]["merges"]))
        tokens = {a + b for a, b in merges}
        pairs = (pair for pair in product(_letters(), repeat=2) if "".join(pair) not in tokens)
        return cls([*merges, *islice(pairs, 50_000 - len(merges))])

    def read(self, address: str) -> bytes:
        """The file at the address, in place of `tiktoken.load.read_file`."""
        self.asked.append(address)
        name = address.rpartition("/")[2]
        if name == "vocab.bpe":
            return "\n".join(["#version: 0.2", *map(" ".join, self.merges), ""]).encode()
        tokens = [*_letters(), *(a + b for a, b in self.merges)]
        if name == "encoder.json":
            return json.dumps({token: i for i, token in enumerate(tokens)}).encode()
        encoding = name.removesuffix(".tiktoken")
        size = NUM_RANKS.get(encoding, 1_000)
        extra = ("Ġ" + "".join(pair) for pair in product(_letters(), repeat=2))
        tokens = (tokens + list(islice(extra, max(0, size - len(tokens)))))[:size]
        bytes_of = {letter: byte for byte, letter in enumerate(_letters_of_bytes())}
        lines = []
        for i, token in enumerate(tokens):
            written = base64.b64encode(bytes(bytes_of[letter] for letter in token)).decode()
            # p50k_base leaves 50256 to the end of the text.
            rank = i + (encoding == "p50k_base" and i >= 50_256)
            lines.append(f"{written} {rank}\n")
        return "".join(lines).encode()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Makes tiktoken read from here, as if it had loaded no encoding yet."""
        patch.setattr(tiktoken.registry, "ENCODINGS", {})
        patch.setattr(tiktoken.load, "read_file", self.read)
        patch.setattr(tiktoken.load, "check_hash", lambda data, expected: True)


def _letters() -> list[str]:
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _letters_of_bytes() -> list[str]:
    """Letters in the order of bytes, asked of the library: each byte stands in some character."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = [""] * 256
    for code in [*range(0x800), *range(0x800, 0xD800, 0x40), *range(0x10000, 0x110000, 0x10000)]:
        character = chr(code)
        spelled = byte_level.pre_tokenize_str(character)[0][0]
        for byte, letter in zip(character.encode(), spelled, strict=True):
            letters[byte] = letter
    rest = iter(sorted(set(_letters()) - set(letters)))  # bytes that UTF-8 never has
    return [letter or next(rest) for letter in letters]
