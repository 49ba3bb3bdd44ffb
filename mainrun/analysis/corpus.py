"""What a corpus is like: lengths, words, repetitions; what windows and vocabularies make of it.

All documents of both splits are counted, none is sampled; the splits and the tokenizer are those of
a run with the same settings. A character is a Unicode code point, a word what stands between white
space, a token never `<eos>` unless that is said. Nothing here draws or formats: `corpus_tables` and
`corpus_plots` do.
"""

import platform
import unicodedata
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Int, Int32
from tokenizers import Tokenizer

from mainrun import config, parts
from mainrun.data import batches, sources, tokenizers

CONTEXT_LENGTHS = (16, 32, 64, 128, 256, 512)  # tokens
VOCAB_SIZES = (1024, 2048, 4096, 8192, 16_384, 32_768)
RARE = 10  # a token that training shows fewer times than this

Lengths = Int[np.ndarray, "_"]  # of as many documents as there are
Key = Callable[[str], str]


@dataclass(frozen=True, eq=False)
class Split:
    """Documents and their token ids, without <eos>."""

    documents: list[str]
    ids: list[Int32[np.ndarray, "_"]]

    @property
    def characters(self) -> Lengths:
        return np.array([len(document) for document in self.documents], np.int64)

    @property
    def tokens(self) -> Lengths:
        return np.array([len(ids) for ids in self.ids], np.int64)


@dataclass(frozen=True, eq=False)
class Corpus:
    """Both splits, the tokenizer of the run, and where the documents are from."""

    settings: config.Config
    origin: str
    fingerprint: str
    tokenizer: Tokenizer
    train: Split
    validation: Split


@dataclass(frozen=True)
class Spread:
    """Of lengths: each a number of characters or of tokens."""

    mean: float
    median: int
    p95: int
    p99: int
    longest: int


@dataclass(frozen=True)
class Long:
    """A document of a split, and how long it is."""

    index: int
    characters: int
    tokens: int
    document: str


@dataclass(frozen=True)
class Overlap:
    """Different words or tokens in the splits; `combined` is how many there are in either."""

    train: int
    validation: int
    combined: int
    unseen: int  # in validation, never in training
    unseen_occurrences: int  # of those, counting each time
    occurrences: int  # of all in validation

    @property
    def unseen_share(self) -> float:
        return self.unseen_occurrences / self.occurrences


@dataclass(frozen=True)
class Repetition:
    """Documents whose text has been there before."""

    train: int  # further copies of a training document, in training
    validation: int  # likewise in validation
    leaked: int  # validation documents that are in training
    leaked_share: float  # of the validation documents


@dataclass(frozen=True)
class Packed:
    """What windows of `context_length` tokens make of the documents, each with its <eos>."""

    context_length: int
    longer: float  # share of the documents that no window holds whole, whatever the packing
    cut: float  # share of the documents that `packing: stream` lays in more than one window
    headless: float  # share of the tokens that then do not see where their document began
    padding: float  # share of the places that `packing: documents` leaves empty


@dataclass(frozen=True)
class Compression:
    """A tokenizer that was fitted on the training documents, measured on those of validation."""

    kind: str
    vocab_size: int  # that it has: less than was asked for, when the corpus has no more to merge
    tokens_per_word: float
    characters_per_token: float
    rare: float  # share of the vocabulary that training shows fewer than RARE times


def read(settings: config.Config) -> Corpus:
    """The documents of a run with these settings. Raises UserError as the run would."""
    texts = parts.read_texts(settings)
    documents = sources.documents(settings.data, settings.seed)
    train, validation = sources.split(documents, settings.data.validation_fraction)
    return Corpus(
        settings,
        origin=_origin(settings.data),
        fingerprint=texts.fingerprint,
        tokenizer=texts.tokenizer,
        train=Split(train, tokenizers.encode(texts.tokenizer, train)),
        validation=Split(validation, tokenizers.encode(texts.tokenizer, validation)),
    )


def spread(lengths: Lengths) -> Spread:
    """Mean, and lengths that half, 95 % and 99 % of the documents do not exceed."""
    # The inverse of the distribution: always the length of some document, so tokens stay whole.
    median, p95, p99 = np.quantile(lengths, [0.5, 0.95, 0.99], method="inverted_cdf")
    return Spread(float(lengths.mean()), int(median), int(p95), int(p99), int(lengths.max()))


def longest(split: Split, unit: Literal["characters", "tokens"], count: int = 1) -> list[Long]:
    """The `count` longest documents by that unit, longest first, the earlier one at a tie."""
    characters, tokens = split.characters, split.tokens
    by = characters if unit == "characters" else tokens
    return [
        Long(int(i), int(characters[i]), int(tokens[i]), split.documents[i])
        for i in np.argsort(-by, kind="stable")[:count]
    ]


def words(documents: Iterable[str]) -> list[str]:
    """What stands between white space, in order and as it is written."""
    return [word for document in documents for word in document.split()]


def overlap(train: Iterable[Hashable], validation: Iterable[Hashable]) -> Overlap:
    """How many different ones there are, and how many of validation training never shows."""
    known, found = set(train), Counter(validation)
    unseen = {item: times for item, times in found.items() if item not in known}
    return Overlap(
        train=len(known),
        validation=len(found),
        combined=len(known) + len(unseen),
        unseen=len(unseen),
        unseen_occurrences=sum(unseen.values()),
        occurrences=found.total(),
    )


def overlap_of_words(corpus: Corpus) -> Overlap:
    return overlap(words(corpus.train.documents), words(corpus.validation.documents))


def overlap_of_tokens(corpus: Corpus) -> Overlap:
    train, validation = (np.concatenate(x.ids).tolist() for x in (corpus.train, corpus.validation))
    return overlap(train, validation)


def exact(document: str) -> str:
    """The text as it is."""
    return document


def normalized(document: str) -> str:
    """The text in lower case, its punctuation as white space, and that as single spaces.

    Apostrophes go without a space: "don't" and "dont" are one. Symbols stay (C++ is not C). A text
    of nothing but punctuation is left as it is, for two of them are not the same.
    """
    spaced = "".join(
        " " if unicodedata.category(c)[0] == "P" else c for c in document if c not in "'’"
    )
    return " ".join(spaced.casefold().split()) or document


def repetition(train: Sequence[str], validation: Sequence[str], key: Key = exact) -> Repetition:
    """Documents with the key of one before them in their split, or of one in training."""
    keys, validation_keys = [key(d) for d in train], [key(d) for d in validation]
    known = set(keys)
    leaked = sum(k in known for k in validation_keys)
    return Repetition(
        train=len(keys) - len(known),
        validation=len(validation_keys) - len(set(validation_keys)),
        leaked=leaked,
        leaked_share=leaked / len(validation),
    )


def leaks(
    train: Sequence[str], validation: Sequence[str], key: Key = exact
) -> list[tuple[str, str]]:
    """Validation documents whose key is in training, each with the first one there that has it."""
    first = {key(document): document for document in reversed(train)}
    return [(document, first[k]) for document in validation if (k := key(document)) in first]


def packed(corpus: Corpus, context_lengths: Iterable[int] = CONTEXT_LENGTHS) -> list[Packed]:
    """The training documents in windows of these lengths and of the run's own, shortest first."""
    eos_id, pad_id = (
        tokenizers.special_id(corpus.tokenizer, name) for name in (tokenizers.EOS, tokenizers.PAD)
    )
    return [
        in_windows(corpus.train.ids, context_length, eos_id=eos_id, pad_id=pad_id)
        for context_length in sorted({*context_lengths, corpus.settings.data.context_length})
    ]


def in_windows(
    ids: Sequence[Int32[np.ndarray, "_"]], context_length: int, *, eos_id: int, pad_id: int
) -> Packed:
    """What windows of one length make of documents with these ids."""
    lengths = np.array([len(document) + 1 for document in ids], np.int64)
    ends = np.cumsum(lengths)
    border = context_length * ((ends - lengths) // context_length + 1)  # behind the first window
    behind = np.maximum(ends - border, 0)
    whole = batches.pack(
        ids, context_length=context_length, packing="documents", eos_id=eos_id, pad_id=pad_id
    )
    return Packed(
        context_length,
        longer=float((lengths > context_length).mean()),
        cut=float((behind > 0).mean()),
        headless=float(behind.sum() / lengths.sum()),
        padding=float((whole.positions < 0).mean()),
    )


def whole_in(lengths: Lengths, share: float = 0.99) -> int:
    """The smallest power of two that holds this share of the documents whole, with their <eos>."""
    length = int(np.quantile(lengths, share, method="inverted_cdf"))
    return 1 << length.bit_length()  # the smallest above it


def compression(
    kind: str, tokenizer: Tokenizer, train_ids: Sequence[np.ndarray], validation: Split
) -> Compression:
    """What this tokenizer makes of the validation documents, and how well training shows it."""
    vocab_size = tokenizer.get_vocab_size()
    counts = np.bincount(np.concatenate(train_ids), minlength=vocab_size)
    # <eos> ends every document, which the ids do not say.
    counts[tokenizers.special_id(tokenizer, tokenizers.EOS)] += len(train_ids)
    tokens = int(validation.tokens.sum())
    return Compression(
        kind,
        vocab_size,
        tokens_per_word=tokens / len(words(validation.documents)),
        characters_per_token=int(validation.characters.sum()) / tokens,
        rare=float((counts < RARE).mean()),
    )


def own_compression(corpus: Corpus) -> Compression:
    """That of the run's tokenizer."""
    kind = corpus.settings.tokenizer.kind
    return compression(kind, corpus.tokenizer, corpus.train.ids, corpus.validation)


def compressions(
    train: Sequence[str], validation: Sequence[str], vocab_sizes: Sequence[int] = VOCAB_SIZES
) -> list[Compression]:
    """Each kind that can be fitted at each of these sizes, which ascend.

    A kind ends at the first size that the corpus does not fill. Raises UserError where a size is
    too small for a kind.
    """
    found = []
    for kind in (config.Bpe, config.Unigram, config.WordPiece):
        for vocab_size in vocab_sizes:
            found.append(_fitted(kind(vocab_size=vocab_size), train, validation))
            if found[-1].vocab_size < vocab_size:
                break
    return [*found, _fitted(config.Char(), train, validation)]


def curve(compressions: Iterable[Compression], kind: str) -> list[Compression]:
    """Those of one kind, smallest vocabulary first."""
    return sorted((c for c in compressions if c.kind == kind), key=lambda c: c.vocab_size)


def well_shown(curve: Iterable[Compression]) -> Compression | None:
    """The largest vocabulary of which training shows at least half RARE times or more, if any."""
    found = [c for c in curve if c.rare <= 0.5]
    return max(found, key=lambda c: c.vocab_size, default=None)


def _fitted(
    settings: config.Tokenizer, train: Sequence[str], validation: Sequence[str]
) -> Compression:
    tokenizer = tokenizers.fit(settings, train)
    split = Split(list(validation), tokenizers.encode(tokenizer, validation))
    return compression(settings.kind, tokenizer, tokenizers.encode(tokenizer, train), split)


def _origin(data: config.Data) -> str:
    """The source, and what decides its documents beside its name."""
    if data.source == "python-docs":
        return f"{data.source} of Python {platform.python_version()}"
    commit = sources.revision(data)
    return f"{data.source} at {commit}" if commit else data.source
