"""Masks against their definitions: for each query, the set of keys it sees, spelled out."""

import typing

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mainrun import config
from mainrun.model import masks

NUM_HEADS = 4


def visible(attention: config.Attention, query: int, head: int) -> set[int]:
    """The keys that this head's query sees in a text without documents. The oracle.

    Child et al. 2019, in OpenAI's tiles of `block_size`; written without `masks`.
    """
    past = range(query + 1)
    match attention:
        case config.CausalAttention(window_including_self=None):
            return set(past)
        case config.CausalAttention(window_including_self=window):
            return set(past[-window:])
    assert isinstance(attention, config.SparseAttention)
    size = attention.block_size
    match attention.pattern:
        case config.AllKeys():
            blocks = set(range(query // size + 1))
        case config.LocalKeys(window_including_self=window):
            blocks = _newest(window // size, query // size)
        case config.FixedKeys(stride=stride, num_verts=num_verts, vertsize=vertsize):
            per_stride = stride // size
            last = per_stride - head % num_verts * vertsize
            summary = range(last - vertsize, last)
            blocks = {
                start + place
                for start in range(0, query // size + 1, per_stride)
                for place in range(per_stride)
                if place in summary or start == query // stride * per_stride
            }
        case config.StridedKeys(stride=stride):
            blocks = _newest(stride // size, query // size)
            blocks |= set(range(query // size, -1, -stride // size))
    return {key for block in blocks for key in range(block * size, block * size + size)} & set(past)


def _newest(count: int, block: int) -> set[int]:
    return set(range(max(0, block - count + 1), block + 1))


def visible_grid(attention: config.Attention, time: int) -> np.ndarray:
    """`visible` for all pairs, [heads, time, time]."""
    grid = np.zeros((NUM_HEADS, time, time), bool)
    for head in range(NUM_HEADS):
        for query in range(time):
            grid[head, query, sorted(visible(attention, query, head))] = True
    return grid


def of(mask: masks.Mask, time: int) -> np.ndarray:
    positions = jnp.arange(time)
    return np.asarray(masks.grid(mask, positions, positions, NUM_HEADS))


@st.composite
def sparse_attentions(draw: st.DrawFn) -> config.SparseAttention:
    block_size = draw(st.sampled_from([1, 2, 3, 4]))
    vertsize = draw(st.integers(1, 3))
    num_verts = draw(st.sampled_from([1, 2, 4]))
    blocks = vertsize * draw(st.integers(num_verts, num_verts + 2))
    tokens = blocks * block_size
    pattern = draw(
        st.sampled_from(
            [
                config.AllKeys(),
                config.LocalKeys(window_including_self=tokens),
                config.FixedKeys(stride=tokens, num_verts=num_verts, vertsize=vertsize),
                config.StridedKeys(stride=tokens),
            ]
        )
    )
    return config.SparseAttention(num_heads=NUM_HEADS, block_size=block_size, pattern=pattern)


def test_the_patterns_drawn_here_are_all_there_are() -> None:
    drawn = {config.AllKeys, config.LocalKeys, config.FixedKeys, config.StridedKeys}
    assert set(typing.get_args(typing.get_args(config.Pattern)[0])) == drawn


@settings(max_examples=80, deadline=None)
@given(attention=sparse_attentions(), time=st.sampled_from([7, 40]))
def test_a_sparse_mask_is_the_set_that_defines_its_pattern(
    attention: config.SparseAttention, time: int
) -> None:
    mask = np.broadcast_to(of(masks.of_attention(attention), time)[0], (NUM_HEADS, time, time))
    np.testing.assert_array_equal(mask, visible_grid(attention, time))


@settings(max_examples=30, deadline=None)
@given(attention=sparse_attentions())
def test_every_query_of_every_head_sees_itself_and_nothing_later(
    attention: config.SparseAttention,
) -> None:
    grid = of(masks.of_attention(attention), 40)[0]
    assert np.diagonal(grid, axis1=-2, axis2=-1).all()
    assert not np.triu(grid, 1).any()


def test_the_last_of_twelve_tokens_in_blocks_of_two(subtests: pytest.Subtests) -> None:
    cases = [
        # Six blocks, in strides of three: (0 1 2)(3 4 5).
        (config.LocalKeys(window_including_self=6), {6, 7, 8, 9, 10, 11}),
        (config.StridedKeys(stride=6), {4, 5, 6, 7, 8, 9, 10, 11}),
        (config.FixedKeys(stride=6), {4, 5, 6, 7, 8, 9, 10, 11}),
    ]
    for attention, seen_by_the_last in cases:
        with subtests.test(attention.kind):
            grid = of(masks.sparse(attention, 2), 12)[0, 0]
            assert set(np.flatnonzero(grid[11])) == seen_by_the_last
            assert set(np.flatnonzero(grid[10])) == seen_by_the_last - {11}


def test_heads_take_the_columns_from_the_end_of_the_stride_in_turn() -> None:
    fixed = config.FixedKeys(stride=8, num_verts=2, vertsize=3)
    grid = of(masks.sparse(fixed, 1), 17)[0]
    columns = [set(np.flatnonzero(grid[head, 8, :8])) for head in range(NUM_HEADS)]
    assert columns == [{5, 6, 7}, {2, 3, 4}, {5, 6, 7}, {2, 3, 4}]


def test_causal_sees_itself_and_the_past() -> None:
    expected = [[key <= query for key in range(5)] for query in range(5)]
    np.testing.assert_array_equal(of(masks.causal, 5)[0, 0], expected)


def test_a_window_counts_the_querys_own_position(subtests: pytest.Subtests) -> None:
    for size in [1, 3, 9]:
        with subtests.test(size=size):
            grid = of(masks.causal & masks.window_including_self(size), 9)[0, 0]
            assert grid.sum(axis=-1).tolist() == [min(size, query + 1) for query in range(9)]
            windowed = config.CausalAttention(num_heads=NUM_HEADS, window_including_self=size)
            np.testing.assert_array_equal(grid, visible_grid(windowed, 9)[0])
            np.testing.assert_array_equal(of(masks.of_attention(windowed), 9)[0, 0], grid)


def test_same_document_sees_its_own_segment_in_its_own_row() -> None:
    segments = np.array([[0, 0, 1, 1, 2], [3, 3, 3, 4, 4]])
    expected = [[[row[q] == row[k] for k in range(5)] for q in range(5)] for row in segments]
    grid = of(masks.same_document(jnp.asarray(segments)), 5)
    np.testing.assert_array_equal(grid[:, 0], expected)


def test_masks_join_as_sets_do() -> None:
    segments = np.array([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 2, 2, 2]])
    document = masks.same_document(jnp.asarray(segments))
    stripes = masks.every(3, 1)
    joined = of(masks.causal & (stripes | ~document), 7)
    pairs = {(q, k) for q in range(7) for k in range(7)}
    for row, ids in enumerate(segments):
        striped = {(q, k) for q, k in pairs if (q - k) % 3 == 0}
        together = {(q, k) for q, k in pairs if ids[q] == ids[k]}
        expected = {(q, k) for q, k in pairs if k <= q} & (striped | (pairs - together))
        assert {tuple(pair) for pair in np.argwhere(joined[row, 0]).tolist()} == expected


def test_one_query_against_some_keys_is_a_part_of_the_whole() -> None:
    mask = masks.sparse(config.FixedKeys(stride=6, num_verts=2, vertsize=2), 1)
    keys = np.array([3, 19, 0, 11, 17, 20])
    some = masks.grid(mask, jnp.array([19]), jnp.asarray(keys), NUM_HEADS)
    np.testing.assert_array_equal(some, of(mask, 21)[:, :, 19:20, keys])


def test_axes_a_mask_knows_nothing_of_have_size_one() -> None:
    assert of(masks.causal, 3).shape == (1, 1, 3, 3)
    segments = jnp.zeros((2, 3), jnp.int32)
    assert of(masks.same_document(segments), 3).shape == (2, 1, 3, 3)
    columns = masks.summary_columns(3, 2, 1, 1)
    assert of(masks.causal & columns, 3).shape == (1, NUM_HEADS, 3, 3)
