"""Sampling against distributions that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun.model import generate
from tests.test_gpt import CONTEXT, VOCAB, some_params, tiny

EOS = 1


def drawn(network_params: tuple, prompt: jax.Array, seed: int = 0, **options: object) -> np.ndarray:
    options = {"max_tokens": CONTEXT - prompt.shape[1], "eos_id": EOS, **options}
    lengths = np.full(*prompt.shape, np.int32)
    key = jax.random.key(seed)
    prompts = np.asarray(prompt)
    return np.asarray(generate.generate(*network_params, prompts, lengths, key, **options))


@pytest.fixture(scope="module")
def model() -> tuple:
    network = tiny()
    return network, some_params(network)


def test_greedy_takes_the_likeliest_token_each_time(model: tuple) -> None:
    network, params = model
    forward = jax.jit(lambda tokens: network.bind(params)(tokens))
    expected = np.full((2, CONTEXT), EOS)
    expected[:, 0] = [EOS, 7]
    for place in range(1, CONTEXT):
        likeliest = np.asarray(forward(jnp.asarray(expected))[:, place - 1].argmax(-1))
        ended = (expected[:, 1:place] == EOS).any(1)
        expected[:, place] = np.where(ended, EOS, likeliest)
    ours = drawn(model, jnp.array([[EOS], [7]]), temperature=0.0)
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.slow
def test_the_first_draw_follows_the_models_distribution(model: tuple) -> None:
    network, params = model
    rows = 4000
    prompt = jnp.full((rows, 1), 3)
    first = drawn(model, prompt, max_tokens=1)[:, 1]
    expected = np.asarray(jax.nn.softmax(network.bind(params)(prompt[:1])[0, -1]))
    counts = np.bincount(first, minlength=VOCAB) / rows
    # The standard error of each share is at most 0.008.
    np.testing.assert_allclose(counts, expected, atol=0.035)


def test_nothing_follows_the_end_of_a_document(model: tuple) -> None:
    tokens = drawn(model, jnp.full((200, 1), EOS), temperature=2.0)
    for row in tokens:
        ends = np.flatnonzero(row[1:] == EOS)
        if len(ends):
            assert (row[1 + ends[0] :] == EOS).all()


def test_a_row_does_not_depend_on_the_rows_beside_it(model: tuple) -> None:
    many, few = (drawn(model, jnp.full((rows, 2), 4)) for rows in (6, 2))
    np.testing.assert_array_equal(many[:2], few)


def test_seeds_differ_and_repeat(model: tuple) -> None:
    prompt = jnp.full((4, 1), 3)
    np.testing.assert_array_equal(drawn(model, prompt, seed=1), drawn(model, prompt, seed=1))
    assert (drawn(model, prompt, seed=1) != drawn(model, prompt, seed=2)).any()


def logits_of(shares: list[float]) -> jax.Array:
    return jnp.log(jnp.array([shares]))


def left(logits: jax.Array, **options: float) -> list[int]:
    options = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **options}
    return np.flatnonzero(np.isfinite(generate.likeliest(logits, **options)[0])).tolist()


def test_prompts_of_different_lengths_read_as_each_alone(model: tuple) -> None:
    prompts = np.array([[3, 4, EOS, 6, 7], [8, 9, 0, 0, 0], [2, 3, 4, 0, 0]])
    lengths = np.array([5, 2, 3], np.int32)
    options = {"max_tokens": 4, "eos_id": EOS, "temperature": 0.0}
    key = jax.random.key(0)
    together = np.asarray(generate.generate(*model, prompts, lengths, key, **options))
    for row, length in enumerate(lengths):
        alone = drawn(model, prompts[row : row + 1, :length], **options)
        np.testing.assert_array_equal(together[row], alone[0])
        assert (together[row, :length] == prompts[row, :length]).all()
        assert (together[row, length + 4 :] == EOS).all()


def test_lengths_numbers_and_temperatures_share_one_compilation(model: tuple) -> None:
    before = generate._generate._cache_size()
    for length, tokens, top_k in ((4, 3, 0), (5, 2, 7), (7, 1, 3)):
        drawn(model, jnp.full((3, length), 4), max_tokens=tokens, top_k=top_k, temperature=0.5)
    assert generate._generate._cache_size() == before + 1


def test_top_k_leaves_k_and_top_p_the_fewest_that_make_up_p() -> None:
    logits = logits_of([0.1, 0.4, 0.2, 0.3])
    assert left(logits, top_k=2) == [1, 3]
    assert left(logits, top_k=9) == [0, 1, 2, 3]
    assert left(logits, top_p=0.39) == [1]
    assert left(logits, top_p=0.41) == [1, 3]
    assert left(logits, top_p=0.75) == [1, 2, 3]
    assert left(logits, top_p=1.0) == [0, 1, 2, 3]
    assert left(logits, temperature=0.0) == [1]


def test_temperature_sharpens(model: tuple) -> None:
    prompt = jnp.full((500, 1), 3)
    cold, hot = (
        len(set(drawn(model, prompt, max_tokens=1, temperature=t)[:, 1])) for t in (0.1, 3.0)
    )
    assert cold < hot
