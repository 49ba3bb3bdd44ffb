"""Adapters begin as nothing, train alone, and merge into a plain network that computes the same."""

import dataclasses
import re
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mainrun import config
from mainrun.data.batches import Batch
from mainrun.errors import UserError
from mainrun.model import lora
from mainrun.model.gpt import Params
from mainrun.model.initializers import Initializer
from mainrun.model.layers import Linear
from mainrun.training import step
from mainrun.training.optimizer import Optimizer
from mainrun.training.step import TrainState
from tests import variants
from tests.shown import shown
from tests.variants import CONTEXT, WIDTH, network, small, tokens

RANK, ALPHA = 3, 6.0
GPT = small(config.Gpt)
LAYERS = ("attention.qkv", "attention.out", "mlp.up", "mlp.down")  # of a block of that one


def models() -> dict[str, config.Network]:
    """One for each kind of attention; together they have every linear layer that there is."""
    found = {}
    for attention in variants.attentions().values():
        if attention.kind not in found:
            gated = dataclasses.replace(attention, output_gate=True)
            found[attention.kind] = small(config.Gpt, num_layers=1, attention=gated)
    ranked = dataclasses.replace(found["latent"].attention, query_rank=6)
    found["latent"] = dataclasses.replace(found["latent"], attention=ranked)
    # Widths that make the ways around and the skip connection project.
    found["sparse"] = small(
        config.UnetGpt,
        bottleneck_sizes=(8, 24),
        attention=found["sparse"].attention,
        mlp=small(config.DenseMlp, kind="swiglu"),
        norm_position="post",
        layer_scale=0.3,
    )
    found["moe"] = small(config.Gpt, num_layers=1, mlp=small(config.MixtureOfExperts))
    return found


MODELS = models()
every_model = shown("plain", MODELS, {"moe"}.__contains__)


def adapted(plain: config.Network, *targets: str, dropout: float = 0.5) -> config.Network:
    """The same network with adapters, on everything where no targets are named."""
    adapters = config.Lora(rank=RANK, alpha=ALPHA, dropout=dropout, targets=targets or ("all",))
    return dataclasses.replace(plain, lora=adapters)


@cache
def fresh(settings: config.Network) -> Params:
    return jax.jit(network(settings).init)(jax.random.key(0))


def moved(params: Params, seed: int) -> Params:
    """Away from their beginning, so that every part has a say."""
    draw = np.random.default_rng(seed)
    return {n: a + 0.3 * draw.standard_normal(a.shape, np.float32) for n, a in params.items()}


@cache
def base(plain: config.Network) -> Params:
    return moved(fresh(plain), seed=0)


def new_adapters(settings: config.Network) -> Params:
    return lora.split(fresh(settings))[0]


@cache
def trained(settings: config.Network) -> Params:
    """A base, and adapters that make a difference to it."""
    plain = dataclasses.replace(settings, lora=None)
    return base(plain) | moved(new_adapters(settings), seed=1)


@cache
def forward(settings: config.Network) -> Any:
    return jax.jit(lambda params, keys: network(settings).bind(params)(tokens(), None, keys))


def logits(settings: config.Network, params: Params) -> np.ndarray:
    return np.asarray(forward(settings)(params, None))


def layers_of(settings: config.Network) -> set[str]:
    """Those with an adapter."""
    names = network(settings)._paths
    return {name.rpartition(".adapter.")[0] for name in names if lora.is_adapter(name)}


@pytest.mark.slow
@every_model
def test_fresh_adapters_change_nothing_and_merged_ones_what_they_did(
    plain: config.Network,
) -> None:
    """Up to rounding: the compiler joins other operations where there are adapters."""
    settings, before = adapted(plain), logits(plain, base(plain))
    begun = logits(settings, base(plain) | new_adapters(settings))
    after = logits(settings, trained(settings))
    merged = lora.merged(trained(settings), settings.lora)
    scale = np.abs(after).max()
    assert np.abs(after - before).max() > 0.1 * scale
    np.testing.assert_allclose(begun, before, atol=1e-5)
    np.testing.assert_allclose(logits(plain, merged), after, atol=1e-5 * max(1, scale))


@pytest.mark.slow
def test_merging_adds_alpha_over_rank_times_the_product_and_leaves_its_argument_alone() -> None:
    settings = adapted(GPT, "qkv")
    before = trained(settings)
    kept = dict(before)
    merged = lora.merged(before, settings.lora)
    layer = "blocks.1.attention.qkv"
    down, up = (
        np.asarray(before[f"{layer}.adapter.{part}"], np.float64) for part in ("down", "up")
    )
    expected = np.asarray(before[f"{layer}.kernel"]) + ALPHA / RANK * (down @ up)
    np.testing.assert_allclose(merged[f"{layer}.kernel"], expected, atol=1e-6)
    assert list(merged) == list(base(GPT))
    assert all(merged[name] is before[name] for name in merged if "qkv.kernel" not in name)
    assert before.keys() == kept.keys()
    assert all(before[name] is kept[name] for name in kept)


@pytest.mark.slow
def test_latent_attention_decodes_with_its_adapters() -> None:
    """Absorbed: the up-projection is not applied there but multiplied into others."""
    settings = adapted(MODELS["latent"])
    text = tokens()

    @jax.jit
    def one_by_one(params: Params) -> jax.Array:
        model = network(settings).bind(params)
        features, memory = model.go_on(text[:, :4], 0, model.empty_memory(2, CONTEXT))
        following, _ = model.go_on(text[:, 4:5], 4, memory)
        return model.logits(jnp.concatenate([features, following], axis=1))

    after = trained(settings)
    expected = logits(settings, after)[:, :5]
    without = {n: jnp.zeros_like(a) if "kv_up.adapter" in n else a for n, a in after.items()}
    assert np.abs(one_by_one(without) - expected)[:, 4].max() > 0.01
    np.testing.assert_allclose(one_by_one(after), expected, atol=1e-4)


@every_model
def test_all_else_has_the_names_and_the_beginning_that_it_has_without(
    plain: config.Network,
) -> None:
    settings = adapted(plain)
    new, rest = lora.split(fresh(settings))
    assert list(rest) == list(fresh(plain))
    for name, array in fresh(plain).items():
        np.testing.assert_array_equal(rest[name], array, err_msg=name)
    for name, array in new.items():
        layer, _, part = name.rpartition(".adapter.")
        inputs, outputs = fresh(plain)[f"{layer}.kernel"].shape
        assert array.shape == ((inputs, RANK) if part == "down" else (RANK, outputs))
        assert (array != 0).all() if part == "down" else (array == 0).all()
    draws = {np.asarray(array).tobytes() for name, array in new.items() if name.endswith("down")}
    assert len(draws) == len(new) / 2, "two adapters begin alike"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["all"], LAYERS),
        (["attention"], LAYERS[:2]),
        (["mlp"], LAYERS[2:]),
        (["attention.qkv", "down"], ("attention.qkv", "mlp.down")),
        (["qkv", "attention"], LAYERS[:2]),
    ],
    ids=str,
)
def test_targets_name_layers_by_whole_words(targets: list[str], expected: tuple[str]) -> None:
    settings = adapted(GPT, *targets)
    assert layers_of(settings) == {f"blocks.{i}.{name}" for i in (0, 1) for name in expected}


def test_a_dotted_name_may_name_one_block() -> None:
    deep = dataclasses.replace(GPT, num_layers=11)
    assert layers_of(adapted(deep, "blocks.1.mlp.up")) == {"blocks.1.mlp.up"}
    assert layers_of(adapted(deep, "blocks.1")) == {f"blocks.1.{name}" for name in LAYERS}


def test_every_linear_layer_can_be_named() -> None:
    names = ".".join(name for plain in MODELS.values() for name in layers_of(adapted(plain)))
    assert {word for word in names.split(".") if not word.isdigit()} == {
        "blocks", "skips", "attention", "mlp", "around", "project",
        "qkv", "out", "gate", "importance", "q_down", "q_up", "kv_down", "kv_up", "up", "down",
    }  # fmt: skip


def test_experts_are_no_linear_layers() -> None:
    experts = MODELS["moe"]
    assert layers_of(adapted(experts)) == {f"blocks.0.{name}" for name in LAYERS[:2]}
    with pytest.raises(UserError, match="targets=mlp names no linear layer"):
        network(adapted(experts, "attention", "mlp"))


@pytest.mark.parametrize(
    "target", ["atention", "qk", "v_up", "query", "kernel", "token_embedding", "."]
)
def test_a_target_that_names_nothing_is_refused_with_what_there_is(target: str) -> None:
    with pytest.raises(UserError) as caught:
        network(adapted(MODELS["latent"], "mlp", target))
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith(f"model.lora.targets={target} names no linear layer")
    assert "all, attention, blocks, down, gate, kv_down, kv_up, mlp, out, q_down, q_up, up" in said
    example = re.findall(r"blocks\.\d[\w.]+", said)
    assert layers_of(adapted(MODELS["latent"], *example)) == set(example)


def batch() -> Batch:
    text = np.asarray(tokens(4, CONTEXT + 1, seed=3), np.int32)
    shape = (4, CONTEXT)
    return Batch(text[:, :-1], text[:, 1:], np.zeros(shape, np.int32), np.ones(shape, np.float32))


def train(
    settings: config.Network, on: Params, precision: str = "float32"
) -> tuple[list[TrainState], list[float]]:
    """The states before and after some steps, and the losses. No weight decay moves anything."""
    rate = optax.constant_schedule(1e-2)
    net, optimizer = network(settings, precision), Optimizer(*optax.adam(rate))
    training = config.Training(precision=precision)
    one = jax.jit(
        step.make_train_step(net, optimizer, rate, training, micro_batches=1, mask_documents=False)
    )
    state = jax.jit(lambda params: step.init(net, optimizer, jax.random.key(0), training, params))(
        on
    )
    states, losses = [state], []
    for _ in range(4):
        state, metrics = one(state, batch())
        states.append(state)
        losses.append(float(metrics.loss))
    return states, losses


@every_model
def test_adapters_train_all_of_them_and_nothing_else(plain: config.Network) -> None:
    settings = adapted(plain, dropout=0.1)
    (first, *_, last), losses = train(settings, base(plain))
    assert losses[-1] < losses[0]
    assert first.params.keys() == last.params.keys() == new_adapters(settings).keys()
    for name, array in first.params.items():
        assert (last.params[name] != array).any(), name
    assert last.frozen.keys() == base(plain).keys()
    for name, array in base(plain).items():
        np.testing.assert_array_equal(last.frozen[name], array, err_msg=name)
    count = sum(RANK * sum(base(plain)[f"{name}.kernel"].shape) for name in layers_of(settings))
    assert sum(array.size for array in last.params.values()) == count
    moments = [leaf.size for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim]
    assert sum(moments) == 2 * count


@pytest.mark.slow
def test_bfloat16_trains_adapters_in_float32() -> None:
    plain = MODELS["causal"]
    (*_, last), losses = train(adapted(plain, dropout=0.1), base(plain), "bfloat16")
    assert losses[-1] < losses[0]
    assert {array.dtype for array in last.params.values()} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_without_adapters_a_base_is_trained_whole() -> None:
    plain = MODELS["causal"]
    (first, *_, last), losses = train(plain, base(plain))
    assert losses[-1] < losses[0]
    assert last.frozen == {}
    for name, array in base(plain).items():
        np.testing.assert_array_equal(first.params[name], array)
        assert (last.params[name] != array).any(), name


class Pair(nnx.Module):
    """Two linear layers with a random kernel and a fresh adapter each."""

    def __init__(self, dropout: float) -> None:
        rngs, init = variants.rngs(), Initializer.of(GPT)
        self.one = Linear(WIDTH, WIDTH, init=init, bias=False, rngs=rngs)
        self.two = Linear(WIDTH, WIDTH, init=init, bias=False, rngs=rngs)
        lora.attach(self, config.Lora(rank=WIDTH, dropout=dropout, targets=("all",)), rngs=rngs)

    def only_adapted(self) -> "Pair":
        """With kernels of zeros, and adapters that give back what they are given."""
        for layer in (self.one, self.two):
            assert layer.adapter is not None
            layer.kernel[...] = jnp.zeros((WIDTH, WIDTH))
            layer.adapter.down[...] = jnp.eye(WIDTH)
            layer.adapter.up[...] = jnp.eye(WIDTH) / layer.adapter.factor
        return self


def dropout_keys(rows: int) -> jax.Array:
    return jax.random.key_data(jax.random.split(jax.random.key(0), rows))


def test_a_fresh_adapter_changes_no_bit() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, CONTEXT, WIDTH), np.float32))
    layer = Pair(dropout=0.25).one
    np.testing.assert_array_equal(layer(x, dropout_keys(2)), x @ layer.kernel[...])
    np.testing.assert_array_equal(layer.weight(), layer.kernel[...])


def test_adapters_drop_numbers_of_their_own_when_there_are_keys() -> None:
    x, keys = jnp.ones((3, CONTEXT, WIDTH)), dropout_keys(3)
    pair = Pair(dropout=0.25).only_adapted()
    one, two = np.asarray(pair.one(x, keys)), np.asarray(pair.two(x, keys))
    np.testing.assert_array_equal(pair.one(x, keys), one)
    for mask in (one, two):
        np.testing.assert_allclose(mask[mask != 0], 1 / 0.75, rtol=1e-6)
        # 1152 draws: the share's standard error is 0.013.
        assert (mask == 0).mean() == pytest.approx(0.25, abs=0.05)
    assert (one != two).any(), "two layers share a mask"
    assert (one[0] != one[1]).any(), "two examples share a mask"
    np.testing.assert_array_equal(pair.one(x), x)
    np.testing.assert_array_equal(Pair(dropout=0.0).only_adapted().one(x, keys), x)


@every_model
def test_in_training_every_adapter_has_its_dropout(plain: config.Network) -> None:
    """Each by itself makes noise; the network has no other dropout."""
    settings, keys = adapted(plain), dropout_keys(2)
    for layer in layers_of(settings):
        others = (n for n in new_adapters(settings) if not n.startswith(f"{layer}."))
        alone = trained(settings) | {n: jnp.zeros_like(trained(settings)[n]) for n in others}
        drawn, other = (forward(settings)(alone, k) for k in (keys, keys + 1))
        assert np.abs(drawn - other).max() > 1e-4, layer
