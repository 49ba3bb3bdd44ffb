"""The pieces of a unigram language model, found from the counts of words.

Each piece has a probability, a segmentation of a word the product of its pieces', a word the sum
over its segmentations. Of all repeated substrings, those without which the words would lose least
are dropped, again and again, with EM in between, until as many are left as were asked for.
Kudo 2018 (arXiv:1804.10959), section 3.2.

The library's own trainer adds up in the order of its hash tables and threads, so that every fit
wrote another file. It also holds a substring for repeated only if two different words share it, so
that a frequent word alone of its form never is a piece: 39,000 titles were 481,000 tokens of its
16,000 pieces and are 415,000 of these (420,000 of BPE's).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64

_LONGEST = 16  # characters of a piece, and
_SHRINK = 0.75  # of the pieces stay in a round: both as in SentencePiece
_MOST_WORDS = 100_000  # different ones: 10 s, 0.7 GB; a rarer word has no say in what is kept


@dataclass(frozen=True, eq=False)
class _Lattice:
    """Every segmentation of every word: nodes between characters, an edge for each piece there.

    Edges are in the order of `depth`, the number of characters of the word up to the edge's end,
    and then of their ends.
    """

    start: Int64[np.ndarray, " edges"]
    end: Int64[np.ndarray, " edges"]
    depth: Int64[np.ndarray, " edges"]
    piece: Int64[np.ndarray, " edges"]
    last: Int64[np.ndarray, " words"]  # each word's last node
    counts: Float64[np.ndarray, " nodes"]  # of the word that the node lies in


def fit(
    words: Mapping[str, int], alphabet: Iterable[str], num_pieces: int
) -> list[tuple[str, float]]:
    """Pieces with their log-probabilities, likeliest first; every letter of the alphabet is one.

    `words` says how often each word occurs; they are of these letters only. There are fewer pieces
    than asked for, where the words do not repeat themselves enough.
    """
    letters = sorted(alphabet)
    often = sorted(words.items(), key=lambda word: (-word[1], word[0]))
    pieces, lattice = _seeds(dict(often[:_MOST_WORDS]), letters)
    log_probabilities = np.zeros(len(pieces))
    while True:
        for _ in range(2):  # as in SentencePiece
            expected, loss = _expectation(lattice, log_probabilities)
            log_probabilities = _maximization(expected)
        if len(pieces) <= max(num_pieces, len(letters)):
            break
        loss[: len(letters)] = np.inf
        size = max(num_pieces, len(letters), int(_SHRINK * len(pieces)))
        kept = np.sort(np.argsort(-loss, kind="stable")[:size])
        lattice = _with_pieces(lattice, kept, len(pieces))
        pieces = [pieces[i] for i in kept]
        log_probabilities = log_probabilities[kept]
    # To six decimals, so that it does not show how a processor rounds its logarithms.
    found = [(p, round(float(x), 6)) for p, x in zip(pieces, log_probabilities, strict=True)]
    return sorted(found, key=lambda piece: (-piece[1], piece[0]))


def _expectation(
    lattice: _Lattice, log_probabilities: Float64[np.ndarray, " pieces"]
) -> tuple[Float64[np.ndarray, " pieces"], Float64[np.ndarray, " pieces"]]:
    """How often each piece is expected, and by how many nats less likely the words are without it.

    The latter holds where a word has the piece once: without it, a word keeps the share of its
    probability that lies in segmentations without it.
    """
    steps = np.flatnonzero(np.diff(lattice.depth, prepend=0, append=0))
    slices = [slice(a, b) for a, b in pairwise(steps)]

    forward = np.zeros(len(lattice.counts))
    share = np.empty(len(lattice.piece))  # of the ways to the edge's end, how many take the edge
    for edges in slices:
        ways = forward[lattice.start[edges]] + log_probabilities[lattice.piece[edges]]
        ends = lattice.end[edges]
        first = np.flatnonzero(np.diff(ends, prepend=-1))
        total = np.logaddexp.reduceat(ways, first)
        forward[ends[first]] = total
        share[edges] = np.exp(ways - np.repeat(total, np.diff(first, append=len(ends))))

    through = np.zeros(len(lattice.counts))  # of the word's segmentations, how many pass the node
    through[lattice.last] = 1
    for edges in reversed(slices):
        share[edges] *= through[lattice.end[edges]]
        through[lattice.start[edges]] += share[edges]  # no two of these edges have one start

    def by_piece(
        amounts: Float64[np.ndarray, " edges"],
    ) -> Float64[np.ndarray, " pieces"]:
        sums = np.bincount(lattice.piece, amounts, len(log_probabilities))
        return sums.astype(np.float64)  # where there is no edge, NumPy's are integers

    counts = lattice.counts[lattice.end]
    lost = -np.log1p(-np.minimum(share, 1 - 1e-15))
    return by_piece(counts * share), by_piece(counts * lost)


def _maximization(expected: Float64[np.ndarray, " pieces"]) -> Float64[np.ndarray, " pieces"]:
    """Log-probabilities of pieces that are expected so often."""
    seen = np.maximum(expected, 0.5)  # a byte that is in no word must not be impossible
    return np.log(seen) - np.log(seen.sum())


def _seeds(words: Mapping[str, int], letters: list[str]) -> tuple[list[str], _Lattice]:
    """The letters, then every longer substring that occurs twice or more, and the words of them."""
    text = "".join(words)
    lengths = np.array([len(w) for w in words], np.int64)
    word = np.repeat(np.arange(len(lengths)), lengths)
    offset = np.arange(len(text)) - (np.cumsum(lengths) - lengths)[word]
    counts = np.array(list(words.values()), np.float64)

    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    letter = np.searchsorted(np.array([ord(c) for c in letters]), codes)
    pieces = list(letters)
    at, piece = np.arange(len(text)), letter  # where the pieces of one length are, and which
    found = [(at, at + 1, piece)]
    for length in range(2, _LONGEST + 1):
        inside = offset[at] + length <= lengths[word[at]]
        at, shorter = at[inside], piece[inside]
        # A substring is known by the piece that it begins with and its last letter, and one that is
        # repeated begins with one that is.
        _, first, name = np.unique(
            shorter * len(letters) + letter[at + length - 1],
            return_index=True,
            return_inverse=True,
        )
        repeated = np.bincount(name, counts[word[at]]) >= 2
        numbers = len(pieces) + np.cumsum(repeated) - 1
        pieces += [text[i : i + length] for i in at[first[repeated]]]
        at, piece = at[repeated[name]], numbers[name[repeated[name]]]
        found.append((at, at + length, piece))

    start, end, piece = (np.concatenate(part) for part in zip(*found, strict=True))
    nodes = word[start]  # a word has one node more than letters
    depth = offset[start] + end - start
    order = np.lexsort((end, depth))
    return pieces, _Lattice(
        start=(start + nodes)[order],
        end=(end + nodes)[order],
        depth=depth[order],
        piece=piece[order],
        last=np.cumsum(lengths + 1) - 1,
        counts=np.repeat(counts, lengths + 1),
    )


def _with_pieces(lattice: _Lattice, kept: Int64[np.ndarray, " kept"], num_pieces: int) -> _Lattice:
    """The lattice of these of its pieces only, numbered anew."""
    numbers = np.full(num_pieces, -1)
    numbers[kept] = np.arange(len(kept))
    stays = numbers[lattice.piece] >= 0
    return replace(
        lattice,
        start=lattice.start[stays],
        end=lattice.end[stays],
        depth=lattice.depth[stays],
        piece=numbers[lattice.piece[stays]],
    )
