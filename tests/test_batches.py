"""Holds the windows and batches against plain Python loops over the joined text."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from mainrun.data import batches
from mainrun.errors import UserError

EOS, PAD = 1, 0
TITLES = Path(__file__).parents[2] / "shared" / "data" / "hn_titles.txt"
PACKINGS = ["stream", "documents"]


def some_documents(lengths, seed=0, top=50):
    random = np.random.default_rng(seed)
    return [random.integers(3, top, n, dtype=np.int32) for n in lengths]


def packed(documents, context_length, packing):
    return batches.pack(
        documents, context_length=context_length, packing=packing, eos_id=EOS, pad_id=PAD
    )


def joined(documents):
    """The text as one list, each document followed by <eos>; and which document a token is of."""
    text, owner = [], []
    for number, document in enumerate(documents):
        text += [*map(int, document), EOS]
        owner += [number] * (len(document) + 1)
    return text, owner


def lengths_around(context_length):
    t = context_length
    return [[n] for n in (0, 1, t - 2, t - 1, t, t + 1, 5 * t - 1, 5 * t)] + [
        [0, 0, 0],
        [0, 5 * t, 1, t, t - 1, 2 * t + 3, 0, t + 1, 3, t - 2],
        [n % (2 * t + 3) for n in range(0, 700, 7)],
    ]


CASES = [
    (packing, t, lengths)
    for packing, t in itertools.product(PACKINGS, [2, 3, 8, 31])
    for lengths in lengths_around(t)
]


def test_every_token_is_a_target_once_after_the_token_before_it(subtests: pytest.Subtests):
    for packing, context_length, lengths in CASES:
        with subtests.test(packing=packing, context_length=context_length, lengths=lengths):
            documents = some_documents(lengths)
            text, _ = joined(documents)
            windows = packed(documents, context_length, packing)
            seen = []
            for inputs, targets, positions in zip(
                windows.inputs.tolist(),
                windows.targets.tolist(),
                windows.positions.tolist(),
                strict=True,
            ):
                assert len(positions) == context_length
                assert any(p >= 0 for p in positions)
                for token, target, position in zip(inputs, targets, positions, strict=True):
                    if position < 0:
                        assert target == PAD
                        continue
                    assert target == text[position]
                    assert token == (text[position - 1] if position else EOS)
                    seen.append(position)
            assert sorted(seen) == list(range(len(text)))


def test_tokens_of_a_row_share_a_segment_exactly_when_they_share_a_document(
    subtests: pytest.Subtests,
):
    for packing, context_length, lengths in CASES:
        with subtests.test(packing=packing, context_length=context_length, lengths=lengths):
            documents = some_documents(lengths)
            _, owner = joined(documents)
            windows = packed(documents, context_length, packing)
            batch = batches.take(windows, np.arange(len(windows)))
            for segments, positions in zip(
                batch.segment_ids.tolist(), windows.positions.tolist(), strict=True
            ):
                real = [(s, owner[p]) for s, p in zip(segments, positions, strict=True) if p >= 0]
                for (segment, document), (other_segment, other) in itertools.combinations(real, 2):
                    assert (segment == other_segment) == (document == other)


def test_stream_cuts_the_joined_text_into_windows_that_are_views_of_one_array():
    documents = some_documents([3, 0, 4])
    text, _ = joined(documents)
    windows = packed(documents, 4, "stream")
    assert windows.inputs.ravel().tolist() == [EOS, *text, PAD][:12]
    assert windows.targets.ravel().tolist() == [*text, PAD, PAD]
    assert windows.positions.ravel().tolist() == [*range(10), -1, -1]
    assert np.shares_memory(windows.inputs, windows.targets)


def naive_best_fit_fills(lengths, capacity):
    """Tokens in each window by a search through all of them; long documents open their own."""
    fills = []
    for length in lengths:
        if length > capacity:
            fills += [capacity] * (length // capacity) + [length % capacity]
    fills = [fill for fill in fills if fill]
    for length in sorted((n for n in lengths if n <= capacity), reverse=True):
        fitting = [i for i, fill in enumerate(fills) if fill + length <= capacity]
        if fitting:
            fills[max(fitting, key=lambda i: fills[i])] += length
        else:
            fills.append(length)
    return sorted(fills)


def test_whole_documents_are_packed_by_best_fit_longest_first(subtests: pytest.Subtests):
    for context_length, seed in itertools.product([2, 7, 16, 64], range(5)):
        with subtests.test(context_length=context_length, seed=seed):
            lengths = np.random.default_rng(seed).integers(0, 2 * context_length, 300)
            windows = packed(some_documents(lengths), context_length, "documents")
            fills = sorted((windows.positions >= 0).sum(axis=1).tolist())
            assert fills == naive_best_fit_fills([int(n) + 1 for n in lengths], context_length)


def test_only_documents_longer_than_a_window_are_cut_and_only_where_they_must():
    context_length = 16
    lengths = np.random.default_rng(3).integers(0, 60, 200)
    windows = packed(some_documents(lengths), context_length, "documents")
    _, owner = joined(some_documents(lengths))
    windows_of = [set() for _ in lengths]
    for row, positions in enumerate(windows.positions.tolist()):
        for position in positions:
            if position >= 0:
                windows_of[owner[position]].add(row)
    for length, rows in zip(lengths.tolist(), windows_of, strict=True):
        assert len(rows) == -(-(length + 1) // context_length)


def test_packing_is_deterministic_and_keeps_the_order_of_the_text():
    documents = some_documents(np.random.default_rng(5).integers(0, 30, 200))
    first, again = packed(documents, 16, "documents"), packed(documents, 16, "documents")
    np.testing.assert_array_equal(first.positions, again.positions)
    earliest = [min(p for p in row if p >= 0) for row in first.positions.tolist()]
    assert earliest == sorted(earliest)


def test_ids_take_two_bytes_where_they_fit(subtests: pytest.Subtests):
    for packing, (largest, dtype) in itertools.product(
        PACKINGS, [(65_535, np.uint16), (65_536, np.int32)]
    ):
        with subtests.test(packing=packing, largest=largest, dtype=dtype):
            windows = packed([np.array([5, largest], np.int32)], 4, packing)
            assert windows.inputs.dtype == windows.targets.dtype == dtype
            assert windows.targets[0, 1] == largest
            assert batches.take(windows, np.arange(1)).targets[0, 1] == largest


def test_weights_are_one_on_tokens_and_zero_on_padding(subtests: pytest.Subtests):
    for packing in PACKINGS:
        with subtests.test(packing=packing):
            windows = packed(some_documents([3, 9, 5]), 8, packing)
            batch = batches.take(windows, np.arange(len(windows)))
            assert batch.weights.sum() == 3 + 9 + 5 + 3
            np.testing.assert_array_equal(batch.weights == 0, windows.positions == -1)


# ---------------------------------------------------------------------------------------------
# Batch n of a run

WINDOWS = packed(some_documents([11] * 100, top=3_000), 16, "stream")  # 75 windows
BATCH_SIZE = 8


def batch_of(index, order="shuffled", seed=7):
    return batches.batch(WINDOWS, index, batch_size=BATCH_SIZE, order=order, seed=seed)


def rows_of(batch):
    """Which windows these are, told by their content, which is different in each."""
    content = [row.tolist() for row in WINDOWS.targets]
    return [content.index(row.tolist()) for row in batch.targets]


def test_an_epoch_is_the_whole_batches():
    assert len(WINDOWS) == 75
    assert batches.steps_per_epoch(WINDOWS, BATCH_SIZE) == 9
    assert batches.steps_per_epoch(WINDOWS, 75) == 1


def test_an_epoch_reads_no_window_twice(subtests: pytest.Subtests):
    for order in ["sequential", "shuffled"]:
        with subtests.test(order=order):
            for epoch in range(3):
                rows = [r for step in range(9) for r in rows_of(batch_of(epoch * 9 + step, order))]
                assert len(rows) == len(set(rows)) == 9 * BATCH_SIZE


def test_sequential_batches_are_the_windows_in_order_in_every_epoch():
    for index in range(27):
        first = index % 9 * BATCH_SIZE
        assert rows_of(batch_of(index, "sequential")) == list(range(first, first + BATCH_SIZE))


def test_shuffled_batches_follow_a_permutation_of_seed_and_epoch():
    for seed, epoch in [(7, 0), (7, 1), (8, 0)]:
        permutation = np.random.default_rng([seed, epoch]).permutation(75).tolist()
        rows = [r for step in range(9) for r in rows_of(batch_of(epoch * 9 + step, seed=seed))]
        assert rows == permutation[: 9 * BATCH_SIZE]


def test_two_epochs_differ_when_shuffled():
    assert rows_of(batch_of(0)) != rows_of(batch_of(9))


def test_batch_n_is_the_same_whatever_was_asked_before():
    forward = [batch_of(i) for i in range(30)]
    for index in np.random.default_rng(1).permutation(30).tolist():
        for once, again in zip(forward[index], batch_of(index), strict=True):
            np.testing.assert_array_equal(once, again)


def test_all_of_a_batch_is_of_the_same_windows(subtests: pytest.Subtests):
    for order in ["sequential", "shuffled"]:
        with subtests.test(order=order):
            for index in (0, 5, 13):
                batch = batch_of(index, order)
                rows = rows_of(batch)
                np.testing.assert_array_equal(batch.inputs, WINDOWS.inputs[rows])
                np.testing.assert_array_equal(batch.weights, WINDOWS.positions[rows] >= 0)
                assert {array.dtype for array in batch} == {np.dtype("int32"), np.dtype("float32")}


def test_changing_a_batch_does_not_change_the_windows():
    batch = batch_of(3)
    before = batch.inputs.copy()
    for array in batch:
        array[:] = 0
    np.testing.assert_array_equal(batch_of(3).inputs, before)


def test_a_text_that_fills_no_batch_is_refused_with_the_numbers():
    windows = packed(some_documents([20, 20]), 16, "stream")
    with pytest.raises(UserError) as error:
        batches.steps_per_epoch(windows, 64)
    message = str(error.value)
    assert "\n" not in message
    for part in ("training.batch_size=64", "data.context_length=16", "the 3 windows", "at most 3"):
        assert part in message


def test_packing_wastes_under_two_percent_on_real_titles():
    if not TITLES.exists():
        pytest.skip("needs ../shared/data/hn_titles.txt")
    # A word and a half a token is near enough to BPE for the distribution of lengths.
    lengths = [len(line) // 5 + 1 for line in TITLES.read_text(encoding="utf-8").split("\n")]
    windows = packed([np.full(n, 5, np.int32) for n in lengths], 128, "documents")
    assert (windows.positions >= 0).mean() > 0.98
