"""Pictures of several runs together: one colour for each group of runs that differ by seed alone.

Beyond seven groups the best keep their colours and the others are grey, behind them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mainrun.analysis import figures
from mainrun.analysis.document import Picture
from mainrun.analysis.run_plots import series
from mainrun.analysis.significance import Group, result

_MOST_GROUPS = 30  # one below the other
_MOST_COLORED = len(figures.COLORS) - 1


def curves(groups: Sequence[Group], names: Sequence[str]) -> list[Picture]:
    """Validation loss against steps and against tokens; none without an evaluation."""
    return [
        picture
        for unit in ("steps", "tokens")
        if (picture := _curves(groups, names, unit)) is not None
    ]


def _curves(groups: Sequence[Group], names: Sequence[str], unit: str) -> Picture | None:
    figure, axes = figures.new_axes()
    styles = _styles(groups, names)
    for group, style in zip(groups, styles, strict=True):
        for run in (*group.runs, *group.left_out):
            steps, losses = series(run.rows, "val/loss")
            scale = 1.0 if unit == "steps" else run.tokens_per_step
            if not len(steps) or scale is None:
                continue
            axes.plot(steps * scale, losses, marker=".", ms=4, lw=1.2, **style)
            style = {**style, "label": None}  # a group is named once
    if not axes.lines:
        return None
    x = "optimizer step" if unit == "steps" else "tokens seen"
    figures.label(axes, f"Validation loss by {unit}", x=x, y="val/loss, nats per character")
    if unit == "tokens":
        axes.xaxis.set_major_formatter(_engineering())
    figures.frame_ends(axes)
    figures.legend(axes)
    return figures.picture(
        figure, f"val_loss_by_{unit}", f"Validation loss of all runs by {unit}, colours by group"
    )


def results(groups: Sequence[Group], names: Sequence[str]) -> Picture | None:
    """Each run's best loss with the standard error of its evaluation, by group, the best groups."""
    figure, axes = figures.new_axes()
    shown = [(g, n, s) for g, n, s in zip(groups, names, _styles(groups, names), strict=True)
             if g.losses]  # fmt: skip
    if len(shown) > _MOST_GROUPS:
        shown = sorted(shown, key=lambda each: _key(each[0]))[:_MOST_GROUPS]
    for place, (group, _, style) in enumerate(shown):
        runs = [run for run in group.runs if result(run) is not None]
        spread = np.linspace(-0.15, 0.15, len(runs)) if len(runs) > 1 else [0.0]
        for run, offset in zip(runs, spread, strict=True):
            assert run.best is not None
            error = run.best["stderr"]
            axes.errorbar(
                [run.best["value"]], [place + offset],
                xerr=None if error is None or not math.isfinite(error) else [error],
                fmt="o", ms=4, lw=1, color=style["color"],
            )  # fmt: skip
        axes.plot([group.mean] * 2, [place - 0.3, place + 0.3], color=style["color"], lw=2)
    if not shown:
        return None
    axes.set_yticks(range(len(shown)), [figures.name(name) for _, name, _ in shown])
    axes.invert_yaxis()
    figure.set_figheight(max(2.2, 1.2 + 0.32 * len(shown)))
    figures.label(
        axes, "Best val/loss", x="nats per character", y="",
    )  # fmt: skip
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    return figures.picture(
        figure, "results",
        "Best validation loss of each run with the standard error of its evaluation, by group; "
        "a bar is the mean over seeds",
    )  # fmt: skip


def _styles(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    ranked = sorted(range(len(groups)), key=lambda i: _key(groups[i]))
    colored = ranked if len(ranked) <= len(figures.COLORS) else ranked[:_MOST_COLORED]
    colors = dict(zip(sorted(colored), figures.COLORS, strict=False))
    return [
        {"color": colors[i], "label": figures.name(names[i]), "zorder": 3}
        if i in colors
        else {"color": figures.GREY, "alpha": 0.35, "zorder": 2}
        for i in range(len(groups))
    ]


def _key(group: Group) -> float:
    return math.inf if group.mean is None else group.mean


def _engineering() -> Any:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
