"""Tiled attention against sums over the keys that each query sees, and against dense attention."""

import functools
import itertools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.model import sparse
from tests.test_masks import NUM_HEADS, visible, visible_grid

BATCH, TIME = 2, 75  # neither whole tiles nor whole strides of any case below


def window(size: int | None) -> config.CausalAttention:
    return config.CausalAttention(num_heads=NUM_HEADS, window_including_self=size)


def tiled(pattern: config.Pattern, block_size: int = 1) -> config.SparseAttention:
    return config.SparseAttention(num_heads=NUM_HEADS, block_size=block_size, pattern=pattern)


CASES: dict[str, sparse.Tiled] = {
    "all": tiled(config.AllKeys()),
    "window of itself": window(1),
    "window": window(7),
    "window longer than a tile": window(70),
    "local blocks": tiled(config.LocalKeys(window_including_self=12), 4),
    "fixed": tiled(config.FixedKeys(stride=10)),
    "fixed, longer than a tile": tiled(config.FixedKeys(stride=34, vertsize=2)),
    "fixed, two verts": tiled(config.FixedKeys(stride=8, num_verts=2, vertsize=2)),
    "fixed blocks": tiled(config.FixedKeys(stride=12, vertsize=2), 3),
    "fixed blocks, two verts": tiled(config.FixedKeys(stride=16, num_verts=2, vertsize=2), 2),
    "fixed blocks, four verts": tiled(config.FixedKeys(stride=16, num_verts=4), 4),
    "strided": tiled(config.StridedKeys(stride=9)),
    "strided blocks": tiled(config.StridedKeys(stride=12), 4),
    "strided, one block": tiled(config.StridedKeys(stride=4), 4),
}


def inputs(kv_heads: int = 2, time: int = TIME, seed: int = 0) -> list[np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = [(NUM_HEADS, 8), (kv_heads, 8), (kv_heads, 6)]
    return [draw.normal(size=(BATCH, n, time, dim)).astype(np.float32) for n, dim in shapes]


def documents(time: int = TIME) -> np.ndarray:
    """Of unlike lengths, some shorter than a window, one row's unlike the other's."""
    rows = [np.repeat([0, 1, 2], [30, 3, time - 33]), np.repeat([4, 5], [time - 11, 11])]
    return np.array(rows, np.int32)


def by_sets(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    attention: sparse.Tiled,
    segments: np.ndarray | None,
) -> np.ndarray:
    """The oracle, float64: one query at a time, over the set of keys that it sees."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.empty((*q.shape[:3], v.shape[-1]))
    group = q.shape[1] // k.shape[1]
    for head, query in np.ndindex(*q.shape[1:3]):
        seen = visible(attention, query, head)
        for row in range(len(q)):
            keys = sorted(
                key
                for key in seen
                if segments is None or segments[row, key] == segments[row, query]
            )
            scores = k[row, head // group, keys] @ q[row, head, query] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[row, head, query] = weights / weights.sum() @ v[row, head // group, keys]
    return out


def dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | jax.Array) -> jax.Array:
    """Plain attention under a mask, one key head for each query head."""
    k, v = (jnp.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / np.sqrt(q.shape[-1])
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1) @ v


@functools.partial(jax.jit, static_argnums=3)
def attended(q: jax.Array, k: jax.Array, v: jax.Array, attention: sparse.Tiled) -> jax.Array:
    return sparse.attend(q, k, v, attention)


@functools.partial(jax.jit, static_argnums=3)
def attended_in_documents(
    q: jax.Array, k: jax.Array, v: jax.Array, attention: sparse.Tiled, segments: np.ndarray
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """The output, and what comes back for q, k and v."""
    return _with_gradients(lambda q, k, v: sparse.attend(q, k, v, attention, segments), q, k, v)


@jax.jit
def dense_in_documents(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _with_gradients(lambda q, k, v: dense(q, k, v, mask), q, k, v)


@functools.partial(jax.jit, static_argnums=(3, 5))
def attended_with_dropout(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    attention: sparse.Tiled,
    keys: jax.Array | None,
    rate: float,
) -> jax.Array:
    return sparse.attend(q, k, v, attention, dropout_keys=keys, dropout_rate=rate)


def _with_gradients(
    attend: Callable[..., jax.Array], *arrays: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    out, backward = jax.vjp(attend, *arrays)
    return out, backward(jnp.sin(jnp.arange(out.size)).reshape(out.shape).astype(out.dtype))


def test_the_cases_are_all_patterns_there_are() -> None:
    patterns = {type(a.pattern) for a in CASES.values() if isinstance(a, config.SparseAttention)}
    assert patterns == set(typing.get_args(typing.get_args(config.Pattern)[0]))


# Float32 against float64, sums of at most 75 numbers near 1: 1e-5 is some ten roundings.
def test_each_query_attends_to_the_keys_of_its_set(subtests: pytest.Subtests) -> None:
    for name, attention in CASES.items():
        with subtests.test(name):
            q, k, v = inputs(kv_heads=NUM_HEADS)
            expected = by_sets(q, k, v, attention, None)
            np.testing.assert_allclose(attended(q, k, v, attention), expected, atol=1e-5)


@pytest.mark.slow
def test_documents_and_grouped_heads_keep_to_their_sets(subtests: pytest.Subtests) -> None:
    for name, attention in CASES.items():
        with subtests.test(name):
            q, k, v = inputs(kv_heads=2)
            out, _ = attended_in_documents(q, k, v, attention, documents())
            np.testing.assert_allclose(out, by_sets(q, k, v, attention, documents()), atol=1e-5)


def test_gradients_are_those_of_dense_attention_under_the_mask(subtests: pytest.Subtests) -> None:
    for name, attention in CASES.items():
        with subtests.test(name):
            q, k, v = inputs(kv_heads=2)
            segments = documents()
            together = segments[:, None, :, None] == segments[:, None, None, :]
            _, expected = dense_in_documents(q, k, v, visible_grid(attention, TIME) & together)
            _, gradients = attended_in_documents(q, k, v, attention, segments)
            for one, other in zip(gradients, expected, strict=True):
                np.testing.assert_allclose(one, other, atol=1e-5)


def test_later_tokens_and_other_documents_change_nothing(subtests: pytest.Subtests) -> None:
    for name, attention in CASES.items():
        with subtests.test(name):
            arrays, others = inputs(), inputs(seed=1)
            segments = documents()
            changed_positions = np.zeros((BATCH, TIME), bool)
            changed_positions[:, 40:] = True  # later
            changed_positions[0, :33] = True  # row 0's other documents; row 1's 0 to 39 stay
            changed = [
                np.where(changed_positions[:, None, :, None], b, a)
                for a, b in zip(arrays, others, strict=True)
            ]
            out, _ = attended_in_documents(*arrays, attention, segments)
            again, _ = attended_in_documents(*changed, attention, segments)
            np.testing.assert_array_equal(out[0, :, 33:40], again[0, :, 33:40])
            np.testing.assert_array_equal(out[1, :, :40], again[1, :, :40])
            assert not np.array_equal(out[1, :, 40:], again[1, :, 40:])


def test_any_length_will_do(subtests: pytest.Subtests) -> None:
    for time, name in itertools.product(
        [1, 32, 65], ["window longer than a tile", "fixed blocks, two verts", "strided blocks"]
    ):
        with subtests.test(time=time, name=name):
            q, k, v = inputs(time=time)
            out = attended(q, k, v, CASES[name])
            np.testing.assert_allclose(out, by_sets(q, k, v, CASES[name], None), atol=1e-5)


def test_a_long_window_reaches_over_several_tiles() -> None:
    q, k, v = inputs(time=290)
    out = attended(q, k, v, window(150))
    np.testing.assert_allclose(out, by_sets(q, k, v, window(150), None), atol=1e-5)


def test_scores_of_any_size_give_finite_outputs_and_gradients(subtests: pytest.Subtests) -> None:
    for name in ["window", "fixed", "strided"]:
        with subtests.test(name=name):
            q, k, v = inputs()
            out, gradients = attended_in_documents(1000 * q, k, v, CASES[name], documents())
            expected = by_sets(1000 * q, k, v, CASES[name], documents())
            # Scores near 4000 have float32 steps of 2e-4, which the exponential takes up whole.
            np.testing.assert_allclose(out, expected, atol=2e-3)
            assert all(np.isfinite(gradient).all() for gradient in gradients)


def test_bfloat16_goes_in_and_out_and_is_summed_in_float32(subtests: pytest.Subtests) -> None:
    for name in ["window", "fixed, two verts", "strided"]:
        with subtests.test(name=name):
            q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
            segments = documents()
            out, gradients = attended_in_documents(q, k, v, CASES[name], segments)
            wide = [np.asarray(x, np.float32) for x in (q, k, v)]
            assert {x.dtype for x in (out, *gradients)} == {jnp.dtype(jnp.bfloat16)}
            # Half a step of bfloat16 is 0.4 %: of the weights, and of the result.
            expected = by_sets(*wide, CASES[name], segments)
            np.testing.assert_allclose(out.astype(np.float32), expected, rtol=0.008, atol=0.008)


def test_dropout_zeroes_its_share_of_weights_and_keeps_their_sum(subtests: pytest.Subtests) -> None:
    for name in ["window", "fixed, two verts", "strided"]:
        with subtests.test(name=name):
            attention, rate, rows, time = CASES[name], 0.25, 100, 40
            q, k, _ = inputs(kv_heads=NUM_HEADS, time=time)
            # With the unit vectors for values, the output is the weights.
            units = jnp.broadcast_to(jnp.eye(time), (rows, NUM_HEADS, time, time))
            q, k = (jnp.broadcast_to(x[:1], (rows, *x.shape[1:])) for x in (q, k))
            keys = jax.random.key_data(jax.random.split(jax.random.key(0), rows))
            whole = np.asarray(attended(q, k, units, attention))[0]
            seen = visible_grid(attention, time)
            np.testing.assert_array_equal(whole > 0, seen)
            dropped = np.asarray(attended_with_dropout(q, k, units, attention, keys, rate))
            kept = dropped != 0
            np.testing.assert_allclose(dropped, kept * whole / (1 - rate), rtol=1e-5)
            # Six standard deviations: of all weights' coins together, and of one weight's.
            share, deviation = kept[:, seen], np.sqrt(rate * (1 - rate))
            assert abs(share.mean() - (1 - rate)) < 6 * deviation / np.sqrt(share.size)
            assert np.abs(share.mean(axis=0) - (1 - rate)).max() < 6 * deviation / np.sqrt(rows)


def test_dropout_of_one_view_is_not_that_of_the_other() -> None:
    # For each query 32 keys of its own stride and 4 times 8 columns: pair i of the one has the
    # number of pair i of the other.
    attention, time = tiled(config.FixedKeys(stride=32, vertsize=8)), 128
    q, k, _ = inputs(kv_heads=NUM_HEADS, time=time)
    units = jnp.broadcast_to(jnp.eye(time), (BATCH, NUM_HEADS, time, time))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), BATCH))
    kept = attended_with_dropout(q, k, units, attention, keys, 0.5)[..., -1, :] > 0
    own = kept[..., 96:120]
    columns = kept[..., [32 * stride + 24 + i for stride in range(3) for i in range(8)]]
    # 192 coins: 0.7 is more than five standard deviations from a half.
    assert (own == columns).mean() < 0.7


def test_dropout_needs_keys_and_a_rate() -> None:
    q, k, v = inputs()
    keys = jnp.ones((BATCH, 2), jnp.uint32)
    drop = functools.partial(attended_with_dropout, q, k, v, CASES["window"])
    plain = attended(q, k, v, CASES["window"])
    np.testing.assert_array_equal(drop(keys, 0.0), plain)
    np.testing.assert_array_equal(drop(None, 0.5), plain)
    assert not np.array_equal(drop(keys, 0.5), plain)


LONG: dict[str, sparse.Tiled] = {
    "window": window(128),
    "local": tiled(config.LocalKeys(window_including_self=128)),
    "local blocks": tiled(config.LocalKeys(window_including_self=128), 16),
    "fixed": tiled(config.FixedKeys(stride=128)),
    "fixed, four verts": tiled(config.FixedKeys(stride=128, num_verts=4, vertsize=8)),
    "fixed blocks": tiled(config.FixedKeys(stride=128, num_verts=2), 16),
    "strided": tiled(config.StridedKeys(stride=128)),
    "strided blocks": tiled(config.StridedKeys(stride=128), 16),
}
"""The sizes of the benchmark table."""


def gradient(attend: Callable[..., jax.Array], time: int) -> jax.stages.Lowered:
    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.square(attend(q, k, v)).sum()

    x = jax.ShapeDtypeStruct((1, NUM_HEADS, time, 64), jnp.float32)
    return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x)


def temporary_bytes(attend: Callable[..., jax.Array], time: int) -> int:
    memory = gradient(attend, time).compile().memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


@pytest.fixture(scope="module")
def dense_bytes() -> int:
    def causal(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        places = jnp.arange(4096)
        return dense(q, k, v, places[:, None] >= places)

    return temporary_bytes(causal, 4096)


def test_a_context_of_4096_takes_less_than_a_third_of_dense_memory(
    dense_bytes: int, subtests: pytest.Subtests
) -> None:
    for name, attention in LONG.items():
        with subtests.test(name):
            attend = functools.partial(sparse.attend, attention=attention)
            assert sparse.saves(attention, 4096)
            assert temporary_bytes(attend, 4096) < dense_bytes / 3


def test_no_index_is_gathered_or_scattered(subtests: pytest.Subtests) -> None:
    for name, attention in LONG.items():
        with subtests.test(name):
            attend = functools.partial(sparse.attend, attention=attention)
            text = gradient(attend, 300).as_text()
            assert "stablehlo.dot_general" in text
            assert "stablehlo.gather" not in text
            assert "stablehlo.scatter" not in text


def test_tiles_save_nothing_where_everything_is_seen() -> None:
    assert not sparse.saves(window(None), 8192)
    assert not sparse.saves(tiled(config.AllKeys()), 8192)
    assert not sparse.saves(window(1000), 1024)
    assert not sparse.saves(tiled(config.FixedKeys(stride=512)), 512)
    assert not sparse.saves(tiled(config.StridedKeys(stride=1)), 4096)
    assert not sparse.saves(window(8), 16)
