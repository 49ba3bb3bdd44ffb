"""The mixture of experts against loops over tokens and against every expert on every token."""

import itertools
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mainrun import config
from mainrun.model import moe
from mainrun.model.initializers import Initializer

WIDTH, HIDDEN, BATCH, TIME = 8, 6, 2, 12
ACTIVATIONS = get_args(config.Activation)

# How much more of the first input the router gives to each expert than to the one before. The
# first input of every token is 1: at 4, all tokens want the same experts.
LOADS = {"even": 0.0, "uneven": 1.0, "all on the same": 4.0}

Params = dict[str, jax.Array]


@cache
def graph(activation: config.Activation, experts: int, top_k: int, hidden: int) -> Any:
    settings = config.MixtureOfExperts(
        activation=activation, hidden=hidden, num_experts=experts, top_k=top_k
    )
    init = Initializer("kaiming", WIDTH)
    model = moe.MoeMlp(settings, WIDTH, init=init, out_init=init, rngs=nnx.Rngs(0))
    return nnx.split(model)


def params(
    activation: config.Activation = "swiglu",
    experts: int = 4,
    top_k: int = 2,
    load: str = "even",
    hidden: int = HIDDEN,
) -> Params:
    state = graph(activation, experts, top_k, hidden)[1]
    found = {".".join(map(str, path)): p[...] for path, p in nnx.to_flat_state(state)}
    kernel = found["router.kernel"]
    return found | {"router.kernel": kernel.at[0].add(LOADS[load] * jnp.arange(experts))}


@cache
def computed(
    activation: config.Activation = "swiglu",
    experts: int = 4,
    top_k: int = 2,
    hidden: int = HIDDEN,
) -> Any:
    """The model as a jitted function: parameters and inputs in, outputs and routing out."""
    graphdef, state = graph(activation, experts, top_k, hidden)
    paths = [path for path, _ in nnx.to_flat_state(state)]

    def run(found: Params, x: jax.Array) -> tuple[jax.Array, moe.Routing]:
        leaves = [(path, nnx.Param(found[".".join(map(str, path))])) for path in paths]
        return nnx.merge(graphdef, nnx.from_flat_state(leaves))(x)

    return jax.jit(run)


def inputs(seed: int = 0, batch: int = BATCH, time: int = TIME) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, time, WIDTH)).at[..., 0].set(1.0)


def by_hand(activation: str, wide: np.ndarray) -> np.ndarray:
    hidden = len(wide) // 2
    match activation:
        case "gelu":
            return np.array([w * 0.5 * (1 + math.erf(w / math.sqrt(2))) for w in wide])
        case "relu":
            return np.where(wide > 0, wide, 0)
        case "relu2":
            return np.where(wide > 0, wide, 0) ** 2
        case _:
            return wide[:hidden] / (1 + np.exp(-wide[:hidden])) * wide[hidden:]


def token_by_token(activation: str, top_k: int, found: Params, x: jax.Array) -> tuple:
    """Outputs, probabilities and choices, one token and one expert after another, in float64."""
    router, up, down = (
        np.asarray(found[name], np.float64) for name in ("router.kernel", "up", "down")
    )
    outputs, opinions, choices = [], [], []
    for token in np.asarray(x, np.float64).reshape(-1, WIDTH):
        odds = np.exp(token @ router)
        opinions.append(odds / odds.sum())
        taken = sorted(range(len(odds)), key=lambda e: -odds[e])[:top_k]
        choices.append([e in taken for e in range(len(odds))])
        y = np.zeros(WIDTH)
        for e in taken:
            y += odds[e] / odds[taken].sum() * (by_hand(activation, token @ up[e]) @ down[e])
        outputs.append(y)
    shape = (*x.shape[:2], -1)
    return tuple(np.array(part).reshape(shape) for part in (outputs, opinions, choices))


def every_expert_on_every_token(activation: str, top_k: int, found: Params, x: jax.Array) -> Any:
    """The plain form, for its gradients."""
    probabilities = jax.nn.softmax(x @ found["router.kernel"])
    least = jnp.sort(probabilities, axis=-1)[..., -top_k, None]
    weights = jnp.where(probabilities >= least, probabilities, 0)
    weights = weights / weights.sum(-1, keepdims=True)
    wide = jnp.einsum("btw,ewh->bteh", x, found["up"])
    gate, up = jnp.split(wide, 2, axis=-1)
    hidden = {
        "gelu": lambda: wide * 0.5 * (1 + jax.scipy.special.erf(wide / math.sqrt(2))),
        "relu": lambda: jnp.maximum(wide, 0),
        "relu2": lambda: jnp.maximum(wide, 0) ** 2,
        "swiglu": lambda: gate / (1 + jnp.exp(-gate)) * up,
    }[activation]()
    return jnp.einsum("bteh,ehw,bte->btw", hidden, found["down"], weights)


def test_each_token_is_computed_by_its_experts(subtests: pytest.Subtests) -> None:
    for activation, load in itertools.product(ACTIVATIONS, LOADS):
        with subtests.test(activation=activation, load=load):
            found, x = params(activation, load=load), inputs()
            y, routing = computed(activation)(found, x)
            expected, probabilities, chosen = token_by_token(activation, 2, found, x)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(routing.probabilities, probabilities, rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(routing.chosen, chosen)


@pytest.mark.slow
def test_any_number_of_experts_and_choices(subtests: pytest.Subtests) -> None:
    for (experts, top_k), load in itertools.product(
        [(4, 1), (4, 4), (5, 3), (16, 1), (16, 7)], LOADS
    ):
        with subtests.test(experts=experts, top_k=top_k, load=load):
            found, x = params(experts=experts, top_k=top_k, load=load), inputs(1)
            y, routing = computed(experts=experts, top_k=top_k)(found, x)
            expected, _, chosen = token_by_token("swiglu", top_k, found, x)
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_array_equal(routing.chosen, chosen)
            np.testing.assert_array_equal(routing.chosen.sum(-1), top_k)


@pytest.mark.slow
def test_fewer_places_than_experts(subtests: pytest.Subtests) -> None:
    for time in [1, 3]:
        with subtests.test(time=time):
            found, x = params(experts=8), inputs(2, batch=1, time=time)
            y, _ = computed(experts=8)(found, x)
            np.testing.assert_allclose(
                y, token_by_token("swiglu", 2, found, x)[0], rtol=1e-5, atol=1e-5
            )


def test_the_loads_are_what_they_are_called() -> None:
    """Else the tests above would not see the loop over what is beyond the shares."""
    loads = {}
    for load in LOADS:
        _, routing = computed()(params(load=load), inputs())
        loads[load] = np.sort(routing.chosen.sum((0, 1))).tolist()
    share = BATCH * TIME * 2 // 4
    assert share < loads["even"][-1] < loads["uneven"][-1] < BATCH * TIME
    assert loads["all on the same"] == [0, 0, BATCH * TIME, BATCH * TIME]


@cache
def both_gradients(activation: config.Activation = "swiglu", experts: int = 4) -> Any:
    """Of the model and of the plain form, after parameters and inputs, for a mean of outputs."""

    def of(form: Callable[[Params, jax.Array], jax.Array]) -> Callable:
        def loss(found: Params, x: jax.Array) -> jax.Array:
            y = form(found, x)
            return (y * inputs(9, *y.shape[:2])).sum() / y.shape[0] / y.shape[1]

        return jax.grad(loss, argnums=(0, 1))

    ours = of(lambda found, x: computed(activation, experts)(found, x)[0])
    plain = of(partial(every_expert_on_every_token, activation, 2))
    return jax.jit(lambda found, x: (ours(found, x), plain(found, x)))


@pytest.mark.slow
def test_gradients_are_those_of_every_expert_on_every_token(subtests: pytest.Subtests) -> None:
    for activation, load in itertools.product(ACTIVATIONS, LOADS):
        with subtests.test(activation=activation, load=load):
            ours, plain = both_gradients(activation)(params(activation, load=load), inputs())
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, plain)
            if load != "all on the same":
                assert all(float(jnp.abs(part).max()) > 1e-3 for part in jax.tree.leaves(plain))


def test_gradients_where_places_are_fewer_than_experts() -> None:
    x = inputs(2, batch=1, time=3)
    ours, plain = both_gradients(experts=8)(params(experts=8), x)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, plain)


def test_weights_of_the_chosen_sum_to_one(subtests: pytest.Subtests) -> None:
    """Experts that are all the same give together what one of them gives."""
    for top_k in [1, 2, 3]:
        with subtests.test(top_k=top_k):
            found, x = params(top_k=top_k), inputs()
            same = found | {name: jnp.broadcast_to(found[name][:1], found[name].shape)
                            for name in ("up", "down")}  # fmt: skip
            y, _ = computed(top_k=top_k)(same, x)
            gate, up = np.split(np.asarray(x @ found["up"][0], np.float64), 2, axis=-1)
            expected = gate / (1 + np.exp(-gate)) * up @ found["down"][0]
            np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_parameters_are_float32_arrays_without_biases() -> None:
    shapes = {name: (array.shape, str(array.dtype)) for name, array in params("gelu").items()}
    assert shapes == {
        "router.kernel": ((WIDTH, 4), "float32"),
        "up": ((4, WIDTH, HIDDEN), "float32"),
        "down": ((4, HIDDEN, WIDTH), "float32"),
    }
    assert params("swiglu")["up"].shape == (4, WIDTH, 2 * HIDDEN)


def test_hidden_is_four_times_the_width_where_nothing_is_said() -> None:
    init = Initializer("normal", WIDTH)
    settings = config.MixtureOfExperts(activation="relu")
    model = moe.MoeMlp(settings, WIDTH, init=init, out_init=init.scaled(0.0), rngs=nnx.Rngs(0))
    assert model.up[...].shape == (4, WIDTH, 4 * WIDTH)
    assert not model.down[...].any(), "down has an initializer of its own"


def test_bfloat16_inputs_leave_the_router_and_the_gradients_of_weights_float32() -> None:
    found, x = params(load="uneven"), inputs().astype(jnp.bfloat16)

    def loss(found: Params, x: jax.Array) -> tuple[jax.Array, Any]:
        y, routing = computed()(found, x)
        return jnp.square(y.astype(jnp.float32)).mean(), (y, routing)

    (dparams, dx), (y, routing) = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(found, x)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert {array.dtype for array in dparams.values()} == {jnp.dtype("float32")}
    exact, probabilities, _ = token_by_token("swiglu", 2, found, x)
    # A router in bfloat16 is off by 1e-3 and more.
    np.testing.assert_allclose(routing.probabilities, probabilities, rtol=1e-5, atol=1e-6)
    # bfloat16 has 8 bits: 0.4 % of the largest terms of a sum.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, atol=0.02 * np.abs(exact).max())


def test_later_tokens_change_nothing_earlier() -> None:
    """Bit for bit in a batch of one: a token's place depends on the tokens before it only.

    In a larger batch later tokens of the row before move it, and products may round differently.
    """
    for load in LOADS:
        found = params(load=load)
        for batch, limit in ((1, 0.0), (2, 1e-6)):
            x = inputs(batch=batch)
            before, _ = computed()(found, x)
            for position in range(TIME):
                changed = x.at[:, position].set(inputs(5, batch)[:, position])
                after, _ = computed()(found, changed)
                apart = np.abs(np.asarray(before - after)).max((0, 2))
                assert apart[:position].max(initial=0) <= limit
                assert apart[position] > 1e-3


def test_the_rest_of_the_batch_changes_no_row(subtests: pytest.Subtests) -> None:
    for load in LOADS:
        with subtests.test(load=load):
            found, x = params(load=load), inputs(batch=3)
            whole, routing = computed()(found, x)
            others, _ = computed()(found, inputs(7, batch=3).at[1].set(x[1]))
            np.testing.assert_allclose(whole[1], others[1], rtol=1e-6, atol=1e-6)
            for row in range(3):
                alone, alone_routing = computed()(found, x[row : row + 1])
                np.testing.assert_allclose(whole[row], alone[0], rtol=1e-6, atol=1e-6)
                np.testing.assert_array_equal(routing.chosen[row], alone_routing.chosen[0])


def test_a_scan_over_micro_batches_and_a_population_give_the_same_gradients() -> None:
    x, loads = inputs(batch=4), ("even", "all on the same")

    def loss(found: Params, x: jax.Array) -> jax.Array:
        return jnp.square(computed()(found, x)[0]).sum()

    def accumulated(found: Params) -> Params:
        def add(total: Params, part: jax.Array) -> tuple[Params, None]:
            return jax.tree.map(jnp.add, total, jax.grad(loss)(found, part)), None

        zeros = jax.tree.map(jnp.zeros_like, found)
        return jax.lax.scan(add, zeros, x.reshape(2, 2, TIME, WIDTH))[0]

    members = [params(load=load) for load in loads]
    population = jax.tree.map(lambda *arrays: jnp.stack(arrays), *members)
    together = jax.jit(jax.vmap(accumulated))(population)
    at_once = jax.jit(jax.grad(loss))
    for number, member in enumerate(members):
        for name, expected in at_once(member, x).items():
            np.testing.assert_allclose(together[name][number], expected, rtol=1e-4, atol=1e-4)


def most_rows(tokens: int, top_k: int, experts: int) -> int:
    """Rows that the most uneven routing fills, by trying all loads; no expert has a token twice."""
    room = moe.Room.for_tokens(tokens, top_k, experts)
    blocks = [max(0, -(-(load - room.share) // room.block)) for load in range(tokens + 1)]
    most = {0: 0}  # blocks at most, by how many places are given away
    for _ in range(experts):
        following: dict[int, int] = {}
        for given, so_far in most.items():
            for load in range(min(tokens, tokens * top_k - given) + 1):
                key = given + load
                following[key] = max(following.get(key, 0), so_far + blocks[load])
        most = following
    return experts * room.share + most[tokens * top_k] * room.block


def test_there_is_room_for_the_most_uneven_routing(subtests: pytest.Subtests) -> None:
    cases = [(1, 1, 2), (1, 2, 8), (3, 2, 8), (8, 2, 4), (40, 1, 3), (37, 2, 4), (40, 2, 2),
             (33, 5, 9), (40, 6, 15), (50, 1, 16)]  # fmt: skip
    for tokens, top_k, experts in cases:
        with subtests.test(tokens=tokens, top_k=top_k, experts=experts):
            room = moe.Room.for_tokens(tokens, top_k, experts)
            needed = most_rows(tokens, top_k, experts)
            assert needed <= room.rows
            # ... and hardly more: a block for each choice, since last blocks are seldom all begun.
            assert room.rows <= needed + top_k * room.block


def test_rows_do_not_grow_with_the_number_of_experts(subtests: pytest.Subtests) -> None:
    """Even in the worst case no more are computed than twice the places."""
    for experts in [4, 8, 16]:
        with subtests.test(experts=experts):
            for top_k in (1, 2, 4):
                places = 1024 * top_k
                assert places <= moe.Room.for_tokens(1024, top_k, experts).rows <= 2 * places


def flops(experts: int, top_k: int) -> float:
    """Of a forward and a backward pass, as the compiler counts them."""
    found, x = params(experts=experts, top_k=top_k, hidden=64), inputs(batch=8, time=128)

    def loss(found: Params, x: jax.Array) -> jax.Array:
        y, routing = computed(experts=experts, top_k=top_k, hidden=64)(found, x)
        return jnp.square(y).sum() + moe.balance_loss(routing, jnp.ones(x.shape[:2])).sum()

    compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(found, x).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    return analysis["flops"]


@pytest.mark.slow
def test_operations_grow_with_the_choices_and_not_with_the_experts() -> None:
    count = {(e, k): flops(e, k) for e, k in [(4, 1), (4, 2), (4, 4), (8, 2), (16, 2)]}
    # Three products forward and six backward, two operations each.
    least = 2 * 1024 * 9 * WIDTH * 64
    for (_, top_k), found in count.items():
        assert least * top_k <= found
    for experts in (8, 16):
        assert count[experts, 2] == pytest.approx(count[4, 2], rel=0.15)
    assert count[4, 2] / count[4, 1] == pytest.approx(2, rel=0.15)
    assert count[4, 4] / count[4, 1] == pytest.approx(4, rel=0.15)


def routing(probabilities: Any, chosen: Any) -> moe.Routing:
    return moe.Routing(jnp.asarray(probabilities, jnp.float32), jnp.asarray(chosen, bool))


def test_an_even_load_costs_one_and_the_same_experts_for_all_the_most(
    subtests: pytest.Subtests,
) -> None:
    for top_k in [1, 2, 4]:
        with subtests.test(top_k=top_k):
            in_turn = [[(e - t * top_k) % 8 < top_k for e in range(8)] for t in range(8)]
            even = routing(np.full((1, 8, 8), 1 / 8), [in_turn])
            np.testing.assert_allclose(moe.balance_loss(even, jnp.ones((1, 8))), 1, rtol=1e-6)
            taken = np.arange(8) < top_k
            crowded = routing([[taken / top_k] * 8], [[taken] * 8])
            np.testing.assert_allclose(
                moe.balance_loss(crowded, jnp.ones((1, 8))), 8 / top_k, rtol=1e-6
            )


def test_balance_loss_is_its_formula_and_padding_does_not_move_it() -> None:
    _, found = computed()(params(load="uneven"), inputs())
    weights = jnp.ones((BATCH, TIME)).at[0, 7:].set(0)
    expected = []
    for row, length in ((0, 7), (1, TIME)):
        slots = np.asarray(found.chosen[row, :length], np.float64)
        opinions = np.asarray(found.probabilities[row, :length], np.float64)
        expected.append(sum(4 * slots[:, e].sum() / (2 * length) * opinions[:, e].mean()
                            for e in range(4)))  # fmt: skip
    np.testing.assert_allclose(moe.balance_loss(found, weights), expected, rtol=1e-5)
    short = moe.Routing(found.probabilities[:1, :7], found.chosen[:1, :7])
    np.testing.assert_allclose(moe.balance_loss(short, jnp.ones((1, 7))), expected[:1], rtol=1e-5)


def test_splitting_a_batch_does_not_move_the_balance_loss() -> None:
    found, x, weights = params(load="uneven"), inputs(), jnp.ones((1, TIME))
    whole = moe.balance_loss(computed()(found, x)[1], jnp.ones((BATCH, TIME)))
    parts = [moe.balance_loss(computed()(found, x[i : i + 1])[1], weights) for i in range(BATCH)]
    np.testing.assert_allclose(whole, jnp.concatenate(parts), rtol=1e-6)


def test_an_example_without_weight_has_no_balance_loss_and_no_gradient() -> None:
    weights = jnp.ones((BATCH, TIME)).at[1].set(0)

    def loss(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        each = moe.balance_loss(computed()(params(), x)[1], weights)
        return each.sum(), each

    gradient, each = jax.grad(loss, has_aux=True)(inputs())
    assert each[1] == 0
    assert each[0] > 0
    np.testing.assert_array_equal(gradient[1], 0)
    assert np.isfinite(gradient).all()


def test_lowering_the_balance_loss_makes_the_load_more_even() -> None:
    found, x = params(load="uneven"), inputs(batch=8)

    @jax.jit
    def step(found: Params) -> tuple[Params, jax.Array]:
        def loss(found: Params) -> tuple[jax.Array, jax.Array]:
            routing = computed()(found, x)[1]
            balance = moe.balance_loss(routing, jnp.ones(x.shape[:2])).mean()
            return balance, routing.chosen.sum((0, 1)).max()

        slope, heaviest = jax.grad(loss, has_aux=True)(found)
        return jax.tree.map(lambda p, g: p - g, found, slope), heaviest

    beyond_even = []
    for _ in range(40):
        found, heaviest = step(found)
        beyond_even.append(int(heaviest) - 8 * TIME * 2 // 4)
    assert beyond_even[-1] < 0.5 * beyond_even[0]
    np.testing.assert_array_equal(found["up"], params(load="uneven")["up"])
