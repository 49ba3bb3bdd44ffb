"""The network as a whole: its size, its laws, and attention against a loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import config
from mainrun.model.attention import attend
from mainrun.model.gpt import Network, Params, num_parameters

VOCAB, CONTEXT = 50, 12


def tiny(precision: str = "float32", **changes: object) -> Network:
    settings = config.Gpt(
        d_model=16,
        num_layers=2,
        mlp=config.GeluMlp(hidden=32),
        attention=config.CausalAttention(num_heads=2),
        **changes,
    )
    return Network(settings, vocab_size=VOCAB, context_length=CONTEXT, precision=precision)


def some_params(network: Network) -> Params:
    """Random, and not near zero, so that every part has a say."""
    params = network.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(params))
    return {
        name: array + 0.3 * jax.random.normal(key, array.shape)
        for key, (name, array) in zip(keys, params.items(), strict=True)
    }


def some_tokens(seed: int = 0, batch: int = 2, time: int = CONTEXT) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, time), 0, VOCAB)


def test_the_baseline_has_the_original_number_of_parameters() -> None:
    loaded = config.load(config.default_config_root() / "base" / "baseline.yaml")
    network = Network(loaded.model, vocab_size=16_000, context_length=128, precision="float32")
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    assert num_parameters(shapes) == 27_172_864


def test_untied_embeddings_cost_one_more_table() -> None:
    counts = [
        num_parameters(tiny(tie_embeddings=tied).init(jax.random.key(0))) for tied in (True, False)
    ]
    assert counts[1] - counts[0] == VOCAB * 16


def test_the_first_loss_is_that_of_a_uniform_guess() -> None:
    network = tiny()
    logits = network.bind(network.init(jax.random.key(0)))(some_tokens())
    loss = -jax.nn.log_softmax(logits).mean()
    assert float(loss) == pytest.approx(np.log(VOCAB), abs=0.1)


@pytest.mark.parametrize("documents", [False, True])
def test_later_tokens_change_nothing_before_them(documents: bool) -> None:
    network = tiny()
    model, tokens = network.bind(some_params(network)), some_tokens()
    segments = jnp.cumsum(tokens % 4 == 0, axis=1) if documents else None
    changed = tokens.at[:, 9].set((tokens[:, 9] + 1) % VOCAB)
    before, after = model(tokens, segments), model(changed, segments)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (before[:, 9] != after[:, 9]).any()


def test_other_documents_change_nothing_and_have_no_gradient() -> None:
    network = tiny()
    params, tokens = some_params(network), some_tokens(batch=1)
    segments = jnp.array([[0] * 5 + [1] * 7])
    changed = tokens.at[:, 2].set((tokens[:, 2] + 1) % VOCAB)
    model = network.bind(params)
    np.testing.assert_array_equal(model(tokens, segments)[:, 5:], model(changed, segments)[:, 5:])
    assert (model(tokens)[:, 5:] != model(changed)[:, 5:]).any()

    def later(table: jax.Array) -> jax.Array:
        bound = network.bind(params | {"position_embedding.embedding": table})
        return bound(tokens, segments)[:, 5:].sum()

    gradient = jax.grad(later)(params["position_embedding.embedding"])
    np.testing.assert_array_equal(gradient[:5], 0)
    assert (gradient[5:] != 0).any()


def test_gradients_reach_every_parameter() -> None:
    network = tiny(tie_embeddings=False)
    gradient = jax.grad(lambda p: jnp.square(network.bind(p)(some_tokens())).mean())(
        some_params(network)
    )
    # A key bias moves every score of a query alike, which softmax does not see.
    for name, array in gradient.items():
        if name.endswith("qkv.bias"):
            array = jnp.concatenate([array[:16], array[32:]])
        assert (jnp.abs(array) > 0).any(), name


def test_the_batch_does_not_change_a_row() -> None:
    network = tiny()
    model, tokens = network.bind(some_params(network)), some_tokens(batch=4)
    whole, alone = model(tokens), model(tokens[1:2])
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-5)  # float32, another tiling


def test_a_shorter_prefix_gives_the_same_logits() -> None:
    network = tiny()
    model, tokens = network.bind(some_params(network)), some_tokens()
    np.testing.assert_allclose(model(tokens)[:, :7], model(tokens[:, :7]), atol=1e-5)


def test_bfloat16_computes_near_float32_and_keeps_float32_parameters() -> None:
    wide = tiny()
    narrow = tiny("bfloat16")
    params = wide.init(jax.random.key(0))
    assert {a.dtype for a in narrow.init(jax.random.key(0)).values()} == {jnp.dtype("float32")}
    ours, theirs = narrow.bind(params)(some_tokens()), wide.bind(params)(some_tokens())
    assert ours.dtype == jnp.float32
    # 8 bits of mantissa through two blocks, on logits of scale 0.1
    np.testing.assert_allclose(ours, theirs, atol=5e-3)


def test_binding_parameters_twice_compiles_once() -> None:
    network = tiny()
    forward = jax.jit(lambda p, t: network.bind(p)(t))
    for seed in range(3):
        forward(network.init(jax.random.key(seed)), some_tokens(seed))
    assert forward._cache_size() == 1


def test_attention_is_the_softmax_average_of_a_loop() -> None:
    batch, heads, time, dim = 2, 3, 5, 4
    q, k, v = (
        np.asarray(jax.random.normal(jax.random.key(i), (batch, heads, time, dim)), np.float64)
        for i in range(3)
    )
    allowed = np.random.default_rng(0).random((batch, 1, time, time)) < 0.5
    allowed |= np.eye(time, dtype=bool)
    expected = np.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(time):
                seen = [j for j in range(time) if allowed[b, 0, i, j]]
                scores = np.array([q[b, h, i] @ k[b, h, j] / np.sqrt(dim) for j in seen])
                share = np.exp(scores - scores.max())
                expected[b, h, i] = (share / share.sum()) @ v[b, h, seen]
    ours = attend(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(allowed))
    np.testing.assert_allclose(ours, expected, atol=1e-6)
