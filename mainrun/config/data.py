"""Settings of the corpus and of the tokenizer."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Count


@dataclass(frozen=True, config=STRICT)
class Data:
    source: Annotated[str, Field(min_length=1)] = "hacker-news"
    field: Annotated[str, Field(min_length=1)] = "title"
    revision: str | None = None
    num_documents: Count | None = 100_000
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.10
    context_length: Annotated[int, Field(ge=2)] = 128
    packing: Literal["stream", "documents"] = "stream"
    mask_documents: bool = False
    order: Literal["sequential", "shuffled"] = "sequential"


@dataclass(frozen=True, config=STRICT)
class Bpe:
    kind: Literal["bpe"] = "bpe"
    vocab_size: Annotated[int, Field(ge=259)] = 16_000  # 256 bytes and three special tokens
    fit_on: Literal["train", "all"] = "train"


@dataclass(frozen=True, config=STRICT)
class Char:
    kind: Literal["char"] = "char"
    fit_on: Literal["train", "all"] = "train"


@dataclass(frozen=True, config=STRICT)
class Unigram:
    kind: Literal["unigram"] = "unigram"
    vocab_size: Annotated[int, Field(ge=259)] = 16_000
    fit_on: Literal["train", "all"] = "train"


@dataclass(frozen=True, config=STRICT)
class WordPiece:
    kind: Literal["wordpiece"] = "wordpiece"
    vocab_size: Annotated[int, Field(ge=515)] = 16_000  # 256 bytes, alone and inside a word
    fit_on: Literal["train", "all"] = "train"


@dataclass(frozen=True, config=STRICT)
class Tiktoken:
    kind: Literal["tiktoken"] = "tiktoken"
    encoding: Annotated[str, Field(min_length=1)] = "gpt2"


Tokenizer = Annotated[Bpe | Unigram | WordPiece | Char | Tiktoken, Field(discriminator="kind")]
