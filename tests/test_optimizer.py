"""Optimizers against NumPy and Optax's ready-made ones; laws of decay, groups and clipping.

Step by step against PyTorch: `test_torch_optimizers`. All on a network: `test_optimizer_table`.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from pydantic import ValidationError

from mainrun import complaints, config
from mainrun.errors import UserError
from mainrun.training import optimizer as optimizers
from tests import variants

KINDS = complaints.dataclasses_in(config.Optimizer)

SHAPES = {
    "token_embedding.embedding": (7, 4),
    "blocks.0.attention.qkv.kernel": (4, 12),
    "blocks.0.attention.qkv.bias": (12,),
    "blocks.0.mlp.router.kernel": (4, 3),
    "blocks.0.mlp.up": (3, 4, 6),  # of three experts
    "final_norm.scale": (4,),
}
Arrays = dict[str, np.ndarray]


def drawn(seed: int) -> Arrays:
    draw = np.random.default_rng(seed)
    return {n: draw.normal(size=shape).astype(np.float32) for n, shape in SHAPES.items()}


PARAMS = drawn(0)
GRADIENTS = [{n: k * g for n, g in drawn(1 + i).items()} for i, k in enumerate((0.3, -2.0, 0.01))]
RATES = (0.1, 0.05, 0.2)


def rate(count: jax.Array) -> jax.Array:
    return jnp.asarray(RATES)[count]


def updated(
    settings: config.Optimizer, clip: float | None = None, gradients: list[Arrays] = GRADIENTS
) -> Arrays:
    """The parameters after the gradients, one update each."""
    return states(settings, clip, gradients)[-1][0]


def states(
    settings: config.Optimizer, clip: float | None = None, gradients: list[Arrays] = GRADIENTS
) -> list[tuple[Arrays, optax.OptState]]:
    """Parameters and state after each."""
    optimizer = optimizers.optimizer(settings, rate, clip)
    params = jax.tree.map(jnp.asarray, PARAMS)
    state, found = optimizer.init(params), []
    for gradient in jax.tree.map(jnp.asarray, gradients):
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        found.append(({n: np.asarray(a) for n, a in params.items()}, state))
    return found


def clipped(gradient: Arrays, clip: float | None) -> Arrays:
    norm = math.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in gradient.values()))
    scale = 1.0 if clip is None else min(1.0, clip / norm)
    return {name: np.asarray(g, np.float64) * scale for name, g in gradient.items()}


def has_decay(name: str, decay_on: str) -> bool:
    """Weights and embeddings; biases and scales only with `all`."""
    return decay_on == "all" or not name.endswith(("bias", "scale"))


def assert_equal(found: Arrays, expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """Up to float32: some ten roundings of an update, and that of the sum with a parameter."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=rtol, atol=rtol / 10, err_msg=name)


# ---------------------------------------------------------------------------------------------
# Against NumPy

CLIPS_AND_DECAYS = list(itertools.product((None, 0.6), ("matrices", "all")))
Rule = Callable[[], Callable[[int, np.ndarray], np.ndarray]]  # by t and gradient, an update


def by_numpy(
    rule: Rule, *, clip: float | None, coupled: float, decoupled: float, decay_on: str
) -> Arrays:
    """Gradient to update by `rule`, a new one for each parameter, in float64."""
    expected = {}
    for name, start in PARAMS.items():
        p, step = np.asarray(start, np.float64), rule()
        for t, gradient in enumerate(GRADIENTS, start=1):
            counts = has_decay(name, decay_on)
            g = clipped(gradient, clip)[name] + counts * coupled * p
            p = p - RATES[t - 1] * (step(t, g) + counts * decoupled * p)
        expected[name] = p
    return expected


def momentum(decay: float) -> Rule:
    def rule() -> Callable:
        velocity = [np.zeros(())]

        def step(_: int, g: np.ndarray) -> np.ndarray:
            velocity[0] = decay * velocity[0] + g
            return velocity[0]

        return step

    return rule


def adam(b1: float, b2: float, eps: float) -> Rule:
    """Kingma & Ba 2015, algorithm 1."""

    def rule() -> Callable:
        moments = [np.zeros(()), np.zeros(())]

        def step(t: int, g: np.ndarray) -> np.ndarray:
            moments[0] = b1 * moments[0] + (1 - b1) * g
            moments[1] = b2 * moments[1] + (1 - b2) * g**2
            return moments[0] / (1 - b1**t) / (np.sqrt(moments[1] / (1 - b2**t)) + eps)

        return step

    return rule


def adagrad(initial: float, eps: float) -> Rule:
    def rule() -> Callable:
        total = [np.full((), initial)]

        def step(_: int, g: np.ndarray) -> np.ndarray:
            total[0] = total[0] + g**2
            return g / (np.sqrt(total[0]) + eps)

        return step

    return rule


def rmsprop(b2: float, eps: float, decay: float) -> Rule:
    def rule() -> Callable:
        square, velocity = [np.zeros(())], momentum(decay)()

        def step(t: int, g: np.ndarray) -> np.ndarray:
            square[0] = b2 * square[0] + (1 - b2) * g**2
            return velocity(t, g / (np.sqrt(square[0]) + eps))

        return step

    return rule


def test_sgd_is_momentum_with_coupled_decay(subtests: pytest.Subtests) -> None:
    for (clip, decay_on), decay in itertools.product(CLIPS_AND_DECAYS, [0.0, 0.9]):
        with subtests.test(clip=clip, decay_on=decay_on, decay=decay):
            settings = config.Sgd(momentum=decay, weight_decay=0.2, decay_on=decay_on)
            expected = by_numpy(
                momentum(decay), clip=clip, coupled=0.2, decoupled=0, decay_on=decay_on
            )
            assert_equal(updated(settings, clip), expected)


def test_adam_is_its_paper_with_coupled_decay(subtests: pytest.Subtests) -> None:
    for clip, decay_on in CLIPS_AND_DECAYS:
        with subtests.test(clip=clip, decay_on=decay_on):
            settings = config.Adam(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, decay_on=decay_on)
            rule = adam(0.8, 0.9, 1e-3)
            expected = by_numpy(rule, clip=clip, coupled=0.2, decoupled=0, decay_on=decay_on)
            assert_equal(updated(settings, clip), expected)


def test_adamw_is_its_paper(subtests: pytest.Subtests) -> None:
    for clip, decay_on in CLIPS_AND_DECAYS:
        with subtests.test(clip=clip, decay_on=decay_on):
            settings = config.AdamW(b1=0.8, b2=0.9, eps=1e-3, weight_decay=0.2, decay_on=decay_on)
            rule = adam(0.8, 0.9, 1e-3)
            expected = by_numpy(rule, clip=clip, coupled=0, decoupled=0.2, decay_on=decay_on)
            assert_equal(updated(settings, clip), expected)


def test_adagrad_divides_by_the_root_of_all_squares(subtests: pytest.Subtests) -> None:
    for (clip, decay_on), (initial, eps) in itertools.product(
        CLIPS_AND_DECAYS, [(0.0, 1e-10), (0.5, 1e-10), (0.0, 0.1)]
    ):
        with subtests.test(clip=clip, decay_on=decay_on, initial=initial, eps=eps):
            settings = config.Adagrad(
                initial_accumulator=initial, eps=eps, weight_decay=0.2, decay_on=decay_on
            )
            rule = adagrad(initial, eps)
            expected = by_numpy(rule, clip=clip, coupled=0.2, decoupled=0, decay_on=decay_on)
            assert_equal(updated(settings, clip), expected)


def test_rmsprop_divides_by_the_root_of_the_mean_square(subtests: pytest.Subtests) -> None:
    for (clip, decay_on), decay in itertools.product(CLIPS_AND_DECAYS, [0.0, 0.9]):
        with subtests.test(clip=clip, decay_on=decay_on, decay=decay):
            settings = config.RmsProp(
                b2=0.9, eps=1e-3, momentum=decay, weight_decay=0.2, decay_on=decay_on
            )
            rule = rmsprop(0.9, 1e-3, decay)
            expected = by_numpy(rule, clip=clip, coupled=0.2, decoupled=0, decay_on=decay_on)
            assert_equal(updated(settings, clip), expected)


# ---------------------------------------------------------------------------------------------
# Against Optax's own


def by_optax(made: optax.GradientTransformation) -> Arrays:
    params = {name: jnp.asarray(array) for name, array in PARAMS.items()}
    state = made.init(params)
    for gradient in GRADIENTS:
        updates, state = made.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


MATRICES = {name: has_decay(name, "matrices") for name in SHAPES}


def test_adafactor_is_optaxs(subtests: pytest.Subtests) -> None:
    for min_size, (clip_rms, by_parameter) in itertools.product(
        [2, 4, 128], [(1.0, True), (0.1, False), (None, True)]
    ):
        with subtests.test(min_size=min_size, clip_rms=clip_rms, by_parameter=by_parameter):
            settings = config.Adafactor(
                decay_exponent=0.7,
                clip_update_rms=clip_rms,
                scale_by_parameter=by_parameter,
                min_size_to_factor=min_size,
            )
            expected = by_optax(
                optax.adafactor(
                    rate,
                    min_dim_size_to_factor=min_size,
                    decay_rate=0.7,
                    multiply_by_parameter_scale=by_parameter,
                    clipping_threshold=clip_rms,
                )
            )
            assert_equal(updated(settings), expected)


def test_lion_is_optaxs() -> None:
    settings = config.Lion(b1=0.8, b2=0.95, weight_decay=0.3)
    expected = by_optax(optax.lion(rate, b1=0.8, b2=0.95, weight_decay=0.3, mask=MATRICES))
    assert_equal(updated(settings), expected)


def test_muon_is_optaxs_for_weights_in_blocks_and_adamw_for_all_else() -> None:
    """In Optax's, AdamW has Nesterov's momentum too; in Jordan's, and here, it has not."""
    settings = config.Muon(
        learning_rate=0.2,
        momentum=0.9,
        newton_schulz_steps=4,
        adamw_learning_rate=0.05,
        b1=0.8,
        b2=0.95,
        eps=1e-3,
        weight_decay=0.3,
        decay_on="all",
    )
    of_matrix = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
    inside = ("blocks.0.attention.qkv.kernel", "blocks.0.mlp.up")
    muon = by_optax(
        optax.contrib.muon(
            rate,
            ns_steps=4,
            beta=0.9,
            weight_decay=0.3,
            muon_weight_dimension_numbers={n: of_matrix if n in inside else None for n in SHAPES},
        )
    )
    adamw = by_optax(
        optax.adamw(lambda count: rate(count) / 4, b1=0.8, b2=0.95, eps=1e-3, weight_decay=0.3)
    )
    expected = {name: (muon if name in inside else adamw)[name] for name in SHAPES}
    assert_equal(updated(settings), expected)


def slope(params: Arrays) -> Arrays:
    """The gradient of a function that is steeper in some directions."""
    return {n: (1 + jnp.arange(a.size).reshape(a.shape) % 5) * a - 1 for n, a in params.items()}


@pytest.mark.slow
def test_schedule_free_parameters_are_the_average_of_optaxs_own() -> None:
    """Gradients are taken where each says, so a wrong place parts the two after a step."""

    def rising(count: jax.Array) -> jax.Array:
        return 0.05 * jnp.minimum(1.0, (count + 1) / 10)

    settings = config.ScheduleFreeAdamW(
        b1=0.7, b2=0.95, eps=1e-4, weight_lr_power=1.5, weight_decay=0.3, decay_on="all"
    )
    ours = optimizers.optimizer(settings, rising, None)
    theirs = optax.contrib.schedule_free_adamw(
        rising, b1=0.7, b2=0.95, eps=1e-4, weight_lr_power=1.5, weight_decay=0.3
    )
    with jax.enable_x64(True):  # working out the average loses a digit each time
        params = y = {name: jnp.asarray(array, jnp.float64) for name, array in PARAMS.items()}
        state, their_state = ours.init(params), theirs.init(y)
        for _ in range(30):
            point = ours.gradient_point(params, state)
            assert_equal(point, y, rtol=1e-9)
            updates, state = ours.update(slope(point), state, params)
            params = optax.apply_updates(params, updates)
            updates, their_state = theirs.update(slope(y), their_state, y)
            y = optax.apply_updates(y, updates)
            averaged = optax.contrib.schedule_free_eval_params(their_state, y)
            assert_equal(params, averaged, rtol=1e-9)
        apart = [float(jnp.abs(params[n] - y[n]).max()) for n in params]
    assert min(apart) > 1e-3, "the average is not where gradients are taken"


def test_gradients_are_taken_at_the_parameters_but_for_schedule_free(
    subtests: pytest.Subtests,
) -> None:
    for kind in KINDS:
        with subtests.test(kind=kind.kind):
            optimizer = optimizers.optimizer(kind(), rate, 1.0)
            params, state = states(kind(), 1.0)[-1]
            point = optimizer.gradient_point(jax.tree.map(jnp.asarray, params), state)
            is_elsewhere = any((np.asarray(point[n]) != params[n]).any() for n in params)
            assert is_elsewhere == (kind is config.ScheduleFreeAdamW)


# ---------------------------------------------------------------------------------------------
# Clipping, decay, groups: laws of all kinds

COUPLED = {
    config.Sgd: True, config.Adam: True, config.Adagrad: True, config.RmsProp: True,
    config.AdamW: False, config.Adafactor: False, config.Lion: False, config.Muon: False,
    config.ScheduleFreeAdamW: False,
}  # fmt: skip


def plainly(kind: Any, **changes: Any) -> Any:
    """Of this kind, with one rate for all, and a first update that is no mere sign."""
    if kind is config.Muon:
        changes |= {"learning_rate": 0.02, "adamw_learning_rate": 0.02}
    if kind in (config.Adam, config.Adagrad, config.RmsProp):
        changes |= {"eps": 1.0}
    return kind(**changes)


def first_update(settings: config.Optimizer, gradient: Arrays = GRADIENTS[0]) -> Arrays:
    after = updated(settings, gradients=[gradient])
    return {name: after[name] - PARAMS[name] for name in after}


def test_clipping_is_of_the_whole_gradient_before_anything_else(subtests: pytest.Subtests) -> None:
    for kind in KINDS:
        with subtests.test(kind=kind.kind):
            cut = [
                {n: g.astype(np.float32) for n, g in clipped(gradient, 0.6).items()}
                for gradient in GRADIENTS
            ]
            assert_equal(updated(kind(), 0.6), updated(kind(), None, cut), rtol=1e-4)


def test_every_parameter_decays_once_or_not_at_all(subtests: pytest.Subtests) -> None:
    """Coupled decay is one with a gradient to which it is added; the other shrinks by itself."""
    for kind, decay_on in itertools.product(KINDS, ["matrices", "all"]):
        with subtests.test(kind=kind.kind, decay_on=decay_on):
            plain = plainly(kind, weight_decay=0.0)
            found = first_update(plainly(kind, weight_decay=0.3, decay_on=decay_on))
            decay = {n: 0.3 * p * has_decay(n, decay_on) for n, p in PARAMS.items()}
            if COUPLED[kind]:
                gradient = {n: g + decay[n] for n, g in GRADIENTS[0].items()}
                expected = first_update(plain, gradient)
            else:
                expected = {n: u - RATES[0] * decay[n] for n, u in first_update(plain).items()}
            assert_equal(found, expected)
            without = first_update(plain)
            decayed = {n for n in SHAPES if np.abs(found[n] - without[n]).max() > 1e-3}
            assert decayed == {n for n in SHAPES if has_decay(n, decay_on)}


def test_weight_decay_names_every_parameter_of_a_network(subtests: pytest.Subtests) -> None:
    params = variants.params(variants.networks()["gpt-moe"])
    group = config.Group(parameters="blocks.1.*", weight_decay=0.5)
    for kind, decay_on in itertools.product(KINDS, ["matrices", "all"]):
        with subtests.test(kind=kind.kind, decay_on=decay_on):
            settings = kind(weight_decay=0.3, decay_on=decay_on, groups=(group,))
            expected = {
                name: 0.5 if name.startswith("blocks.1.") else 0.3 * has_decay(name, decay_on)
                for name in params
            }
            assert optimizers.weight_decay(settings, params) == expected


def test_a_group_has_its_own_rate_and_decay_and_leaves_the_others_alone(
    subtests: pytest.Subtests,
) -> None:
    for kind in KINDS:
        with subtests.test(kind=kind.kind):
            group = config.Group(parameters="*.qkv.*", learning_rate_factor=0.5, weight_decay=0.7)
            found = first_update(kind(weight_decay=0.2, groups=(group,)))
            others = first_update(kind(weight_decay=0.2))
            grouped = first_update(kind(weight_decay=0.7, decay_on="all"))
            expected = {n: 0.5 * grouped[n] if ".qkv." in n else others[n] for n in SHAPES}
            assert_equal(found, expected)


def test_a_group_that_says_only_one_thing_keeps_the_other(subtests: pytest.Subtests) -> None:
    for kind in KINDS:
        with subtests.test(kind=kind.kind):
            name = "token_embedding.embedding"
            slower = config.Group(parameters=name, learning_rate_factor=0.25)
            spared = config.Group(parameters=name, weight_decay=0.0)
            plain = first_update(kind(weight_decay=0.2))[name]
            without = first_update(kind(weight_decay=0.0))[name]
            for group, expected in ((slower, 0.25 * plain), (spared, without)):
                found = first_update(kind(weight_decay=0.2, groups=(group,)))[name]
                np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_rate_of_zero_freezes_a_group() -> None:
    group = config.Group(parameters="blocks.*", learning_rate_factor=0.0)
    after = updated(config.AdamW(groups=(group,)))
    frozen = {n for n in SHAPES if (after[n] == PARAMS[n]).all()}
    assert frozen == {n for n in SHAPES if n.startswith("blocks.")}


def test_a_group_is_a_factor_of_the_rate_that_muon_gives_adamw() -> None:
    name = "token_embedding.embedding"
    group = config.Group(parameters=name, learning_rate_factor=0.5)
    settings = config.Muon(learning_rate=0.02, adamw_learning_rate=0.001)
    scores_and_adapters = {
        "blocks.0.attention.importance.kernel": np.zeros((4, 2)),
        "blocks.0.attention.out.adapter.down": np.zeros((4, 2)),
    }
    factors = optimizers.learning_rate_factors(
        dataclasses.replace(settings, groups=(group,)), {**PARAMS, **scores_and_adapters}
    )
    assert factors == pytest.approx(
        {
            "token_embedding.embedding": 0.025,
            "blocks.0.attention.qkv.kernel": 1.0,
            "blocks.0.attention.qkv.bias": 0.05,
            "blocks.0.mlp.router.kernel": 0.05,
            "blocks.0.mlp.up": 1.0,
            "blocks.0.attention.importance.kernel": 0.05,
            "blocks.0.attention.out.adapter.down": 0.05,
            "final_norm.scale": 0.05,
        }
    )


def groups(*patterns: str) -> tuple[config.Group, ...]:
    return tuple(config.Group(parameters=p, weight_decay=0.0) for p in patterns)


def test_a_group_that_names_no_parameter_is_an_error(subtests: pytest.Subtests) -> None:
    said = (
        r"^optimizer\.groups: \*\.bais names no parameter; they are called "
        r"blocks\.0\.attention\.qkv\.bias, .* …$"
    )
    for kind in KINDS:
        with subtests.test(kind=kind.kind), pytest.raises(UserError, match=said):
            updated(kind(groups=groups("*.bias", "*.bais")))


def test_a_parameter_in_two_groups_is_an_error_that_names_them(subtests: pytest.Subtests) -> None:
    said = (
        r"^optimizer\.groups: blocks\.0\.attention\.qkv\.bias is in blocks\.\* and in \*\.bias: "
        r"let one of them name it$"
    )
    for kind in KINDS:
        with subtests.test(kind=kind.kind), pytest.raises(UserError, match=said):
            updated(kind(groups=groups("blocks.*", "final_norm.*", "*.bias")))


def test_a_pattern_minds_case_and_the_whole_name() -> None:
    for pattern in ("Blocks.*", "blocks", "embedding", "*.kernel.*"):
        with pytest.raises(UserError, match="names no parameter"):
            updated(config.AdamW(groups=groups(pattern)))


# ---------------------------------------------------------------------------------------------
# Moments of half the size

WITH_MOMENT_DTYPE = [
    kind for kind in KINDS if "moment_dtype" in {f.name for f in dataclasses.fields(kind)}
]


def dtypes(state: optax.OptState) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path), leaf.shape, leaf.dtype


def test_a_moment_in_bfloat16_is_the_first_and_nothing_else(subtests: pytest.Subtests) -> None:
    for kind in WITH_MOMENT_DTYPE:
        with subtests.test(kind=kind.kind):
            wide, narrow = (
                states(kind(moment_dtype=name), 1.0) for name in ("float32", "bfloat16")
            )
            moments = set()
            for (params, state), (other_params, other) in zip(wide, narrow, strict=True):
                for (path, shape, dtype), changed in zip(dtypes(state), dtypes(other), strict=True):
                    is_first = ".mu[" in path
                    assert changed == (path, shape, jnp.bfloat16 if is_first else dtype)
                    assert not is_first or dtype == jnp.float32
                    moments |= {name for name in SHAPES if is_first and name in path}
                for name, array in other_params.items():
                    assert array.dtype == np.float32
                    # Eight bits of mantissa, three times, of updates of up to a rate of 0.2.
                    np.testing.assert_allclose(array, params[name], atol=0.02, err_msg=name)
            assert moments == set(SHAPES)


def test_only_kinds_with_a_mean_of_gradients_say_its_dtype() -> None:
    with_mean = [
        k for k in KINDS if any(".mu[" in path for path, _, _ in dtypes(states(k())[0][1]))
    ]
    assert with_mean == WITH_MOMENT_DTYPE


def test_a_run_cannot_go_on_with_a_setting_that_changes_the_shape_of_its_state() -> None:
    def shapes(settings: config.Optimizer) -> tuple[Any, list[tuple]]:
        state = jax.eval_shape(optimizers.optimizer(settings, rate, 1.0).init, PARAMS)
        leaves, structure = jax.tree.flatten(state)
        return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]

    shaping = set()
    for kind in KINDS:
        default = shapes(kind())
        for name in (field.name for field in dataclasses.fields(kind)):
            for value in (0.0, 0.5, 1, None, False, "all", "bfloat16"):
                with contextlib.suppress(ValidationError):
                    if shapes(kind(**{name: value})) != default:
                        shaping.add(f"optimizer.{name}")
    assert shaping
    assert [path for path in sorted(shaping) if not config.is_fixed(path)] == []
