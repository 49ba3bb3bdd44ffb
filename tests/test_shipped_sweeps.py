"""Every file in config/sweep/, trial by trial: each is a config, and a network that can be trained.

A grid is gone through whole; of other spaces hundreds of trials are drawn.
"""

import json
import random
import re
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import pytest
import yaml

from mainrun import config
from mainrun.errors import UserError
from mainrun.memory import compiled
from mainrun.model.gpt import Network
from mainrun.sweep import search_space, sweep_file
from mainrun.sweep.distribution import Distribution, Interval, nth, num_values
from mainrun.sweep.search_space import SearchSpace, as_overrides
from mainrun.training import optimizer, step

ROOT = config.default_config_root()
FILES = sorted((ROOT / "sweep").glob("*.yaml"))

DRAWN = 300


@pytest.fixture(autouse=True)
def _in_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sweeps name their config as from there."""
    monkeypatch.chdir(ROOT.parent)


def drawn(distribution: Distribution, draw: random.Random) -> Any:
    if isinstance(distribution, Interval):
        low, high = distribution.low, distribution.high
        return draw.choice([low, high, draw.uniform(low, high)])
    count = num_values(distribution)
    assert count
    return nth(distribution, draw.randrange(count))


def trials(space: SearchSpace, count: int) -> Iterator[dict[str, Any]]:
    """The values of every point of a grid, or of so many drawn trials."""
    if space.method == "grid":
        yield from (search_space.grid_point(space, i) for i in range(search_space.grid_size(space)))
        return
    draw = random.Random(0)
    for _ in range(count):
        yield {name: drawn(d, draw) for name, d in space.parameters.items()}


def test_every_trial_is_a_config(subtests: pytest.Subtests) -> None:
    for path in FILES:
        with subtests.test(path.stem):
            space = sweep_file.read(path)
            search_space.check(space)
            assert space.run_cap or space.method == "grid", "a sweep that ends without --count"
            assert space.config is not None
            source, refused = config.read(space.config), set()
            for values in trials(space, DRAWN):
                try:
                    source.load([*space.overrides, *as_overrides(values)])
                except UserError as error:
                    refused.add(str(error))
            assert not refused


def test_wandb_itself_reads_the_same_numbers(subtests: pytest.Subtests) -> None:
    """PyYAML takes 1e-3 for a word; `wandb sweep FILE` by hand must not."""
    for path in FILES:
        with subtests.test(path.stem):
            shipped = sweep_file.definition(sweep_file.read(path))["parameters"]
            for name, spec in yaml.safe_load(path.read_text())["parameters"].items():
                told = {key: value for key, value in spec.items() if key in shipped[name]}
                assert json.dumps(told, sort_keys=True) == json.dumps(
                    {key: shipped[name][key] for key in told}, sort_keys=True
                )


def test_wandb_takes_the_names(subtests: pytest.Subtests) -> None:
    """Its schema has this pattern for parameters; all files were held against the whole of it."""
    for path in FILES:
        with subtests.test(path.stem):
            for name in sweep_file.read(path).parameters:
                assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name)


def test_the_points_that_a_comment_names_are_those_of_the_space(subtests: pytest.Subtests) -> None:
    for path in FILES:
        with subtests.test(path.stem):
            size = search_space.grid_size(sweep_file.read(path))
            for said in re.findall(r"([\d,]+) points", path.read_text()):
                assert int(said.replace(",", "")) == size


def test_dantinox_has_its_twenty_two_keys() -> None:
    """Two of them are one setting here, and the number of heads, which it derives, is written."""
    space = sweep_file.read(ROOT / "sweep" / "dantinox.yaml")
    assert len(space.parameters) == 22 - 1 + 1
    assert space.parameters["model.attention.num_heads"] == search_space.Fixed("auto")


def test_a_trial_of_dantinox_is_traced_from_the_first_parameter_to_the_last_update(
    subtests: pytest.Subtests,
) -> None:
    """Shapes alone, of two layers and a small vocabulary: what would crash does so here."""
    space = sweep_file.read(ROOT / "sweep" / "dantinox.yaml")
    for number, values in enumerate(trials(space, 12)):
        with subtests.test(number=number):
            words = [*space.overrides, *as_overrides(values), "model.num_layers=2"]
            settings = config.load(space.config, words)
            training, rate = settings.training, optax.constant_schedule(1e-3)
            assert isinstance(training.grad_accumulation, int)
            train_step = step.make_train_step(
                Network(
                    settings.model,
                    vocab_size=320,
                    context_length=settings.data.context_length,
                    precision=training.precision,
                ),
                optimizer.optimizer(settings.optimizer, rate, training.grad_clip),
                rate,
                training,
                micro_batches=training.grad_accumulation,
                mask_documents=settings.data.mask_documents,
            )
            state = compiled.abstract_state(settings, vocab_size=320)
            after, metrics = jax.eval_shape(train_step, state, compiled.abstract_batch(settings))
            assert jax.tree.map(np.shape, after) == jax.tree.map(np.shape, state)
            assert metrics.loss.shape == ()
