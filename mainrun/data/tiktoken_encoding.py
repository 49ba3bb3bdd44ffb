"""tiktoken's encodings as a `tokenizers.Tokenizer`, so that one tokenizer.json serves every kind.

tiktoken stores no merges: it joins the two neighbors whose union has the lowest rank, the leftmost
first. A token's merge is the two parts that its own bytes come to in this way. No other neighbors
in a text make it: as no merge has crossed a border of the stretch that they cover, it has merged as
it would alone. A token whose bytes get stuck before is only found as a whole word
(`ignore_merges`).

tiktoken's ids stay. <|endoftext|> takes the name of our end of a document, and the names that we
need besides come after the last id. Ids that tiktoken leaves free are named <unused N>, so that
there are as many tokens as ids; like its other special tokens they never come of a text.
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, pairwise

import tiktoken
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from mainrun.data import cache
from mainrun.errors import UserError, one_line

_END_OF_TEXT = "<|endoftext|>"
_TRIED = 1_000  # documents on which both must agree; takes less than 0.1 s


def load(name: str) -> tiktoken.Encoding:
    """The encoding of this name; its ranks come from the network once, then from the cache folder.

    Raises UserError for a name that tiktoken does not know, and where there is neither.
    """
    known = tiktoken.list_encoding_names()
    if name not in known:
        raise UserError(
            f"tokenizer.encoding={name} is none of the encodings that tiktoken "
            f"{tiktoken.__version__} knows: {', '.join(known)}"
        )
    with _cache_folder() as folder:
        try:
            return tiktoken.get_encoding(name)
        except (OSError, ValueError) as error:  # of the disk and of requests; a wrong checksum
            raise UserError(
                f"tokenizer.encoding={name}: its ranks are not in the cache folder {folder!r} and "
                f"fetching them failed ({one_line(error)}); where there is no network, copy that "
                "folder from a machine that has used the encoding, name yours in "
                "TIKTOKEN_CACHE_DIR, or choose another tokenizer.kind"
            ) from error


def convert(
    encoding: tiktoken.Encoding, documents: Iterable[str], *, eos: str, others: Sequence[str]
) -> Tokenizer:
    """A tokenizer that gives the encoding's own ids, tried on the first of the documents.

    Its vocabulary names `eos` what the encoding calls <|endoftext|>, and ends with `others`. Raises
    UserError for an encoding that has no such token or that gives a document other ids.
    """
    # tiktoken's README shows these three as the way to build on an encoding.
    ranks, special = encoding._mergeable_ranks, encoding._special_tokens
    if _END_OF_TEXT not in special:
        raise UserError(f"tokenizer.encoding={encoding.name}: it has no token {_END_OF_TEXT}")
    letters = _byte_letters()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    names = {rank: spelled(token) for token, rank in ranks.items()}
    names |= {number: name for name, number in special.items()}
    names[special[_END_OF_TEXT]] = eos
    # With a space, which no spelled token has, so that no word can be one of them.
    vocabulary = [names.get(i, f"<unused {i}>") for i in range(max(names) + 1)] + [*others]
    merges = [
        (spelled(merge[0]), spelled(merge[1]))
        for token in sorted(ranks, key=ranks.__getitem__)
        if (merge := _merge(token, ranks))
    ]
    tokenizer = Tokenizer(
        models.BPE({name: i for i, name in enumerate(vocabulary)}, merges, ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_for_oniguruma(encoding._pat_str)), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()

    tried = [" ".join([eos, *others, *special]), *islice(documents, _TRIED)]
    ids = [found.ids for found in tokenizer.encode_batch_fast(tried, add_special_tokens=False)]
    named_twice = len(set(vocabulary)) < len(vocabulary)
    if named_twice or ids != [encoding.encode_ordinary(text) for text in tried]:
        raise UserError(
            f"tokenizer.encoding={encoding.name}: this encoding cannot be written as a "
            "tokenizer.json that gives the same ids; choose another, such as gpt2"
        )
    return tokenizer


def _merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts that tiktoken joins to this token; None for a byte and where it never does."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [a + b for a, b in pairwise(parts)]
        known = [(ranks[union], i) for i, union in enumerate(joined) if union in ranks]
        if not known:
            return None
        _, i = min(known)
        parts[i : i + 2] = [joined[i]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _byte_letters() -> list[str]:
    """The letter that stands for each byte: the alphabet that `tokenizers` has from GPT-2."""
    printable = [byte for byte in range(256) if chr(byte).isprintable() and byte != ord(" ")]
    letters = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        letters.setdefault(byte, chr(256 + byte - sum(b < byte for b in printable)))
    return [letters[byte] for byte in range(256)]


def _for_oniguruma(pattern: str) -> str:
    """The pattern for the library's engine, which reads {1,3}+ as any number of {1,3}.

    tiktoken's means: give none back. At the end of an alternative nothing asks for any.
    """
    return re.sub(r"(\{\d+,\d*\})\+(?=\||$)", r"\1", pattern)


@contextmanager
def _cache_folder() -> Iterator[str]:
    """Lets tiktoken keep its ranks in our cache, unless the user has said where; where they are."""
    for name in ("TIKTOKEN_CACHE_DIR", "DATA_GYM_CACHE_DIR"):
        if name in os.environ:
            yield os.environ[name]
            return
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache.folder() / "tiktoken")
    try:
        yield os.environ["TIKTOKEN_CACHE_DIR"]
    finally:
        del os.environ["TIKTOKEN_CACHE_DIR"]
