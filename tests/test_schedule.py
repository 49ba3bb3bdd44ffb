"""Every kind of schedule against its closed form, in every unit of its durations; what is refused.

Schedules are read as a training step reads them: compiled, at a count that is an array.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mainrun import complaints, config
from mainrun.errors import UserError
from mainrun.training import schedule as schedules

PEAK, TOTAL, PER_EPOCH, TOKENS = 2.0, 120, 40, 512
KINDS = complaints.dataclasses_in(config.Schedule)


def rates(settings: config.Schedule, total: int = TOTAL, peak: float = PEAK) -> np.ndarray:
    """Of every update of a run, and of the one after its last."""
    schedule = jax.jit(
        schedules.schedule(
            settings, peak, total_steps=total, steps_per_epoch=PER_EPOCH, tokens_per_step=TOKENS
        )
    )
    return np.array([float(schedule(jnp.int32(update))) for update in range(total + 1)])


def steps(number: int) -> config.Duration:
    return config.Duration(steps=number)


def closed_form(settings: config.Schedule, total: int) -> np.ndarray:
    """The same in float64, for durations in steps."""
    update = np.arange(total + 1, dtype=np.float64)
    if isinstance(settings, config.NoSchedule):
        return np.full(total + 1, PEAK)
    warmup = settings.warmup.steps
    rest = max(1, total - warmup)
    after = np.maximum(update - warmup, 0)
    match settings:
        case config.Cosine(final_fraction=final):
            share = final + (1 - final) * (1 + np.cos(np.pi * after / rest)) / 2
        case config.Linear(final_fraction=final):
            share = 1 - (1 - final) * after / rest
        case config.WarmupStableDecay(decay=decay, shape=shape, final_fraction=final):
            length = max(1, decay.steps)
            part = np.clip((after - (rest - decay.steps)) / length, 0, 1)
            lost = {
                "linear": part,
                "cosine": (1 - np.cos(np.pi * part)) / 2,
                "one_minus_sqrt": np.sqrt(part),
            }[shape]
            share = 1 - (1 - final) * lost
        case config.Step(every=every, factor=factor):
            share = factor ** (after // max(1, every.steps))
        case config.Constant():
            share = np.ones_like(after)
        case _:
            raise AssertionError(f"write the closed form of {settings}")
    return PEAK * np.where(update < warmup, (update + 1) / (warmup + 1), share)


CASES = [
    config.NoSchedule(),
    *(config.Constant(warmup=steps(n)) for n in (0, 1, 30)),
    *(
        kind(warmup=steps(n), final_fraction=f)
        for kind in (config.Cosine, config.Linear)
        for n, f in ((0, 0.0), (1, 0.0), (30, 0.25), (119, 0.1), (TOTAL, 0.0))
    ),
    *(
        config.WarmupStableDecay(
            warmup=steps(n), decay=steps(decay), shape=shape, final_fraction=final
        )
        for shape in ("linear", "cosine", "one_minus_sqrt")
        for n, decay, final in ((0, 24, 0.0), (12, 30, 0.1), (60, 60, 0.0), (0, 0, 0.5))
    ),
    *(
        config.Step(warmup=steps(n), every=steps(every), factor=factor)
        for n, every, factor in ((0, 41, 0.5), (7, 41, 0.1), (0, 30, 2.0), (3, 1, 0.9), (0, 0, 0.9))
    ),
]


def named(settings: config.Schedule) -> str:
    values = [
        value.steps if isinstance(value, config.Duration) else value
        for value in vars(settings).values()
    ]
    return "-".join(map(str, values))


def test_every_rate_is_that_of_the_closed_form(subtests: pytest.Subtests) -> None:
    for settings in CASES:
        with subtests.test(named(settings)):
            # float32 with some ten operations; at the end of a cosine what is left is its rounding.
            np.testing.assert_allclose(
                rates(settings), closed_form(settings, TOTAL), rtol=1e-5, atol=1e-6 * PEAK
            )


def test_every_kind_has_a_closed_form_here() -> None:
    assert {type(settings) for settings in CASES} == set(KINDS)


def test_a_drop_comes_at_its_update_whatever_the_length() -> None:
    """Compiled, a quotient in float32 has it one update late at all of these but the first two."""
    total = 200
    for every in (1, 10, 41, 47, 55, 61, 82, 83, 94, 97, 107):
        schedule = schedules.schedule(
            config.Step(every=steps(every), factor=0.9),
            1.0,
            total_steps=total,
            steps_per_epoch=total,
            tokens_per_step=1,
        )
        found = jax.jit(jax.vmap(schedule))(jnp.arange(total))
        expected = 0.9 ** (np.arange(total) // every)
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=str(every))


DURATIONS = [
    (kind, field.name)
    for kind in KINDS
    for field in dataclasses.fields(kind)
    if field.type is config.Duration
]


def test_a_duration_is_the_same_in_every_unit(subtests: pytest.Subtests) -> None:
    for kind, name in DURATIONS:
        with subtests.test(kind=kind.kind, name=name):
            number = 30
            given = {
                "steps": number,
                "epochs": number / PER_EPOCH,
                "tokens": number * TOKENS,
                "fraction": number / TOTAL,
            }
            others = {n: steps(10) for k, n in DURATIONS if k is kind and n != name}
            found = [
                rates(kind(**others, **{name: config.Duration(**{unit: amount})}))
                for unit, amount in given.items()
            ]
            for one in found[1:]:
                np.testing.assert_array_equal(one, found[0])
            other = rates(kind(**others, **{name: steps(number - 5)}))
            assert (other != found[0]).any(), "the duration has a say"


def test_every_kind_but_none_has_a_warm_up() -> None:
    assert [kind for kind, name in DURATIONS if name == "warmup"] == [
        kind for kind in KINDS if kind is not config.NoSchedule
    ]


def test_rates_are_in_proportion_to_the_peak_and_none_is_wasted(subtests: pytest.Subtests) -> None:
    for kind in KINDS:
        with subtests.test(kind=kind.kind):
            found = rates(kind())
            np.testing.assert_allclose(rates(kind(), peak=PEAK / 4), found / 4, rtol=1e-6)
            assert (found[:TOTAL] > 0).all()
            assert found.max() == pytest.approx(PEAK)


def test_a_warm_up_longer_than_the_run_is_an_error(subtests: pytest.Subtests) -> None:
    for kind in [k for k, name in DURATIONS if name == "warmup"]:
        with subtests.test(kind=kind.kind):
            others = {"decay": steps(0)} if kind is config.WarmupStableDecay else {}
            for duration in (
                steps(121),
                config.Duration(epochs=3.1),
                config.Duration(tokens=200 * TOKENS),
            ):
                with pytest.raises(
                    UserError, match=r"schedule\.warmup is \d+ steps, the whole run only 120$"
                ):
                    rates(kind(warmup=duration, **others))
            assert len(rates(kind(warmup=steps(TOTAL), **others))) == TOTAL + 1


def test_a_decay_that_begins_before_warm_up_ends_is_an_error() -> None:
    with pytest.raises(
        UserError,
        match=r"^schedule\.warmup and schedule\.decay are 60 and 61 steps, the whole run only 120$",
    ):
        rates(config.WarmupStableDecay(warmup=steps(60), decay=steps(61)))


def test_cosine_without_warm_up_is_the_original_assessments() -> None:
    """Which had PyTorch's CosineAnnealingLR over all steps; test_torch compares with that."""
    expected = [1.0 + math.cos(math.pi * step / TOTAL) for step in range(TOTAL)]
    found = rates(config.Cosine(warmup=steps(0)))[:TOTAL]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_runs_steps_come_from_its_epochs_unless_they_are_given() -> None:
    assert schedules.num_steps(config.Training(epochs=7.0), 134) == 938
    assert schedules.num_steps(config.Training(epochs=0.5), 7) == 3
    assert schedules.num_steps(config.Training(epochs=0.1), 7) == 1
    assert schedules.num_steps(config.Training(epochs=7.0, max_steps=20), 134) == 20
