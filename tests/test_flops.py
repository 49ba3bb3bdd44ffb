"""Operations of a model, against products counted in its program, XLA's own count and closed forms.

Products are counted in the jaxpr, where nothing but products is a product, so equality is exact.
XLA counts every addition besides, which is why its figure is only near.
"""

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from mainrun import config, parts
from mainrun.model import lora, masks, sparse
from mainrun.model.gpt import Network
from mainrun.training import flops
from tests import variants
from tests.variants import CONTEXT, small

BATCH = 2
PLAIN = config.Regularization()
DENSE = {
    name: settings
    for name, settings in variants.networks().items()
    if not isinstance(settings.attention, config.SparseKAttention)
}
# One of each kind: options only change shapes. Of experts, a loop goes backward too.
KINDS = {
    name: settings
    for name, settings in DENSE.items()
    if "=" not in name and not isinstance(settings.mlp, config.MixtureOfExperts)
}


def of_pairs(found: flops.Flops, settings: config.Network, time: int = CONTEXT) -> float:
    """What a program does that computes every pair of positions and hides most of them."""
    share = time / flops.mean_keys(settings.attention, time)
    return found.weights + share * found.attention + found.head


def products(jaxpr: Jaxpr | ClosedJaxpr) -> float:
    """Operations of all products in it; of what a loop of unknown length does, none."""
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        elif equation.primitive.name != "while":
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += times * sum(map(products, inner_programs(equation.params)))
    return total


def inner_programs(params: dict[str, Any]) -> list[Any]:
    return [value for value in params.values() if isinstance(value, Jaxpr | ClosedJaxpr)]


def program(network: Network, *, backward: bool) -> ClosedJaxpr:
    """The logits of a batch, or the gradient of something made of them."""

    def logits(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        return network.bind(params)(tokens)

    def gradient(params: dict[str, jax.Array], tokens: jax.Array) -> dict[str, jax.Array]:
        return jax.grad(lambda params: jnp.square(logits(params, tokens)).sum())(params)

    shapes = jax.eval_shape(network.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, network.context_length), jnp.int32)
    return jax.make_jaxpr(gradient if backward else logits)(shapes, tokens)


def per_token(network: Network, *, backward: bool) -> float:
    return products(program(network, backward=backward)) / (BATCH * network.context_length)


@pytest.mark.slow
def test_forward_pass_has_so_many_products(subtests: pytest.Subtests):
    for name in DENSE:
        with subtests.test(name=name):
            settings = DENSE[name]
            network = variants.network(settings)
            expected = of_pairs(flops.forward(network), settings)
            assert per_token(network, backward=False) == pytest.approx(expected, rel=1e-12)


@pytest.mark.slow
def test_training_has_so_many_products(subtests: pytest.Subtests):
    for name in KINDS:
        with subtests.test(name=name):
            settings = KINDS[name]
            network = variants.network(settings)
            expected = of_pairs(flops.training(network, PLAIN), settings)
            assert per_token(network, backward=True) == pytest.approx(expected, rel=1e-12)


# --- XLA's count ----------------------------------------------------------------------------------

WIDE = {"d_model": 256, "mlp": config.DenseMlp(kind="relu")}
VARIANTS = {
    "gpt": small(config.Gpt, **WIDE),
    "grouped": small(
        config.Gpt, **WIDE, attention=config.CausalAttention(num_heads=4, num_kv_heads=1)
    ),
    "swiglu": small(config.Gpt, **WIDE | {"mlp": config.DenseMlp(kind="swiglu")}),
    "latent": small(
        config.Gpt,
        **WIDE,
        attention=config.LatentAttention(num_heads=4, kv_rank=64, query_rank=64, rotary_dim=16),
    ),
    "unet": small(config.UnetGpt, **WIDE | {"bottleneck_sizes": (256, 128, 256)}),
}


def wide(settings: config.Network, time: int = 64) -> Network:
    return Network(settings, vocab_size=1000, context_length=time, precision="float32")


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_pass_is_what_xla_counts(name: str):
    """XLA also counts additions, divisions and the like: with ReLU, 0.7 % of what a width of 256
    multiplies. Fewer than ours it can never count."""
    network = wide(VARIANTS[name])
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((BATCH, 64), jnp.int32)
    lowered = jax.jit(lambda params, tokens: network.bind(params)(tokens)).lower(shapes, tokens)
    counted = lowered.cost_analysis()["flops"] / (BATCH * 64)
    expected = of_pairs(flops.forward(network), VARIANTS[name], 64)
    assert 1 < counted / expected < 1.01


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("all",), ("blocks.1",), ("mlp",)], ids=str)
def test_no_gradient_of_frozen_weights_is_counted(targets: tuple[str, ...]):
    """As XLA counts what it compiles, where nobody asks for a frozen weight's gradient. Ours goes
    back through all of the first block that has an adapter, XLA only as far down as needed."""
    settings = small(config.Gpt, **WIDE, num_layers=3, lora=config.Lora(rank=4, targets=targets))
    network = wide(settings)
    adapters, base = lora.split(jax.eval_shape(network.init, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((BATCH, 64), jnp.int32)

    def loss(adapters: Any, base: Any, tokens: jax.Array) -> jax.Array:
        return jnp.square(network.bind(base | adapters)(tokens)).sum()

    compiled = jax.jit(jax.grad(loss)).lower(adapters, base, tokens).compile()
    counted = compiled.cost_analysis()["flops"] / (BATCH * 64)
    expected = of_pairs(flops.training(network, PLAIN), settings, 64)
    forward = flops.forward(network)
    of_a_block = (forward.weights + 2 * (64 / 32.5) * forward.attention) / settings.num_layers
    assert expected - of_a_block < counted < 1.01 * expected


# --- closed forms ---------------------------------------------------------------------------------


def test_a_training_step_of_gpt_is_what_palm_says_but_for_the_mask():
    """Chowdhery et al. 2022, appendix B: 6 N + 12 L H Q T, with N the weights that are multiplied.

    N by hand: 12 d² a block and a row for each token. Under a mask a query sees (T + 1) / 2 keys.
    """
    d, layers, time, vocab_size = 256, 2, 64, 1000
    network = wide(small(config.Gpt, d_model=d, num_layers=layers, mlp=config.DenseMlp()))
    weights = 12 * d**2 * layers + vocab_size * d
    attention = 12 * layers * d * (time + 1) / 2
    found = flops.training(network, PLAIN)
    assert found.total == 6 * weights + attention
    assert found.total == 3 * flops.forward(network).total


def test_the_step_of_the_baseline_is_what_the_reference_reckons():
    """27 million parameters, 8,192 tokens: 1.35 tera-operations a step (our notes on speed, which
    take half of the text for the keys where a query sees half a key more)."""
    network = Network(config.Gpt(), vocab_size=16_000, context_length=128, precision="float32")
    assert 8192 * flops.training(network, PLAIN).total == pytest.approx(1.35e12, rel=0.005)


def test_the_baseline_at_the_peak_of_a_known_card():
    """1.37 ms for 8,192 tokens on an H200 (our notes on speed); of a CPU nothing is known."""
    settings = config.load(None, ["training.precision=bfloat16"])
    network = Network(settings.model, vocab_size=16_000, context_length=128, precision="bfloat16")
    peak = parts.peak_tokens_per_second(settings, network, "NVIDIA H200")
    assert 8192 / peak == pytest.approx(1.37e-3, rel=0.005)
    assert parts.peak_tokens_per_second(settings, network, "cpu") is None


def test_of_experts_only_the_chosen_ones_are_counted():
    def forward(**changes: Any) -> float:
        mlp = config.MixtureOfExperts(hidden=64, **changes)
        return flops.forward(variants.network(small(config.Gpt, mlp=mlp))).weights

    one, two = forward(num_experts=4, top_k=1), forward(num_experts=4, top_k=2)
    assert two - one == 2 * 2 * (3 * 64 * variants.WIDTH)  # two layers of SwiGLU's three matrices
    routers = 2 * 2 * 4 * variants.WIDTH
    assert forward(num_experts=8, top_k=1) - one == routers


def test_a_batch_that_is_read_twice_is_counted_twice():
    network = variants.network(small(config.Gpt))
    twice = flops.training(network, config.Regularization(r_drop=1.0))
    assert twice.total == 2 * flops.training(network, PLAIN).total


def test_padding_rows_of_the_vocabulary_are_computed_and_counted():
    padded = variants.network(small(config.Gpt, pad_vocab_to_multiple_of=64))
    assert flops.forward(padded).head == 2 * 64 * variants.WIDTH


# --- keys -----------------------------------------------------------------------------------------


def test_keys_are_those_that_the_mask_lets_a_query_see(subtests: pytest.Subtests):
    for time, (name, attention) in itertools.product([1, 300], variants.attentions().items()):
        with subtests.test(name, time=time):
            places = jnp.arange(time)
            grid = np.asarray(masks.grid(masks.of_attention(attention), places, places, 4))
            seen = grid.sum(-1)
            if isinstance(attention, config.SparseKAttention):  # which the mask does not know
                seen = np.minimum(seen, attention.window_including_self + attention.num_selected)
            mean = flops.mean_keys(attention, time)
            assert mean == pytest.approx(seen.mean(), rel=1e-6)  # float32 sums


def test_tiles_hold_all_keys_that_are_counted():
    """What the sparse patterns compute is no less than what is counted, and not much more."""
    attention = config.SparseAttention(num_heads=4, pattern=config.StridedKeys(stride=32))
    tiles = sum(view.keys_per_query for view in sparse.views(attention, 1024, 4))
    assert tiles / 3 < flops.mean_keys(attention, 1024) < tiles
