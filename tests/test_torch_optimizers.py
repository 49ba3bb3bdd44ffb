"""mainrun's optimizers and loss scale against PyTorch's own, step by step, on the same gradients.

PyTorch computes in its own interpreter, by `tests/torch_optimizers.py`; see `test_torch`.
"""

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import pytorch
from mainrun import config
from mainrun.training import optimizer as optimizers
from mainrun.training import precision

pytestmark = pytest.mark.skipif(pytorch.interpreter() is None, reason=pytorch.MISSING)

SCRIPT = Path(__file__).with_name("torch_optimizers.py")
STEPS = 25
SHAPES = {"embedding": (8, 6), "bias": (6,)}

# Settings at their defaults, unless the place of the setting is to be seen: an eps as large as
# usual gradients, a decay that moves parameters.
CASES: dict[str, config.Optimizer] = {
    "sgd": config.Sgd(),
    "sgd, momentum": config.Sgd(momentum=0.9),
    "sgd, momentum, decay": config.Sgd(momentum=0.9, weight_decay=0.2),
    "sgd, decay on all": config.Sgd(weight_decay=0.2, decay_on="all"),
    "adam": config.Adam(),
    "adam, decay": config.Adam(weight_decay=0.2),
    "adam, large eps, decay on all": config.Adam(eps=0.1, weight_decay=0.2, decay_on="all"),
    "adamw": config.AdamW(),
    "adamw, large eps, decay on all": config.AdamW(
        b1=0.8, b2=0.9, eps=0.1, weight_decay=0.5, decay_on="all"
    ),
    "adagrad": config.Adagrad(),
    "adagrad, decay": config.Adagrad(weight_decay=0.2),
    "adagrad, initial, large eps": config.Adagrad(initial_accumulator=0.3, eps=0.1),
    "rmsprop": config.RmsProp(),
    "rmsprop, decay": config.RmsProp(weight_decay=0.2),
    "rmsprop, momentum": config.RmsProp(momentum=0.9),
    "rmsprop, momentum, large eps, decay on all": config.RmsProp(
        b2=0.9, eps=0.1, momentum=0.5, weight_decay=0.2, decay_on="all"
    ),
}


def drawn() -> dict[str, Any]:
    """Parameters, gradients and rates. The last two rows of a gradient are tiny, some are zero."""
    draw = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        gradients = draw.normal(size=(STEPS, *shape))
        if name == "embedding":
            gradients[:, -1] *= 10.0 ** draw.uniform(-12, -9, size=(STEPS, 1))
            gradients[:, -2] *= 10.0 ** draw.uniform(-9, -6, size=(STEPS, 1))
            gradients[:, 0] = 0
            gradients[:10, 1] = 0  # then the first of many
        made[f"parameters/{name}"] = draw.normal(size=shape).astype(np.float32)
        made[f"gradients/{name}"] = gradients.astype(np.float32)
    made["rates"] = (0.03 * (1 + np.sin(np.arange(STEPS)))).astype(np.float32)
    return made


def theirs(what: str, folder: Path, **given: Any) -> dict[str, np.ndarray]:
    source, destination = folder / "in.npz", folder / "out.npz"
    np.savez(source, **given)
    command = [str(pytorch.interpreter()), str(SCRIPT), what, str(source), str(destination)]
    subprocess.run(command, check=True)
    return dict(np.load(destination))


@pytest.fixture(scope="module")
def by_pytorch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    cases = json.dumps({case: dataclasses.asdict(settings) for case, settings in CASES.items()})
    return theirs("optimizers", tmp_path_factory.mktemp("updates"), cases=cases, **drawn())


def test_every_update_is_pytorchs(
    by_pytorch: dict[str, np.ndarray], subtests: pytest.Subtests
) -> None:
    given = drawn()
    rates = jnp.asarray(given["rates"])
    for case in CASES:
        with subtests.test(case=case):
            optimizer = optimizers.optimizer(CASES[case], lambda count: rates[count], None)
            params = {name: jnp.asarray(given[f"parameters/{name}"]) for name in SHAPES}
            state = optimizer.init(params)
            for step in range(STEPS):
                gradient = {name: jnp.asarray(given[f"gradients/{name}"][step]) for name in SHAPES}
                updates, state = optimizer.update(gradient, state, params)
                params = optax.apply_updates(params, updates)
                for name, array in params.items():
                    # float32: a rounding of numbers up to 3 at each of the steps, in another order.
                    np.testing.assert_allclose(
                        array,
                        by_pytorch[f"{case}/{name}"][step],
                        rtol=1e-5,
                        atol=5e-6,
                        err_msg=f"{name} after step {step}",
                    )


def test_tiny_gradients_have_a_say(by_pytorch: dict[str, np.ndarray]) -> None:
    """Else the comparison would not see where an eps stands."""
    start = drawn()["parameters/embedding"]
    for case in ("adam", "adagrad", "rmsprop"):
        moved = np.abs(by_pytorch[f"{case}/embedding"][-1] - start)
        assert (moved[-2:].max(axis=1) > 1e-4).all(), case


BOUNDS = {"min": 2.0**-60, "max": 2.0**100}  # not reached: PyTorch has none
SCALES = {
    "PyTorch's factors": config.LossScale(initial=2.0**16, growth_interval=7, **BOUNDS),
    "uneven factors": config.LossScale(
        initial=1024.0, growth_factor=1.5, backoff_factor=0.375, growth_interval=3, **BOUNDS
    ),
    "growth at each step": config.LossScale(initial=1.0, growth_interval=1, **BOUNDS),
}


def some_gradients() -> np.ndarray:
    """600, over four orders of magnitude, some no numbers; then so small that scales only grow."""
    gradients = 10.0 ** np.random.default_rng(0).uniform(-2, 2, size=600)
    gradients[[0, 50, 51, 52, 300]] = np.inf, np.nan, np.inf, -np.inf, np.nan
    gradients[400:440] = 1e-9
    return gradients.astype(np.float32)


@pytest.fixture(scope="module")
def scaled_by_pytorch(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    cases = json.dumps({case: dataclasses.asdict(settings) for case, settings in SCALES.items()})
    folder = tmp_path_factory.mktemp("scales")
    return theirs("scaler", folder, cases=cases, gradients=some_gradients())


@pytest.mark.parametrize("case", SCALES)
def test_scales_and_skipped_steps_are_those_of_pytorchs_scaler(
    case: str, scaled_by_pytorch: dict[str, np.ndarray]
) -> None:
    """The scale decides what overflows: once apart, the two sequences would stay so."""
    settings = SCALES[case]
    scales, skipped = (scaled_by_pytorch[f"{case}/{name}"] for name in ("scales", "skipped"))

    def step(now: precision.LossScale, gradient: jax.Array) -> tuple[precision.LossScale, Any]:
        finite = jnp.isfinite((gradient * now.scale).astype(jnp.float16))
        after = precision.next_scale(settings, now, finite)
        return after, (after.scale, after.overflows > now.overflows)

    gradients = jnp.asarray(some_gradients())
    last, ours = jax.lax.scan(step, precision.initial(settings), gradients)
    np.testing.assert_array_equal(ours[0], scales)
    np.testing.assert_array_equal(ours[1], skipped)
    assert int(last.overflows) == skipped.sum()
    assert 20 < skipped.sum() < 500, "both outcomes are to be compared"
    assert settings.min < scales.min() < scales.max() < settings.max
