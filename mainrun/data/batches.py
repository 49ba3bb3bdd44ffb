"""Token ids laid out in windows, and batch `n` of a run as a pure function of them.

The documents are joined end to end, each followed by <eos>, with one <eos> in front. Every token
of that text but the first is the target of the token before it, exactly once, whatever the packing:
a window is a row of positions in the joined text, and inputs and targets are looked up from it.
Which documents there are, and what their ids mean, is decided elsewhere. NumPy only.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple, assert_never

import numpy as np
from jaxtyping import Float32, Int, Int32, Integer

from mainrun.errors import UserError

Packing = Literal["stream", "documents"]
Order = Literal["sequential", "shuffled"]


@dataclasses.dataclass(frozen=True, eq=False)
class Windows:
    """Rows of `time` inputs and the targets that follow them.

    `positions` is the index of the target in the documents joined end to end, each followed by
    <eos>; -1 is padding, which has no weight. Ids are uint16 where they fit, else int32.
    """

    inputs: Integer[np.ndarray, "windows time"]
    targets: Integer[np.ndarray, "windows time"]
    positions: Int32[np.ndarray, "windows time"]
    eos_id: int

    def __len__(self) -> int:
        return len(self.positions)


class Batch(NamedTuple):
    """What one training step reads. Tokens of one document in a row share a segment id."""

    inputs: Int32[np.ndarray, "batch time"]
    targets: Int32[np.ndarray, "batch time"]
    segment_ids: Int32[np.ndarray, "batch time"]
    weights: Float32[np.ndarray, "batch time"]


def pack(
    documents_ids: Sequence[Integer[np.ndarray, "_"]],
    *,
    context_length: int,
    packing: Packing,
    eos_id: int,
    pad_id: int,
) -> Windows:
    """The documents as windows of `context_length` targets; every token is a target once.

    A document of n tokens is read as inputs [eos d0 .. dn-1] and targets [d0 .. dn-1 eos].
    `stream` cuts the joined text every `context_length` tokens and pads the last window.
    `documents` keeps each document in one window by best-fit packing (Ding et al. 2024,
    arXiv:2404.10830) and pads every window; only a document longer than a window is cut.
    """
    lengths = np.array([len(ids) + 1 for ids in documents_ids], np.int64)
    total = int(lengths.sum())
    match packing:
        case "stream":
            num_windows = -(-total // context_length)
            index = np.arange(num_windows * context_length, dtype=np.int32)
            positions = np.where(index < total, index, np.int32(-1)).reshape(-1, context_length)
        case "documents":
            positions = _whole_documents(lengths, context_length)
        case _:
            assert_never(packing)

    largest = max([eos_id, pad_id, *(int(ids.max()) for ids in documents_ids if len(ids))])
    dtype = np.uint16 if largest < 2**16 else np.int32
    text = np.full(1 + max(total, positions.size), pad_id, dtype)
    eos = np.array([eos_id], dtype)
    with_eos = (part for ids in documents_ids for part in (ids, eos))
    text[: total + 1] = np.concatenate([eos, *with_eos])
    if packing == "stream":  # two views of one array
        inputs, targets = text[:-1].reshape(positions.shape), text[1:].reshape(positions.shape)
    else:
        padding = positions < 0
        inputs = np.where(padding, dtype(pad_id), text[positions])
        targets = np.where(padding, dtype(pad_id), text[positions + 1])
    return Windows(inputs, targets, positions, eos_id)


def steps_per_epoch(windows: Windows, batch_size: int) -> int:
    """Whole batches in one pass over the windows; what fills none is left out of the epoch.

    A partly padded window counts as a window. Raises UserError when there is not one batch.
    """
    steps = len(windows) // batch_size
    if steps == 0:
        raise UserError(
            f"training.batch_size={batch_size} is more than the {len(windows)} windows of "
            f"data.context_length={windows.positions.shape[1]} tokens that the training text "
            f"fills: set training.batch_size to at most {len(windows)}, a smaller "
            "data.context_length, or give more documents"
        )
    return steps


def most_documents(windows: Windows) -> int:
    """The most that one window holds."""
    return 1 + int((windows.inputs[:, 1:] == windows.eos_id).sum(axis=1).max(initial=0))


def batch(windows: Windows, index: int, *, batch_size: int, order: Order, seed: int) -> Batch:
    """Training batch `index` of the run, counted through all epochs: a pure function.

    `sequential` reads the windows in their order, the same in every epoch; `shuffled` permutes
    them anew each epoch. Either way an epoch has no window twice.
    """
    return take(windows, rows(windows, index, batch_size=batch_size, order=order, seed=seed))


def rows(
    windows: Windows, index: int, *, batch_size: int, order: Order, seed: int
) -> Int[np.ndarray, " batch"]:
    """The row numbers of the windows that batch `index` reads."""
    epoch, step = divmod(index, steps_per_epoch(windows, batch_size))
    numbers = np.arange(step * batch_size, (step + 1) * batch_size)
    match order:
        case "sequential":
            return numbers
        case "shuffled":
            return _permutation(seed, epoch, len(windows))[numbers]
        case _:
            assert_never(order)


def take(windows: Windows, rows: Int[np.ndarray, " batch"]) -> Batch:
    """The windows of these row numbers as a batch."""
    inputs = windows.inputs[rows].astype(np.int32)
    return Batch(
        inputs=inputs,
        targets=windows.targets[rows].astype(np.int32),
        segment_ids=np.cumsum(inputs == windows.eos_id, axis=1, dtype=np.int32),
        weights=(windows.positions[rows] >= 0).astype(np.float32),
    )


# Two: the next epoch's first batch may be prepared while this epoch's last is asked for again.
@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Int[np.ndarray, " windows"]:
    permutation = np.random.default_rng([seed, epoch]).permutation(size)
    permutation.flags.writeable = False  # the cache hands out the array itself
    return permutation


def _whole_documents(
    lengths: Int[np.ndarray, " documents"], context_length: int
) -> Int32[np.ndarray, "windows time"]:
    """Positions in which each document stays in one window, where it fits at all.

    Best fit, longest first: each document goes where it leaves the least room. A document longer
    than a window is cut every `context_length` tokens into pieces that open windows of their own;
    the last piece leaves room for whole documents behind it, never before it: a segment begins at
    an <eos> input, and a piece from inside a document has none.
    """
    starts = np.cumsum(lengths) - lengths
    long = lengths > context_length
    num_pieces = -(-lengths[long] // context_length)
    ends = np.repeat(starts[long] + lengths[long], num_pieces)
    nth = np.arange(num_pieces.sum()) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    piece_starts = np.repeat(starts[long], num_pieces) + nth * context_length
    piece_lengths = np.minimum(context_length, ends - piece_starts)

    order = np.argsort(-lengths, kind="stable")[np.count_nonzero(long) :]
    room_left = (context_length - piece_lengths).tolist()
    window_of = np.array(_best_fit(lengths[order].tolist(), room_left, context_length), np.int64)

    # Pieces first in their windows, then documents as in the text; and windows in the order of
    # the text: longest first would be a curriculum that nobody asked for.
    window_of = np.concatenate([np.arange(len(piece_starts)), window_of])
    is_document = np.arange(len(window_of)) >= len(piece_starts)
    starts = np.concatenate([piece_starts, starts[order]])
    lengths = np.concatenate([piece_lengths, lengths[order]])
    num_windows = int(window_of.max(initial=-1)) + 1
    first = np.full(num_windows, np.iinfo(np.int64).max)
    np.minimum.at(first, window_of, starts)
    window_of = np.argsort(np.argsort(first))[window_of]
    order = np.lexsort((starts, is_document, window_of))
    window_of, starts, lengths = window_of[order], starts[order], lengths[order]

    before = np.cumsum(lengths) - lengths  # tokens laid down so far, of all windows
    first_of_window = np.searchsorted(window_of, window_of)
    columns = before - before[first_of_window]
    token = np.arange(lengths.sum()) - np.repeat(before, lengths)
    positions = np.full((num_windows, context_length), -1, np.int32)
    positions.ravel()[np.repeat(window_of * context_length + columns, lengths) + token] = (
        np.repeat(starts, lengths) + token
    )
    return positions


def _best_fit(lengths: Sequence[int], room_left: Sequence[int], capacity: int) -> list[int]:
    """The window of each length, taken in turn: the fullest that still has room, else a new one.

    `room_left` is the room in the windows that exist already. Bit r of `rooms` is set while some
    window has exactly r tokens left, so the tightest fit is found by one shift of an integer of
    `capacity` bits instead of a search over windows.
    """
    with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0
    for window, room in enumerate(room_left):
        with_room[room].append(window)
        rooms |= 1 << room
    num_windows = len(room_left)
    chosen = []
    for length in lengths:
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            window = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, window = capacity, num_windows
            num_windows += 1
        with_room[room - length].append(window)
        rooms |= 1 << (room - length)
        chosen.append(window)
    return chosen
