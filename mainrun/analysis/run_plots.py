"""Pictures of one run, from its rows. Blue is training, orange is validation, as in `plots`."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mainrun.analysis import figures
from mainrun.analysis.document import Picture
from mainrun.analysis.run_folder import Run
from mainrun.chart import loss_curve
from mainrun.record import Row

_TRAIN, _VALIDATION = figures.COLORS[:2]
_RAW_POINTS = 2000  # more than a picture has columns to show
_TITLES = {
    "optimizer/learning_rate": ("Learning rate", "learning rate"),
    "optimizer/grad_norm": ("Gradient norm", "norm of the gradient"),
    "perf/tokens_per_second": ("Throughput", "tokens per second"),
    "noise/scale_tokens": ("Gradient noise scale", "tokens"),
    "precision/loss_scale": ("Loss scale of float16", "factor"),
    "train/objective": ("What is minimised", "train/objective"),
}
_LOGARITHMIC = ("noise/scale_tokens", "precision/loss_scale")
_GROUPS = ("optimizer/", "precision/", "noise/", "train/")
_BALANCE = ("train/balance_loss", "val/balance_loss")


def curves(run: Run) -> list[Picture]:
    """A picture for each metric that the run logged; none before its first."""
    drawn = [_loss_per_token(run), _loss_per_character(run)]
    names = sorted({name for row in run.rows for name in row})
    listed = [*_TITLES, *(n for n in names if n.startswith(_GROUPS))]
    for name in dict.fromkeys(listed):
        if name in names and name != "train/loss" and name not in _BALANCE:
            rows = run.warm if name.startswith("perf/") else run.rows
            drawn.append(_metric(name, rows))
    if set(_BALANCE) & set(names):
        drawn.append(_balance(run.rows))
    return [picture for picture in drawn if picture is not None]


def series(rows: Sequence[Row], name: str) -> tuple[Any, Any]:
    """Steps and values of the rows that have the metric; what is no number is a gap."""
    pairs = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _loss_per_token(run: Run) -> Picture | None:
    trained, evaluated = series(run.rows, "train/loss"), series(run.rows, "val/nats_per_token")
    if not len(trained[0]) and not len(evaluated[0]):
        return None
    figure, axes = figures.new_axes()
    _raw_and_smoothed(axes, *trained, "training, smoothed")
    axes.plot(*evaluated, color=_VALIDATION, marker="o", ms=3.5, lw=1.2, label="validation")
    _finish(axes, "Loss per token", "nats per token")
    return figures.picture(
        figure, "loss_per_token", "Training and validation loss, in nats per token, by step",
        markdown=loss_curve(run.rows),
    )  # fmt: skip


def _loss_per_character(run: Run) -> Picture | None:
    evaluated = [row for row in run.rows if "val/loss" in row]
    if not evaluated:
        return None
    figure, axes = figures.new_axes()
    steps, losses = series(evaluated, "val/loss")
    errors = np.array([row.get("val/loss_stderr", np.nan) for row in evaluated], dtype=float)
    axes.plot(steps, losses, color=_VALIDATION, marker="o", ms=3.5, lw=1.2, label="val/loss")
    axes.fill_between(
        steps, losses - errors, losses + errors, color=_VALIDATION, alpha=0.25, lw=0,
        label="± 1 standard error",
    )  # fmt: skip
    averaged = series(evaluated, "val_average/loss")
    if len(averaged[0]):
        axes.plot(*averaged, color=figures.COLORS[2], lw=1.2, label="of averaged weights")
    _finish(axes, "Validation loss (val/loss)", "nats per character")
    return figures.picture(figure, "val_loss", "Validation loss, in nats per character, by step")


def _metric(name: str, rows: Sequence[Row]) -> Picture | None:
    steps, values = series(rows, name)
    if not np.isfinite(values).any():
        return None
    figure, axes = figures.new_axes()
    title, unit = _TITLES.get(name, (name, name))
    if name == "optimizer/learning_rate":
        axes.plot(steps, values, color=_TRAIN, lw=1.6)
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    else:
        _raw_and_smoothed(axes, steps, values, "smoothed")
    if name in _LOGARITHMIC and np.nanmin(values) > 0:
        axes.set_yscale("log")
    elif name == "perf/tokens_per_second":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.0f}")
    _finish(axes, title, unit)
    file_name = re.sub(r"[^A-Za-z0-9_-]", "_", name)  # the record may hold any name
    return figures.picture(figure, file_name, f"{title} by step")


def _balance(rows: Sequence[Row]) -> Picture:
    figure, axes = figures.new_axes()
    for name, color, style in zip(
        _BALANCE, (_TRAIN, _VALIDATION), ({}, {"marker": "o"}), strict=True
    ):
        steps, values = series(rows, name)
        if len(steps):
            axes.plot(steps, values, color=color, lw=1.2, ms=3.5, label=name, **style)
    _finish(axes, "Balance of the experts", "balance loss")
    return figures.picture(figure, "balance_loss", "Balance loss of the experts by step")


def _raw_and_smoothed(axes: Any, steps: Any, values: Any, name: str) -> None:
    stride = len(steps) // _RAW_POINTS + 1
    axes.plot(steps[::stride], values[::stride], color=_TRAIN, alpha=0.35, lw=0.6)
    if len(steps):
        axes.plot(steps, smoothed(values), color=_TRAIN, lw=1.6, label=name)


def smoothed(values: Any) -> Any:
    """The mean over a fiftieth of the run around each value; gaps are left out of the means."""
    window = np.ones(2 * (len(values) // 100) + 1)
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0), window, mode="same")
    counts = np.convolve(known, window, mode="same")
    return np.where(known, totals / np.maximum(counts, 1), np.nan)


def _finish(axes: Any, title: str, unit: str) -> None:
    figures.label(axes, title, x="optimizer step", y=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figures.legend(axes)
