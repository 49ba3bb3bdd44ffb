"""The range test itself: a config's own training steps while its learning rate rises.

Smith 2015 (arXiv:1506.01186), with the exponential ramp and smoothed training loss of Gugger 2018
("How Do You Find A Good Learning Rate"). All but the rate is as in training: optimizer and groups,
precision, batches, dropout, regularisers, clipping. The ramp stands in for schedule and warm-up.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from mainrun import config as configs
from mainrun import memory, parts, probe, trained
from mainrun.compilation import compile_step, initial_state
from mainrun.config import Config
from mainrun.errors import RunFailed, UserError, one_line
from mainrun.learning_rate.curve import DIVERGED_FACTOR, Curve, NoAnswer, Smoothing, steepest
from mainrun.learning_rate.picture import draw
from mainrun.learning_rate.ramp import Ramp, decimal
from mainrun.training import backend, divergence, optimizer
from mainrun.training.step import Metrics
from mainrun.training.trainee import Alone, Asked

Tell = Callable[[str], None]

_SUFFIXES = (".png", ".pdf", ".svg")
_TOLD = 10  # lines about a ramp, while it runs


@dataclass(frozen=True, eq=False)
class Found:
    """A rate, the overrides that set it, and the curve that tells it."""

    learning_rate: float
    overrides: list[str]
    curve: Curve


def find(config: Config, ramp: Ramp, output: Path, *, name: str, tell: Tell) -> Found:
    """The rate at which this config's training loss falls fastest; `output` becomes its picture.

    Nothing else is written. Raises UserError before the first step. Where the curve tells no rate,
    its picture is there all the same, and NoAnswer is raised.
    """
    _check_output(output)
    curve = _measured(config, ramp, tell)
    try:
        rate = steepest(curve)
    except NoAnswer as reason:
        _draw(output, name, curve, None, str(reason), tell)
        raise
    overrides = _overrides(config.optimizer, rate)
    _draw(output, name, curve, rate, " ".join(overrides), tell)
    return Found(rate, overrides, curve)


def as_dict(found: Found) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "learning_rate": found.learning_rate,
        "overrides": found.overrides,
        "diverged": found.curve.diverged,
        "rates": found.curve.rates.tolist(),
        "losses": found.curve.losses.tolist(),
        "smoothed": found.curve.smoothed.tolist(),
    }


def _measured(config: Config, ramp: Ramp, tell: Tell) -> Curve:
    """The losses of the ramp's steps, up to its end or to where training has diverged."""
    rates: list[float] = []
    losses: list[float] = []
    smoothing, least, diverged = Smoothing(ramp.decades_per_step), math.inf, None
    for metrics in _steps(config, ramp, tell):
        loss, rate = float(metrics.loss), float(metrics.learning_rate)
        diverged = _divergence(config, metrics)
        if diverged is not None:
            break
        if metrics.outcome == divergence.OVERFLOWED:
            continue  # the same rate again, with a smaller loss scale
        rates.append(rate)
        losses.append(loss)
        if len(losses) % max(1, ramp.steps // _TOLD) == 0:
            tell(f"step {len(losses)}/{ramp.steps}  rate {decimal(rate)}  loss {loss:.3f}")
        now = smoothing.after(loss)
        least = min(least, now)
        if now > DIVERGED_FACTOR * least:
            diverged = f"the loss is more than {DIVERGED_FACTOR:g} times its least"
            break
        if len(losses) == ramp.steps:
            break
    if diverged is not None:
        tell(f"stopped after {len(losses)} of {ramp.steps} steps: {diverged}")
    return Curve(ramp.decades_per_step, np.array(rates), np.array(losses), diverged)


def _divergence(config: Config, metrics: Metrics) -> str | None:
    """Why this step is the end of the ramp, if it is. An overflow in float16 alone is no end."""
    if metrics.outcome == divergence.NOT_FINITE:
        return f"the loss is {metrics.loss:.6g} and its gradient norm {metrics.grad_norm:.6g}"
    if metrics.outcome == divergence.SPIKED:
        return f"the loss jumped to {metrics.loss:.3f} (training.divergence.spike_deviations)"
    if metrics.loss_scale.at_min >= config.training.loss_scale.limit_at_min:
        return "float16 gradients overflow at training.loss_scale.min"
    return None


def _steps(config: Config, ramp: Ramp, tell: Tell) -> Iterator[Metrics]:
    """Of one training step after the other, without end: batches go round in epochs."""
    backend.prepare()
    base = trained.load_base(config)
    tell(f"reading {config.data.source}")
    texts = parts.read_texts(config, base.tokenizer if base else None)
    config = memory.settled(config, texts.tokenizer.get_vocab_size())
    joined = parts.assemble(config, texts)
    made = optimizer.optimizer(config.optimizer, ramp, config.training.grad_clip)
    joined = replace(joined, learning_rate=ramp, optimizer=made)

    tell("compiling the training step")
    compiled = compile_step(config, joined, base)
    trainee = Alone(initial_state(config, joined, base), compiled.run, compiled.feed)
    for index in count():
        yield trainee.take(Asked(index, 1)).wait().metrics[0]


def _overrides(settings: configs.Optimizer, rate: float) -> list[str]:
    """All that must be set for the rates that were tried: Muon has a second one, in proportion."""
    overrides = [f"optimizer.learning_rate={decimal(rate)}"]
    if isinstance(settings, configs.Muon):
        second = rate * settings.adamw_learning_rate / settings.learning_rate
        overrides.append(f"optimizer.adamw_learning_rate={decimal(second)}")
    return overrides


def _check_output(path: Path) -> None:
    """Raises UserError for a place that no picture can be written to."""
    if path.suffix.lower() not in _SUFFIXES:
        raise UserError(f"--output={path} is no picture: end its name in {', '.join(_SUFFIXES)}")
    if os.path.isdir(path):
        raise UserError(f"--output={path} is a folder: name a file in it")
    if not os.path.isdir(path.parent):
        raise UserError(f"--output={path}: there is no folder {path.parent}")
    try:
        probe.check(path)
    except OSError as error:
        raise UserError(
            f"--output={path} cannot be written ({error.strerror}): name a file in another folder"
        ) from error


def _draw(
    output: Path, name: str, curve: Curve, rate: float | None, result: str, tell: Tell
) -> None:
    """The picture. Raises RunFailed, with the result, where it cannot be written after all."""
    try:
        draw(output, name, curve, rate)
    except OSError as error:
        raise RunFailed(f"{output} cannot be written: {one_line(error)} ({result})") from error
    tell(f"{output} shows the losses of {len(curve.losses)} steps")
