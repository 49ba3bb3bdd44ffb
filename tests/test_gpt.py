"""The network as a whole: its size, what is said of one setting, attention against a loop.

What holds for every model is in test_laws."""

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
        mlp=config.DenseMlp(hidden=32),
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


def test_grouped_attention_is_that_of_repeated_keys() -> None:
    q, k, v = (
        jax.random.normal(jax.random.key(i), (2, heads, 5, 4)) for i, heads in enumerate((6, 2, 2))
    )
    mask = jnp.tril(jnp.ones((5, 5), bool))[None, None]
    repeated = [jnp.repeat(x, 3, axis=1) for x in (k, v)]  # query head h reads key head h // 3
    np.testing.assert_allclose(attend(q, k, v, mask), attend(q, *repeated, mask), atol=1e-6)


def test_rows_that_pad_the_vocabulary_are_never_read() -> None:
    plain, padded = tiny(), tiny(pad_vocab_to_multiple_of=64)
    params = some_params(padded)
    table = params["token_embedding.embedding"]
    assert table.shape == (64, 16)
    ours = padded.bind(params)(some_tokens())
    assert ours.shape[-1] == VOCAB
    cut = params | {"token_embedding.embedding": table[:VOCAB]}
    np.testing.assert_allclose(ours, plain.bind(cut)(some_tokens()), atol=1e-5)
    gradient = jax.grad(lambda p: jnp.square(padded.bind(p)(some_tokens())).sum())(params)
    np.testing.assert_array_equal(gradient["token_embedding.embedding"][VOCAB:], 0)


def test_logits_stay_below_their_cap() -> None:
    network = tiny(logit_softcap=2.0)
    free, params = tiny(), some_params(network)
    capped, whole = (n.bind(params)(some_tokens()) for n in (network, free))
    assert float(jnp.abs(whole).max()) > 2
    np.testing.assert_allclose(capped, 2 * np.tanh(np.asarray(whole) / 2), atol=1e-5)


def test_a_deeper_networks_residual_branches_can_begin_smaller() -> None:
    plain, scaled = (tiny(scale_residual_init=on).init(jax.random.key(0)) for on in (False, True))
    for name, array in plain.items():
        factor = 0.5 if name.endswith(("out.kernel", "down.kernel")) else 1.0  # 1 / √(2 · 2)
        np.testing.assert_allclose(scaled[name], factor * array, rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_skips_begin_shut_and_join_mirrored_halves() -> None:
    sizes = {"d_model": 16, "bottleneck_sizes": (12, 8, 8, 12), "dropout": 0.0}
    heads = {"attention": config.CausalAttention(num_heads=2)}
    networks = [
        Network(
            config.UnetGpt(**sizes, **heads, skip_connections=on),
            vocab_size=VOCAB, context_length=CONTEXT, precision="float32",
        )
        for on in (True, False)
    ]  # fmt: skip
    with_skips = networks[0].init(jax.random.key(0))
    gates = {n: a.shape for n, a in with_skips.items() if n.startswith("skips.")}
    # Five blocks of widths 16 → 12 → 8 → 8 → 12 → 16: outputs of 0 and 1 to inputs of 4 and 3.
    assert gates == {"skips.0.gate": (12,), "skips.1.gate": (8,)}
    without = {n: a for n, a in with_skips.items() if n not in gates}
    np.testing.assert_array_equal(
        networks[0].bind(with_skips)(some_tokens()), networks[1].bind(without)(some_tokens())
    )


def test_dropout_is_on_in_training_and_nowhere_else() -> None:
    network = tiny(dropout=0.5)
    model = network.bind(some_params(network))
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    once, again = (model(some_tokens(), None, keys) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert (once != model(some_tokens())).any()
    assert (once != model(some_tokens(), None, keys + 1)).any()


def test_a_latent_cache_is_smaller_than_keys_and_values() -> None:
    latent = config.LatentAttention(num_heads=4, kv_rank=4, rotary_dim=2)
    network = Network(
        config.Gpt(d_model=16, num_layers=1, position="rotary", attention=latent),
        vocab_size=VOCAB, context_length=CONTEXT, precision="float32",
    )  # fmt: skip
    (cache,) = network.bind(network.init(jax.random.key(0))).empty_memory(1, CONTEXT)
    assert {name: array.shape[-1] for name, array in cache.items() if name != "positions"} == {
        "latent": 4,
        "rotary": 2,
    }


def test_a_window_remembers_no_more_than_it_sees() -> None:
    attention = config.CausalAttention(num_heads=2, window_including_self=5)
    network = Network(
        config.Gpt(d_model=16, num_layers=1, attention=attention),
        vocab_size=VOCAB, context_length=CONTEXT, precision="float32",
    )  # fmt: skip
    (cache,) = network.bind(network.init(jax.random.key(0))).empty_memory(1, CONTEXT)
    assert cache["k"].shape == (1, 2, 5, 8)
