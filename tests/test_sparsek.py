"""SparseK against brute force: NumPy loops over single queries, and a dense form with autodiff."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mainrun.model import sparsek


class Case(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    time: int
    num_selected: int
    window: int
    chunk: int
    documents: int
    spread: float  # of the scores


COMMON = Case(2, 4, 2, 60, 5, 4, 8, 1, 1.0)

CASES = [
    COMMON,
    COMMON._replace(documents=4),
    COMMON._replace(documents=2, spread=0.01),  # most scores active
    COMMON._replace(window=1, spread=5.0),  # only itself in the window; many gates of 0 and of 1
    Case(1, 2, 1, 67, 3, 7, 16, 3, 1.0),  # no whole chunks; documents begin inside them
    Case(1, 2, 1, 50, 1, 12, 10, 1, 0.3),  # one selected; a window longer than a chunk
    Case(1, 1, 1, 33, 40, 3, 64, 1, 1.0),  # all candidates selected; a chunk longer than the text
    Case(1, 1, 1, 5, 3, 9, 4, 2, 1.0),  # a window longer than the text
]


class Inputs(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    scores: jax.Array


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def made(case: Case, dim: int = 4) -> tuple[Inputs, jax.Array]:
    """Inputs, and segment ids with the documents at uneven places."""
    keys = (case.batch, case.kv_heads, case.time)
    inputs = Inputs(
        normal(1, case.batch, case.heads, case.time, dim),
        normal(2, *keys, dim),
        normal(3, *keys, dim),
        case.spread * normal(4, *keys),
    )
    ids = np.random.default_rng(case.time).integers(0, case.documents, (case.batch, case.time))
    return inputs, jnp.asarray(np.sort(ids, axis=1) * 3)


@partial(jax.jit, static_argnames=("num_selected", "window", "chunk"))
def _pulled(inputs: Inputs, ids, weight, num_selected, window, chunk):
    def run(*inputs: jax.Array) -> jax.Array:
        return sparsek.attend(
            *inputs,
            num_selected=num_selected,
            window_including_self=window,
            segment_ids=ids,
            chunk=chunk,
        )

    out, pull = jax.vjp(run, *inputs)
    return out, Inputs(*pull(weight))


def attend(
    case: Case, inputs: Inputs, ids: jax.Array, weight: jax.Array | None = None
) -> tuple[np.ndarray, Inputs]:
    """The output, and the gradients of its product with `weight`: one compilation per shape."""
    if weight is None:
        weight = jnp.zeros_like(inputs.q)
    found = _pulled(inputs, ids, weight, case.num_selected, case.window, case.chunk)
    return jax.tree.map(np.asarray, found)


def threshold(scores: np.ndarray, num_selected: int) -> float:
    """tau by bisection in float64."""
    scores = np.asarray(scores, np.float64)
    if len(scores) <= num_selected:
        return -np.inf
    low, high = scores.min() - 1, scores.max()
    for _ in range(100):
        middle = (low + high) / 2
        if np.clip(scores - middle, 0, 1).sum() > num_selected:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def one_query(case: Case, inputs: Inputs, ids: np.ndarray, b: int, h: int, i: int) -> np.ndarray:
    """The output of one query, by the definition."""
    g = h // (case.heads // case.kv_heads)
    q, k, v, scores = (np.asarray(x, np.float64) for x in inputs)
    newest = i - case.window
    before = [j for j in range(newest + 1) if ids[b, j] == ids[b, i]]
    tau = threshold(scores[b, g, before], case.num_selected)
    selected = sorted(before, key=lambda j: (-scores[b, g, j], j))[: case.num_selected]
    gates = {j: float(np.clip(scores[b, g, j] - tau, 0, 1)) for j in selected}
    gates |= {j: 1.0 for j in range(max(0, newest + 1), i + 1) if ids[b, j] == ids[b, i]}
    logits = np.array([q[b, h, i] @ (m * k[b, g, j]) for j, m in gates.items()])
    weights = np.exp(logits / np.sqrt(q.shape[-1]))
    values = np.array([m * v[b, g, j] for j, m in gates.items()])
    return weights / weights.sum() @ values


def brute_force(case: Case, inputs: Inputs, segment_ids: jax.Array) -> np.ndarray:
    ids = np.asarray(segment_ids)
    every = range(case.batch), range(case.heads), range(case.time)
    return np.array(
        [
            [[one_query(case, inputs, ids, b, h, i) for i in every[2]] for h in every[1]]
            for b in every[0]
        ]
    )


def dense(case: Case, segment_ids: jax.Array, q, k, v, scores) -> jax.Array:
    """The same from arrays of time x time, for autodiff."""
    query, key = jnp.arange(case.time)[:, None], jnp.arange(case.time)[None]
    same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
    window = same & (key <= query) & (key > query - case.window)
    candidate = same & (key <= query - case.window)
    z = scores[:, :, None, :]
    # beaten[..., j, l]: candidate l comes before j
    beaten = (z > z.swapaxes(-1, -2)) | (z == z.swapaxes(-1, -2)) & (key < query)
    rank = (beaten[:, :, None] & candidate[..., None, :]).sum(-1)

    def halve(_, between):
        low, high = between
        middle = (low + high) / 2
        gates = jnp.where(candidate, jnp.clip(z - middle, 0, 1), 0)
        is_low = gates.sum(-1, keepdims=True) > case.num_selected
        return jnp.where(is_low, middle, low), jnp.where(is_low, high, middle)

    ends = (jnp.broadcast_to(x, (*scores.shape, 1)) for x in (scores.min() - 1, scores.max()))
    low, high = jax.lax.fori_loop(0, 40, halve, tuple(map(jax.lax.stop_gradient, ends)))
    t = (low + high) / 2
    active = candidate & (z > t) & (z < t + 1)
    total = jnp.where(active, z, 0).sum(-1, keepdims=True)
    ones = (candidate & (z >= t + 1)).sum(-1, keepdims=True)
    tau = (total + ones - case.num_selected) / jnp.maximum(active.sum(-1, keepdims=True), 1)
    few = candidate.sum(-1, keepdims=True) <= case.num_selected
    gates = jnp.where(few | (z >= t + 1), 1, jnp.where(active, z - tau, 0))
    gates = jnp.where(window, 1, gates)
    seen = window | candidate & (rank < case.num_selected)
    gates, seen, k, v = (
        jnp.repeat(jnp.broadcast_to(x, (case.batch, case.kv_heads, *x.shape[2:])), n, axis=1)
        for x in (gates, seen, k, v)
        for n in [case.heads // case.kv_heads]
    )
    logits = jnp.einsum("bhqd,bhqk,bhkd->bhqk", q, gates, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
    return jnp.einsum("bhqk,bhqk,bhkd->bhqd", weights, gates, v)


@partial(jax.jit, static_argnums=0)
def dense_pulled(case: Case, ids, inputs: Inputs, weight):
    out, pull = jax.vjp(partial(dense, case, ids), *inputs)
    return out, pull(weight)


@pytest.mark.slow
def test_every_query_gets_what_the_definition_says(subtests: pytest.Subtests) -> None:
    for case in CASES:
        with subtests.test(case=case):
            inputs, ids = made(case)
            out, _ = attend(case, inputs, ids)
            np.testing.assert_allclose(out, brute_force(case, inputs, ids), rtol=0, atol=3e-6)


def test_gradients_are_those_of_the_dense_form(subtests: pytest.Subtests) -> None:
    for case in CASES[:6]:
        with subtests.test(case=case):
            inputs, ids = made(case)
            weight = normal(5, *inputs.q.shape)
            out, gradients = attend(case, inputs, ids, weight)
            shape = case._replace(documents=1, spread=1.0)  # one compilation for all that have it
            expected, exact = dense_pulled(shape, ids, inputs, weight)
            np.testing.assert_allclose(out, expected, rtol=0, atol=3e-6)
            for ours, theirs in zip(gradients, exact, strict=True):
                scale = max(1.0, float(jnp.abs(theirs).max()))
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * scale)


def test_gradients_are_slopes_of_the_definition(subtests: pytest.Subtests) -> None:
    """Central differences of the brute force in float64, along one direction for each input."""
    for spread in [0.05, 1.0]:
        with subtests.test(spread=spread):
            case = CASES[4]._replace(spread=spread)
            inputs, ids = made(case)
            weight = np.asarray(normal(5, *inputs.q.shape))
            _, gradients = attend(case, inputs, ids, jnp.asarray(weight))
            exact = Inputs(*(np.asarray(x, np.float64) for x in inputs))
            step = 1e-6  # so small that no score crosses another
            for name, gradient in gradients._asdict().items():
                value = getattr(exact, name)
                direction = np.random.default_rng(len(name)).normal(size=value.shape)
                high, low = (
                    float((weight * brute_force(case, exact._replace(**{name: end}), ids)).sum())
                    for end in (value + step * direction, value - step * direction)
                )
                slope = (high - low) / (2 * step)
                assert float((np.asarray(gradient) * direction).sum()) == pytest.approx(
                    slope, rel=1e-4
                )


gates_of = jax.jit(sparsek.sparsek, static_argnums=1)

ENTRIES = 12


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(
        st.floats(-30, 30, width=32) | st.sampled_from([-1.0, 0.0, 0.5, 1.0]),
        min_size=ENTRIES,
        max_size=ENTRIES,
    ),
    valid=st.lists(st.booleans(), min_size=ENTRIES, max_size=ENTRIES),
    num_selected=st.sampled_from([1, 3, 11]),
)
@example(scores=[0.0] * ENTRIES, valid=[True] * ENTRIES, num_selected=3)
@example(scores=[5.0] * 3 + [0.0] * 9, valid=[True] * ENTRIES, num_selected=3)
def test_the_operator_is_the_nearest_point_of_its_set(scores, valid, num_selected) -> None:
    z, kept = np.array(scores, np.float32), np.array(valid)
    p = np.asarray(gates_of(jnp.asarray(z), num_selected, jnp.asarray(kept)), np.float64)
    assert (p[~kept] == 0).all()
    p, z = p[kept], z[kept].astype(np.float64)
    if len(p) <= num_selected:
        assert (p == 1).all()
        return
    tolerance = 2e-5  # a few units in the last place of scores up to 30
    np.testing.assert_allclose(p.sum(), num_selected, atol=ENTRIES * tolerance)
    assert ((p >= 0) & (p <= 1)).all()
    np.testing.assert_allclose(
        p, np.clip(z - threshold(z, num_selected), 0, 1), rtol=0, atol=tolerance
    )
    # Nearest: moving weight from any entry to any other that can take it leads away from z.
    residual = z - p
    gives, takes = p > tolerance, p < 1 - tolerance
    if gives.any() and takes.any():
        assert residual[takes].max() <= residual[gives].min() + 2 * tolerance


@jax.jit
def gradient_of_gates(scores: jax.Array, weight: jax.Array) -> jax.Array:
    return jax.grad(lambda z: (sparsek.sparsek(z, 4) * weight).sum())(scores)


def test_the_operators_gradient_is_its_slope() -> None:
    z, weight = np.asarray(normal(0, 3, 40), np.float64), np.asarray(normal(1, 3, 40))

    def gates(z: np.ndarray) -> np.ndarray:
        return np.array([np.clip(row - threshold(row, 4), 0, 1) for row in z])

    direction = np.asarray(normal(2, 3, 40), np.float64)
    slope = ((gates(z + 1e-6 * direction) - gates(z - 1e-6 * direction)) * weight).sum() / 2e-6
    gradient = gradient_of_gates(jnp.asarray(z, jnp.float32), jnp.asarray(weight))
    assert float((np.asarray(gradient) * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_gates_that_rest_on_their_bounds_send_nothing_back() -> None:
    scores = jnp.broadcast_to(jnp.where(jnp.arange(40) < 4, 1.0, 0.0), (3, 40))
    gradient = gradient_of_gates(scores, normal(1, 3, 40))
    np.testing.assert_array_equal(gradient, 0)


def distributions(time: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "as at the start": 2e-4 * draw.normal(size=time) + 1e-6 * np.arange(time),
        "nearly equal and far from 0": 5 + 1e-3 * draw.normal(size=time),
        "equal": np.zeros(time),
        "in steps, many a whole 1 apart": np.round(4 * draw.normal(size=time)) / 4,
        "rising": np.linspace(0, 50, time) + draw.normal(size=time),
        "heavy-tailed": np.exp(2 * draw.normal(size=time)),
    }


LONG = 1200


@jax.jit
def sums_of_gates(scores, segment_ids, marks):
    """For every query, the mean of gate times mark: queries are 0, so all weigh the same."""
    v = jnp.asarray(marks, jnp.float32)[None, None]
    return sparsek.attend(
        v * 0,
        v,
        v,
        jnp.asarray(scores, jnp.float32)[None, None],
        num_selected=20,
        window_including_self=3,
        segment_ids=segment_ids[None],
    )[0, 0]


def test_gates_of_long_texts_are_exact(subtests: pytest.Subtests) -> None:
    for kind in distributions(1):
        with subtests.test(kind=kind):
            window, num_selected = 3, 20
            scores = distributions(LONG)[kind].astype(np.float32)
            draw = np.random.default_rng(1).normal(size=LONG)
            marks = np.stack([np.ones(LONG), np.arange(LONG) / LONG, draw], axis=1)
            out = np.asarray(sums_of_gates(scores, np.zeros(LONG, int), marks))
            for i in (25, 30, 250, 255, 256, 777, 1199):
                before = scores[: i - window + 1].astype(np.float64)
                selected = np.argsort(-before, kind="stable")[:num_selected]
                gates = np.clip(before[selected] - threshold(before, num_selected), 0, 1)
                expected = gates @ marks[selected] + marks[i - window + 1 : i + 1].sum(0)
                shown = out[i] * (len(selected) + window)
                np.testing.assert_allclose(shown, expected, rtol=0, atol=num_selected * 3e-6)


def replaced(inputs: Inputs, where: np.ndarray) -> Inputs:
    """The inputs with others, three times as large, at these positions."""
    others, _ = made(COMMON._replace(spread=1.5))
    return Inputs(
        *(
            jnp.where(where.reshape(-1, *[1] * (x.ndim - 3)), 3 * jnp.flip(other), x)
            for x, other in zip(inputs, others, strict=True)
        )
    )


@pytest.mark.slow
def test_later_tokens_change_nothing_before_them() -> None:
    inputs, ids = made(COMMON._replace(documents=2, spread=0.5))
    before, _ = attend(COMMON, inputs, ids)
    for place in (5, 16, 39):
        after, _ = attend(COMMON, replaced(inputs, np.arange(COMMON.time) >= place), ids)
        np.testing.assert_array_equal(after[:, :, :place], before[:, :, :place])
        assert not np.array_equal(after[:, :, place], before[:, :, place])


def test_gates_of_long_texts_show_nothing_of_what_is_not_theirs(subtests: pytest.Subtests) -> None:
    """Not in the last bit, though tau is searched for from wherever the chunk before ended."""
    for kind in distributions(1):
        with subtests.test(kind=kind):
            scores = distributions(LONG)[kind]
            marks = np.random.default_rng(1).normal(size=(LONG, 3))
            index = np.arange(LONG)
            ids = np.searchsorted([320, 777], index, side="right")  # one begins with a chunk
            before = np.asarray(sums_of_gates(scores, ids, marks))
            others = np.random.default_rng(2).normal(size=LONG)
            for mine in (index < 700, ids == 0, ids == 1, ids == 2):
                after = np.asarray(sums_of_gates(np.where(mine, scores, others), ids, marks))
                np.testing.assert_array_equal(after[mine], before[mine])
                assert not np.array_equal(after[~mine], before[~mine])


def test_scores_that_are_no_numbers_hang_nothing_and_spoil_nothing_earlier(
    subtests: pytest.Subtests,
) -> None:
    for what in [np.nan, np.inf, -np.inf]:
        with subtests.test(what=what):
            inputs, ids = made(COMMON)
            before, _ = attend(COMMON, inputs, ids)
            place = 22
            after, _ = attend(
                COMMON, inputs._replace(scores=inputs.scores.at[:, :, place].set(what)), ids
            )
            np.testing.assert_array_equal(after[:, :, :place], before[:, :, :place])


def test_other_documents_change_nothing() -> None:
    inputs, _ = made(COMMON._replace(spread=0.5))
    ids = jnp.asarray(np.tile(np.repeat([0, 1, 2], [21, 26, 13]), (2, 1)))
    weight = normal(5, *inputs.q.shape)
    before, _ = attend(COMMON, inputs, ids)
    for id in range(3):
        other = np.asarray(ids[0] != id)
        after, _ = attend(COMMON, replaced(inputs, other), ids)
        np.testing.assert_array_equal(after[:, :, ~other], before[:, :, ~other])
        assert not np.array_equal(after[:, :, other], before[:, :, other])
        _, gradients = attend(COMMON, inputs, ids, jnp.where(other[:, None], 0, weight))
        for gradient in gradients:
            assert (gradient[:, :, other] == 0).all()
            assert (gradient[:, :, ~other] != 0).any()


def test_decoding_equals_attending_position_by_position(subtests: pytest.Subtests) -> None:
    for spread in [0.0, 0.01, 2.0]:
        with subtests.test(spread=spread):
            case = COMMON._replace(spread=spread)
            inputs, ids = made(case)
            full, _ = attend(case, inputs, ids)
            # A cache in any order, larger than the text.
            slots = np.random.default_rng(0).permutation(70)
            q, *cached = inputs
            beyond = [((0, 0), (0, 0), (0, 10), *[(0, 0)] * (x.ndim - 3)) for x in cached]
            cache = [
                jnp.pad(x, pad, constant_values=50.0)[:, :, slots]
                for x, pad in zip(cached, beyond, strict=True)
            ]
            for i in range(0, case.time, 3):
                # What is not written yet, or never, is empty.
                positions = jnp.asarray(np.where(slots <= i, slots, -1))
                out = decoded(q[:, :, i : i + 1], *cache, jnp.asarray(i), positions)
                np.testing.assert_allclose(
                    np.asarray(out)[:, :, 0], full[:, :, i], rtol=0, atol=1e-5
                )


@jax.jit
def decoded(q, k, v, scores, query_position, positions) -> jax.Array:
    return sparsek.decode(
        q,
        k,
        v,
        scores,
        query_position=query_position,
        positions=positions,
        num_selected=COMMON.num_selected,
        window_including_self=COMMON.window,
    )


def test_bfloat16_keeps_scores_and_their_gradient_in_float32() -> None:
    inputs, ids = made(COMMON)
    half = Inputs(*(x.astype(jnp.bfloat16) for x in inputs[:3]), inputs.scores)
    rounded = Inputs(*(x.astype(jnp.float32) for x in half))
    weight = normal(5, *inputs.q.shape).astype(jnp.bfloat16)
    out, gradients = attend(COMMON, half, ids, weight)
    exact, expected = attend(COMMON, rounded, ids, weight.astype(jnp.float32))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), exact, rtol=0, atol=2e-2)
    dtypes = [jnp.bfloat16] * 3 + [jnp.float32]
    for ours, theirs, dtype in zip(gradients, expected, dtypes, strict=True):
        assert ours.dtype == dtype
        # bfloat16 has 8 bits: 0.4 % per number, and sums of some dozens of them.
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, rtol=0, atol=2e-2 * scale)


KEYS = jax.random.key_data(jax.random.split(jax.random.key(7), 4))
DROPPED = Case(4, 8, 2, 200, 4, 6, 8, 1, 1.0)


@jax.jit
def dropped(inputs: Inputs, keys: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The output, and the gradient of its sum by the values."""

    def run(v: jax.Array) -> jax.Array:
        return sparsek.attend(
            *inputs._replace(v=v),
            num_selected=DROPPED.num_selected,
            window_including_self=DROPPED.window,
            dropout_keys=keys,
            dropout_rate=0.25,
            chunk=DROPPED.chunk,
        )

    out, pull = jax.vjp(run, inputs.v)
    return out, pull(jnp.ones_like(out))[0]


@pytest.mark.slow
def test_dropout_keeps_the_mean_and_no_two_chunks_share_a_mask() -> None:
    """Gates of 1, logits and values alike: every output is a mean of ten kept or dropped ones."""
    inputs, _ = made(DROPPED)
    first_four = jnp.where(jnp.arange(200) < 4, 9.0, 0.0)  # far ahead of all others
    inputs = Inputs(inputs.q * 0, inputs.k, jnp.ones_like(inputs.v), inputs.scores * 0 + first_four)
    out = np.asarray(dropped(inputs, KEYS)[0][:, :, 16:, 0])
    # 5,888 means of ten numbers of variance 1/3
    assert out.mean() == pytest.approx(1.0, abs=0.01)
    assert out.var() == pytest.approx(1 / 30, rel=0.1)
    chunks = out.reshape(4, 8, 23, 8)
    neighbors = chunks[:, :, :-1].ravel(), chunks[:, :, 1:].ravel()
    assert abs(np.corrcoef(*neighbors)[0, 1]) < 0.06  # the standard error is 0.013


def test_dropout_is_an_examples_own_and_the_same_in_the_gradient() -> None:
    inputs, _ = made(DROPPED)
    out, gradient = (np.asarray(x) for x in dropped(inputs, KEYS))
    moved, _ = dropped(Inputs(*(x[::-1] for x in inputs)), KEYS[::-1])
    np.testing.assert_array_equal(out, np.asarray(moved)[::-1])
    # Linear in the values: with the same masks, sum of outputs = gradient . values.
    assert float((gradient * inputs.v).sum()) == pytest.approx(float(out.sum()), rel=1e-4)


def temporary_bytes(attention: Callable[..., jax.Array], time: int) -> int:
    """What the compiled forward and backward pass hold besides arguments and results."""
    heads, dim = 4, 32
    row = jax.ShapeDtypeStruct((1, heads, time, dim), jnp.float32)
    scores = jax.ShapeDtypeStruct((1, heads, time), jnp.float32)

    def both(q, k, v, scores, dout):
        return jax.vjp(attention, q, k, v, scores)[1](dout)

    compiled = jax.jit(both).lower(row, row, row, scores, row).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def plain_attention(q, k, v, scores) -> jax.Array:
    causal = jnp.tril(jnp.ones((q.shape[2], q.shape[2]), bool))
    logits = jnp.where(causal, q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1) @ v


@pytest.mark.slow
def test_memory_grows_with_the_time_and_is_below_dense_attentions() -> None:
    ours = partial(sparsek.attend, num_selected=64, window_including_self=64)
    small, large = temporary_bytes(ours, 2048), temporary_bytes(ours, 4096)
    assert large < 2.3 * small
    assert large < temporary_bytes(plain_attention, 4096) / 8
