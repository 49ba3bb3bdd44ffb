"""Text to token ids and back: byte-level BPE and single characters.

A tokenizer here is a `tokenizers.Tokenizer` of Hugging Face, fitted, saved and loaded so that
<pad>, <eos> and <unk> are ids 0, 1 and 2, and that a document which contains one of these words is
encoded as ordinary text. Documents are stripped text; nothing here adds <eos>.

TOKENIZERS_PARALLELISM is left alone on purpose: unset, the library goes on with one thread in a
forked process; set to true, against its old warning, the forked process waits for ever.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import assert_never

import numpy as np
from jaxtyping import Int32, Integer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from mainrun import config
from mainrun.errors import UserError, one_line

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
SPECIAL = [PAD, EOS, UNK]  # in the order of their ids
PAD_ID, EOS_ID, UNK_ID = 0, 1, 2
_PART = 20_000  # documents encoded at once


def fit(settings: config.Tokenizer, documents: Iterable[str]) -> Tokenizer:
    """A tokenizer of these documents; the same documents give the same bytes of JSON.

    The vocabulary may be smaller than asked for, when the documents have no more to merge.
    """
    match settings:
        case config.Bpe():
            tokenizer = _fit_bpe(documents, settings.vocab_size)
        case config.Char():
            tokenizer = _fit_char(documents)
        case _:
            assert_never(settings)
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
    if [tokenizer.id_to_token(i) for i in range(len(SPECIAL))] != SPECIAL:
        raise UserError(f"{path}: not a tokenizer of mainrun: ids 0, 1, 2 are not {SPECIAL}")
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
    text = tokenizer.decode(
        [int(i) for i in ids if i not in (PAD_ID, EOS_ID)], skip_special_tokens=False
    )
    is_bpe = isinstance(tokenizer.model, models.BPE)
    return text.removeprefix(" ") if is_bpe else text  # the space that add_prefix_space put there


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


def _fit_char(documents: Iterable[str]) -> Tokenizer:
    """One token for each character seen, in code point order."""
    characters = sorted(set().union(*documents))
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")  # `.` skips \n
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _as_plain_text(tokenizer: Tokenizer) -> Tokenizer:
    # Else a title that contains the word <eos> would end there. Not part of tokenizer.json.
    tokenizer.encode_special_tokens = True
    return tokenizer
