"""A corpus's numbers as Markdown: tables, and sentences that say what follows from them.

Everything here is given what `corpus` has counted, and puts it into words. Documents are data: none
of them becomes markup.
"""

from collections.abc import Iterable, Mapping, Sequence

from mainrun import config, markdown
from mainrun.analysis import corpus
from mainrun.analysis.corpus import (
    Compression,
    Corpus,
    Lengths,
    Long,
    Overlap,
    Packed,
    Repetition,
)

_SHOWN = 240  # characters of a document


class Page(str):
    """Markdown that a notebook shows as a page, and a console as it stands."""

    __slots__ = ()

    def _repr_markdown_(self) -> str:
        return str(self)

    __repr__ = str.__str__


def source(texts: Corpus) -> Page:
    """Which documents these are, and with which settings they were read."""
    settings = texts.settings
    kind, size = settings.tokenizer.kind, _count(texts.tokenizer.get_vocab_size())
    match settings.tokenizer:
        case config.Tiktoken(encoding=encoding):
            fitted = f"{markdown.escaped(encoding)}, not fitted here"
        case tokenizer:
            fitted = "fitted on " + ("training" if tokenizer.fit_on == "train" else "both")
    return _table(
        ["", ""],
        [
            ["documents from", markdown.escaped(texts.origin)],
            ["for training", _count(len(texts.train.documents))],
            ["for validation", _count(len(texts.validation.documents))],
            ["fingerprint (SHA-256)", texts.fingerprint[:16]],
            ["tokenizer", f"{kind}, {size} tokens, {fitted}"],
            ["`data.context_length`", f"{_count(settings.data.context_length)} tokens"],
        ],
    )


def lengths(texts: Corpus) -> Page:
    """Characters and tokens of a document, in both splits."""

    def row(name: str, lengths: Lengths) -> list[str]:
        found = corpus.spread(lengths)
        counts = (found.median, found.p95, found.p99, found.longest)
        return [name, f"{found.mean:.1f}", *map(_count, counts)]

    return _table(
        ["a document's", "mean", "median", "95 % have at most", "99 % have at most", "longest"],
        [
            row("characters, training", texts.train.characters),
            row("characters, validation", texts.validation.characters),
            row("tokens, training", texts.train.tokens),
            row("tokens, validation", texts.validation.tokens),
        ],
    )


def longest(texts: Corpus) -> Page:
    """The longest document of each split in characters and in tokens, itself."""
    found: list[tuple[str, Long]] = []
    for unit in ("characters", "tokens"):
        for name, split in (("training", texts.train), ("validation", texts.validation)):
            found += [(f"{unit}, {name}", long) for long in corpus.longest(split, unit)]
    return _table(
        ["most", "characters", "tokens", "number", "document"],
        [
            [name, _count(x.characters), _count(x.tokens), str(x.index), _document(x.document)]
            for name, x in found
        ],
    )


def overlaps(found: Mapping[str, Overlap]) -> Page:
    """Different words and tokens in the splits; the keys say which of the two a row counts."""
    return _table(
        [
            *("different", "in training", "in validation", "in both together"),
            *("in validation only", "share of validation's text"),
        ],
        [
            [
                *(name, _count(x.train), _count(x.validation), _count(x.combined)),
                *(_count(x.unseen), _percent(x.unseen_share)),
            ]
            for name, x in found.items()
        ],
    )


def repetitions(found: Mapping[str, Repetition]) -> Page:
    """Repeated documents; the keys say what counts as the same."""
    return _table(
        ["the same", "again in training", "again in validation", "of validation, in training"],
        [
            [
                *(name, _count(x.train), _count(x.validation)),
                f"{_count(x.leaked)} ({_percent(x.leaked_share)})",
            ]
            for name, x in found.items()
        ],
    )


def leaks(found: Sequence[tuple[str, str]], count: int = 5) -> Page:
    """The first `count` validation documents that training knows, beside what it knows."""
    if not found:
        return Page("No validation document is in training.")
    rows = [[_document(a), _document(b)] for a, b in found[:count]]
    return _table(["in validation", "in training"], rows)


def packed(found: Iterable[Packed]) -> Page:
    """What windows of each length do to the training documents."""
    return _table(
        [
            *("context length", "documents longer than a window", "documents cut by `stream`"),
            *("tokens without their beginning", "padding by `documents`"),
        ],
        [
            [_count(x.context_length), *map(_percent, (x.longer, x.cut, x.headless, x.padding))]
            for x in found
        ],
    )


def compressions(found: Iterable[Compression]) -> Page:
    """Fitted tokenizers, on the validation documents."""
    return _table(
        [
            *("tokenizer", "vocabulary", "tokens per word", "characters per token"),
            f"vocabulary seen fewer than {corpus.RARE} times",
        ],
        [
            [
                *(x.kind, _count(x.vocab_size), f"{x.tokens_per_word:.2f}"),
                *(f"{x.characters_per_token:.2f}", _percent(x.rare)),
            ]
            for x in found
        ],
    )


def conclusions(
    texts: Corpus,
    in_windows: Iterable[Packed],
    fitted: Iterable[Compression],
    known: Repetition,
) -> Page:
    """What the numbers say about context length, packing, vocabulary and the validation loss."""
    return Page(
        "\n".join(
            f"- {line}"
            for line in (
                _on_context(texts),
                _on_packing(texts, in_windows),
                _on_vocabulary(corpus.own_compression(texts), fitted),
                _on_leakage(known),
            )
        )
    )


def _on_context(texts: Corpus) -> str:
    lengths, chosen = texts.train.tokens, texts.settings.data.context_length
    found = corpus.spread(lengths)
    holds = float((lengths < chosen).mean())
    return (
        f"**Context length.** 95 % of the documents have at most {_count(found.p95)} tokens, 99 % "
        f"at most {_count(found.p99)}, the longest {_count(found.longest)}. With `<eos>`, "
        f"{corpus.whole_in(lengths)} is the smallest power of two that holds 99 % of them whole; "
        f"`data.context_length={chosen}` holds {_percent(holds)}. Beyond the longest document a "
        "longer context shows a model nothing more of what it predicts; only fewer are cut."
    )


def _on_packing(texts: Corpus, in_windows: Iterable[Packed]) -> str:
    chosen = texts.settings.data.context_length
    (found,) = (x for x in in_windows if x.context_length == chosen)
    return (
        f"**Packing.** At {chosen} tokens `packing: stream` cuts {_percent(found.cut)} of the "
        f"documents in two or more, and {_percent(found.headless)} of the tokens are predicted "
        f"without their document's beginning. `packing: documents` cuts {_percent(found.longer)}, "
        f"and leaves {_percent(found.padding)} of the places empty."
    )


def _on_vocabulary(own: Compression, fitted: Iterable[Compression]) -> str:
    text = (
        f"**Vocabulary.** {own.kind} with {_count(own.vocab_size)} tokens needs "
        f"{own.tokens_per_word:.2f} tokens for a word; training shows {_percent(own.rare)} of the "
        f"vocabulary fewer than {corpus.RARE} times."
    )
    curve = corpus.curve(fitted, own.kind)
    best = corpus.well_shown(curve)
    if len(curve) < 2 or best is None:
        return text
    text += (
        f" {_count(best.vocab_size)} is the largest of the sizes above of which it shows at least "
        "half more often"
    )
    if best is curve[-1]:
        return text + "."
    larger = curve[curve.index(best) + 1]
    saved = 1 - larger.tokens_per_word / best.tokens_per_word
    return text + (
        f"; {_count(larger.vocab_size)} would save {_percent(saved)} of the tokens and show "
        f"{_percent(larger.rare)} of its vocabulary that rarely. Which of them predicts better is "
        "for a run to say: `val/loss` is per character and compares across vocabularies."
    )


def _on_leakage(known: Repetition) -> str:
    if not known.leaked:
        return (
            "**Leakage.** No validation document is in training, whatever its case or punctuation."
        )
    return (
        "**Leakage.** But for case and punctuation, training has "
        f"{_percent(known.leaked_share)} of the validation documents ({_count(known.leaked)}). "
        "What a model learns by heart can lower the validation loss on these, and on no others."
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> Page:
    return Page(markdown.table(header, rows))


def _document(text: str) -> str:
    return markdown.escaped(markdown.shortened(text, _SHOWN))


def _count(number: int) -> str:
    return f"{number:,}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
