"""How many tokens a run's vocabulary will have, before any text of its corpus has been read."""

from pathlib import Path
from typing import NamedTuple, assert_never

from mainrun import config as configs
from mainrun.config import Config
from mainrun.data import tokenizers
from mainrun.data.tokenizers import PAD, UNK

_CHARACTERS = 256
"""What a corpus of characters is taken to have: English titles have some 100 to 400."""

_TIKTOKEN = {
    "gpt2": 50_257,
    "r50k_base": 50_257,
    "p50k_base": 50_281,
    "p50k_edit": 50_284,
    "cl100k_base": 100_277,
    "o200k_base": 200_019,
    "o200k_harmony": 201_088,
}
"""Ids of tiktoken's encodings (0.13), which otherwise only their ranks tell, from the network."""


class Vocabulary(NamedTuple):
    size: int
    reason: str  # why it is taken to be so large


def expected(config: Config) -> Vocabulary:
    """The vocabulary of these settings, as far as they say. Raises UserError as loading does."""
    base = config.training.init_from
    if base is not None and (path := Path(base) / "tokenizer.json").is_file():
        return Vocabulary(tokenizers.load(path).get_vocab_size(), f"that of {base}")
    match config.tokenizer:
        case configs.Bpe(vocab_size=size) | configs.Unigram(vocab_size=size):
            return Vocabulary(size, _AT_MOST)
        case configs.WordPiece(vocab_size=size):
            return Vocabulary(size, _AT_MOST)
        case configs.Char():
            why = "assumed: one for each character of the corpus; --vocab-size says it"
            return Vocabulary(_CHARACTERS, why)
        case configs.Tiktoken(encoding=name):
            if name in _TIKTOKEN:
                size = _TIKTOKEN[name] + len([PAD, UNK])
                return Vocabulary(size, f"that of {name}, {PAD} and {UNK}")
            # Tells what there is, where there is no such encoding.
            size = tokenizers.fit(config.tokenizer, []).get_vocab_size()
            return Vocabulary(size, f"that of {name}, {PAD} and {UNK}")
        case _:
            assert_never(config.tokenizer)


_AT_MOST = "what tokenizer.vocab_size asks for; a small corpus has fewer"
