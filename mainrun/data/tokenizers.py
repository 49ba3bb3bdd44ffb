"""Text to token ids and back.

A tokenizer here is a `tokenizers.Tokenizer` of Hugging Face. Whatever its kind, its vocabulary has
<pad>, <eos> and <unk>, found by these names; its ids run from 0 without a gap; and a document which
contains one of the names is encoded as ordinary text. All but characters work on the 256 letters of
the library's byte alphabet, so no text is unknown to them. Documents are stripped text; nothing
here adds <eos>.

TOKENIZERS_PARALLELISM is left alone on purpose: unset, the library goes on with one thread in a
forked process; set to true, against its old warning, the forked process waits for ever.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import assert_never

import numpy as np
from jaxtyping import Int32, Integer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mainrun import config
from mainrun.data import tiktoken_encoding, unigram
from mainrun.errors import UserError, one_line

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL = [PAD, EOS, UNK]  # in the order of their ids, 0, 1 and 2, in what is fitted here
_PART = 20_000  # documents encoded at once
_LONGEST_WORD = 100  # bytes
# What WordPiece writes before a piece that does not begin its word. BERT's ## alone would not do:
# of the text `x##!` it makes the piece ##!, which is also how it spells a ! inside a word. No
# letter of the byte alphabet is a space.
_INNER = " ##"


def fit(settings: config.Tokenizer, documents: Iterable[str]) -> Tokenizer:
    """A tokenizer of these documents; the same documents give the same bytes of JSON.

    The vocabulary may be smaller than asked for, when the documents have no more to merge. One of
    tiktoken's is only tried on them. Raises UserError where that cannot be had.
    """
    match settings:
        case config.Bpe():
            tokenizer = _fit_bpe(documents, settings.vocab_size)
        case config.Unigram():
            tokenizer = _fit_unigram(documents, settings.vocab_size)
        case config.WordPiece():
            tokenizer = _fit_word_piece(documents, settings.vocab_size)
        case config.Char():
            tokenizer = _fit_char(documents)
        case config.Tiktoken():
            encoding = tiktoken_encoding.load(settings.encoding)
            tokenizer = tiktoken_encoding.convert(encoding, documents, eos=EOS, others=[PAD, UNK])
        case _:
            assert_never(settings)
    tokenizer.add_special_tokens(SPECIAL)  # each keeps the id that it has
    return _as_plain_text(tokenizer)


def save(tokenizer: Tokenizer, path: Path) -> None:
    """Writes the one JSON file that `load` and other programs read."""
    path.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def load(path: Path) -> Tokenizer:
    """The tokenizer that `save` wrote. Raises UserError if the file is not one of ours."""
    try:
        tokenizer = Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the tokenizer ({error.strerror})") from error
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{path}: not a tokenizer.json ({one_line(error)})") from error
    if missing := [name for name in SPECIAL if tokenizer.token_to_id(name) is None]:
        raise UserError(f"{path}: not a tokenizer of mainrun: it lacks {', '.join(missing)}")
    return _as_plain_text(tokenizer)


def special_id(tokenizer: Tokenizer, name: str) -> int:
    """The id of PAD, EOS or UNK, which every tokenizer of ours has."""
    number = tokenizer.token_to_id(name)
    assert number is not None
    return number


def encode(tokenizer: Tokenizer, documents: Sequence[str]) -> list[Int32[np.ndarray, "_"]]:
    """Ids of each document, without <eos>."""
    # Not cached between runs: 39,000 titles take 1.1 s on two cores, less than their fit's 1.4 s.
    # In parts, because the library's objects are large: 315,000 titles took 500 MB, now 70 MB.
    parts = (documents[i : i + _PART] for i in range(0, len(documents), _PART))
    return [
        np.array(encoding.ids, np.int32)
        for part in parts
        for encoding in tokenizer.encode_batch_fast(part, add_special_tokens=False)
    ]


def decode(tokenizer: Tokenizer, ids: Sequence[int] | Integer[np.ndarray, " tokens"]) -> str:
    """The text of these ids; of a document's ids, exactly the document.

    <pad> and <eos> are left out, <unk> is shown. Bytes that are not UTF-8, which only a model
    writes, become U+FFFD.
    """
    left_out = {special_id(tokenizer, PAD), special_id(tokenizer, EOS)}
    text = tokenizer.decode([int(i) for i in ids if i not in left_out], skip_special_tokens=False)
    return text.removeprefix(" ") if _adds_a_space(tokenizer) else text


def _fit_bpe(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE as in the original assessment, with all 256 bytes in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def _fit_unigram(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """The unigram language model over the byte alphabet."""
    words = _byte_words()
    counts = Counter(word for document in documents for word, _ in words.pre_tokenize_str(document))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    pieces = unigram.fit(counts, alphabet, vocab_size - len(SPECIAL))
    unlikely = pieces[-1][1]  # no text has these, and no byte is unknown
    vocabulary = [*((name, unlikely) for name in SPECIAL), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index(UNK)))
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _fit_word_piece(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """WordPiece over the byte alphabet, with each byte both as a word's first and inside one."""
    words = _byte_words()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # The library's WordPieceTrainer is this one and keeps its vocabulary. But it meets the letters
    # inside words in the order of a hash table, which then decides ties: so they are given here, as
    # what the trainer puts into the vocabulary first.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL, *alphabet, *(_INNER + letter for letter in alphabet)],
        continuing_subword_prefix=_INNER,
        show_progress=False,
    )
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = words
    trained.train_from_iterator(documents, trainer)
    tokenizer = Tokenizer(
        models.WordPiece(
            trained.get_vocab(),
            unk_token=UNK,
            continuing_subword_prefix=_INNER,
            max_input_chars_per_word=_LONGEST_WORD,
        )
    )
    tokenizer.pre_tokenizer = words
    tokenizer.decoder = decoders.Sequence([decoders.Replace(_INNER, ""), decoders.ByteLevel()])
    return tokenizer


def _byte_words() -> pre_tokenizers.PreTokenizer:
    """Splits as BPE does, and words of more than 100 bytes into several.

    WordPiece would make one <unk> of a word longer than its limit, and the time it takes for one
    grows with the cube of its length.
    """
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.FixedLength(_LONGEST_WORD),
        ]
    )


def _fit_char(documents: Iterable[str]) -> Tokenizer:
    """One token for each character seen, in code point order."""
    characters = sorted(set().union(*documents))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # `.` skips \n
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    # Else a title that contains the word <eos> would end there. Not part of tokenizer.json.
    tokenizer.encode_special_tokens = True
    return tokenizer


def _adds_a_space(tokenizer: Tokenizer) -> bool:
    """Whether it puts a space before each document, as `add_prefix_space` does."""
    return len(tokenizer.pre_tokenizer.pre_tokenize_str("x")[0][0]) > 1
