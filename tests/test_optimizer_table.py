"""One table: every optimizer, in every precision, under every schedule.

All of it lowers a convex loss. On a small GPT, by the true training step, any two meet. Kinds are
found by walking the settings: a new one needs a line in `TUNED` only.
"""

import itertools
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mainrun import complaints, config
from mainrun.data.batches import Batch
from mainrun.model.gpt import Network
from mainrun.training import optimizer as optimizers
from mainrun.training import precision as precisions
from mainrun.training import schedule as schedules
from mainrun.training import step as steps
from mainrun.training.checkpoint import Checkpoints, Progress
from mainrun.training.step import Metrics, TrainState
from tests.shown import shown

OPTIMIZERS = complaints.dataclasses_in(config.Optimizer)
SCHEDULES = complaints.dataclasses_in(config.Schedule)
PRECISIONS: tuple[str, ...] = typing.get_args(typing.get_type_hints(config.Training)["precision"])
EVERYTHING = list(itertools.product(OPTIMIZERS, PRECISIONS, SCHEDULES))

# Rates at which each learns in a few dozen steps, with no decay to work against.
TUNED: dict[type, dict[str, float]] = {
    config.Sgd: {"learning_rate": 0.1, "momentum": 0.5},
    config.Adam: {"learning_rate": 0.05},
    config.AdamW: {"learning_rate": 0.05},
    config.Adagrad: {"learning_rate": 0.2},
    config.RmsProp: {"learning_rate": 0.02},
    config.Adafactor: {"learning_rate": 0.2},
    config.Lion: {"learning_rate": 0.05},
    config.Muon: {"learning_rate": 0.1, "adamw_learning_rate": 0.05},
    config.ScheduleFreeAdamW: {"learning_rate": 0.1},
}


def tuned(kind: Any) -> config.Optimizer:
    assert kind in TUNED, f"give {kind.__name__} a learning rate in TUNED"
    return kind(**TUNED[kind], weight_decay=0.0)


def course(kind: Any, peak: float, total: int) -> optax.Schedule:
    return schedules.schedule(
        kind(), peak, total_steps=total, steps_per_epoch=total, tokens_per_step=1
    )


def dtypes(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.dtype, tree)


def label(value: Any) -> str:
    return value if isinstance(value, str) else value.kind


# ---------------------------------------------------------------------------------------------
# A convex problem

CONVEX_STEPS = 60
START = {"blocks.0.kernel": jnp.full((4, 4), 0.5), "blocks.0.bias": jnp.full(4, -0.5)}
Params = dict[str, jax.Array]


def convex_loss(params: Params, dtype: str) -> jax.Array:
    """Squared error of an affine map, whose least is 0, computed in `dtype`."""
    draw = np.random.default_rng(0)
    inputs, kernel = draw.normal(size=(32, 4)), draw.normal(size=(4, 4))
    x, targets = jnp.asarray(inputs, dtype), jnp.asarray(inputs @ kernel + 1, jnp.float32)
    w = {name: array.astype(dtype) for name, array in params.items()}
    found = x @ w["blocks.0.kernel"] + w["blocks.0.bias"]
    return jnp.square(found.astype(jnp.float32) - targets).mean()


@cache
def descent(kind: Any, precision: str) -> Callable:
    """Learning rates to the parameters and state after as many updates, compiled once."""

    def run(rates: jax.Array) -> tuple[Params, optax.OptState, jax.Array]:
        optimizer = optimizers.optimizer(tuned(kind), lambda count: rates[count], 1.0)
        scaling = config.LossScale()
        State = tuple[Params, optax.OptState, precisions.LossScale]

        def one(state: State, _: None) -> tuple[State, None]:
            params, opt_state, scale = state
            factor = scale.scale if precision == "float16" else 1.0
            scaled = jax.grad(lambda p: factor * convex_loss(p, precision))(
                optimizer.gradient_point(params, opt_state)
            )
            gradient = jax.tree.map(lambda g: g / factor, scaled)
            finite = jnp.isfinite(optax.tree.norm(gradient))
            updates, after = optimizer.update(gradient, opt_state, params)
            kept = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old),
                (optax.apply_updates(params, updates), after),
                (params, opt_state),
            )
            return (*kept, precisions.next_scale(scaling, scale, finite)), None

        begin = (START, optimizer.init(START), precisions.initial(scaling))
        (params, opt_state, scale), _ = jax.lax.scan(one, begin, length=len(rates))
        return params, opt_state, scale.overflows

    return jax.jit(run)


def rates_of(rate: optax.Schedule) -> jax.Array:
    """The learning rate of each step."""
    return jax.vmap(lambda count: jnp.asarray(rate(count), jnp.float32))(jnp.arange(CONVEX_STEPS))


@pytest.mark.slow
def test_a_convex_loss_falls_and_types_stay(subtests: pytest.Subtests) -> None:
    before = float(convex_loss(START, "float32"))
    for kind, precision, schedule in EVERYTHING:
        with subtests.test(kind=kind.kind, precision=precision, schedule=schedule.kind):
            rate = course(schedule, TUNED[kind]["learning_rate"], CONVEX_STEPS)
            params, opt_state, overflows = descent(kind, precision)(rates_of(rate))
            assert float(convex_loss(params, "float32")) < before / 5
            assert dtypes(params) == dtypes(START)
            abstract = jax.eval_shape(optimizers.optimizer(tuned(kind), rate, 1.0).init, START)
            assert dtypes(opt_state) == dtypes(abstract)
            assert int(overflows) < CONVEX_STEPS / 2


# ---------------------------------------------------------------------------------------------
# A small GPT

VOCAB, CONTEXT, STEPS, SAVED_AT = 20, 8, 25, 10
SETTINGS = config.Gpt(
    d_model=8,
    num_layers=1,
    dropout=0.0,
    mlp=config.DenseMlp(hidden=16),
    attention=config.CausalAttention(num_heads=2),
)


PAIRS = {
    f"{kind.kind}-{precision}-{schedule.kind}": (kind, precision, schedule)
    for i, kind in enumerate(OPTIMIZERS)
    for j, schedule in enumerate(SCHEDULES)
    for precision in [PRECISIONS[(i + j) % len(PRECISIONS)]]
}
SHOWN = {"adamw-float32-constant", "muon-bfloat16-cosine", "adafactor-float16-step"}


def test_any_two_of_optimizer_precision_and_schedule_meet() -> None:
    kinds = (OPTIMIZERS, PRECISIONS, SCHEDULES)
    for first, second in itertools.combinations(range(3), 2):
        met = {(label(case[first]), label(case[second])) for case in PAIRS.values()}
        pairs = itertools.product(kinds[first], kinds[second])
        assert met == {(label(one), label(other)) for one, other in pairs}


@cache
def network(precision: str) -> Network:
    return Network(SETTINGS, vocab_size=VOCAB, context_length=CONTEXT, precision=precision)


@cache
def first_state(kind: Any, precision: str) -> Callable[[], TrainState]:
    """Before the first step: no schedule has a say in it, so it is compiled once for all."""
    training = config.Training(precision=precision)
    rate = optax.constant_schedule(0.0)
    optimizer = optimizers.optimizer(tuned(kind), rate, training.grad_clip)
    return jax.jit(lambda: steps.init(network(precision), optimizer, jax.random.key(0), training))


def some_batch() -> Batch:
    tokens = np.random.default_rng(0).integers(0, VOCAB, (4, CONTEXT + 1)).astype(np.int32)
    shape = tokens[:, 1:].shape
    return Batch(
        inputs=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=np.zeros(shape, np.int32),
        weights=np.ones(shape, np.float32),
    )


def followed(step: Any, state: TrainState, number: int) -> tuple[TrainState, list[Metrics]]:
    metrics = []
    for _ in range(number):
        state, measured = step(state, some_batch())
        metrics.append(jax.device_get(measured))
    return state, metrics


@shown("kind, precision, schedule", PAIRS, SHOWN.__contains__)
def test_a_gpt_learns_keeps_its_types_resumes_exactly_and_compiles_once(
    kind: Any, precision: str, schedule: Any, tmp_path: Path
) -> None:
    training = config.Training(precision=precision, batch_size=4)
    rate = course(schedule, TUNED[kind]["learning_rate"], STEPS)
    optimizer = optimizers.optimizer(tuned(kind), rate, training.grad_clip)
    made = steps.make_train_step(
        network(precision), optimizer, rate, training, micro_batches=1, mask_documents=False
    )
    step = jax.jit(made, donate_argnums=0)
    state = first_state(kind, precision)()
    first = dtypes(state)
    assert {leaf.dtype for leaf in state.params.values()} == {np.dtype("float32")}

    state, begun = followed(step, state, SAVED_AT)
    with Checkpoints(tmp_path) as saved:
        saved.save(SAVED_AT, state, Progress())
    straight, ended = followed(step, state, STEPS - SAVED_AT)
    abstract = jax.eval_shape(first_state(kind, precision))
    with Checkpoints(tmp_path, read_only=True) as saved:
        restored, _ = saved.restore(SAVED_AT, abstract)
    resumed, again = followed(step, restored, STEPS - SAVED_AT)

    losses = [float(m.loss) for m in (*begun, *ended)]
    assert losses[-1] < losses[0] - 0.3
    assert dtypes(straight) == first
    assert (straight.step, straight.updates) == (STEPS, STEPS - straight.loss_scale.overflows)
    assert jax.tree.structure(resumed) == jax.tree.structure(straight)
    assert dtypes(resumed) == first
    for one, other in zip(
        jax.tree.leaves((resumed, again)), jax.tree.leaves((straight, ended)), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    assert step._cache_size() == 1
