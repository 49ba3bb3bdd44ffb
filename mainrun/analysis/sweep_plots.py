"""Pictures of a sweep: metric against each setting, all settings at once, importance, best so far.

Blue is a finished trial, orange the best; grey and hollow is one that was cut short, at the value
it had by then. What lies far off the others is drawn at the edge, as a triangle: one diverged trial
would hide all differences.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mainrun.analysis import figures
from mainrun.analysis.document import Picture
from mainrun.analysis.quantities import number, setting
from mainrun.analysis.trials import Parameter, Sweep, Trial

_FINISHED, _BEST = figures.COLORS[:2]
_MOST_AXES = 12  # of parallel coordinates
_MOST_LABELS = 12  # of an axis of levels
_MOST_CHARACTERS = 24
_APART = 0.025  # of the height of parallel coordinates
_WIDTH = 0.28  # of the cloud of points above a level


def best_so_far(sweep: Sweep) -> Picture | None:
    """The metric trial by trial, and the best until then."""
    shown = _valued(sweep)
    finished = [trial for trial in shown if trial.is_finished]
    if not finished:
        return None
    figure, axes = figures.new_axes()
    _points(axes, shown, [float(trial.number) for trial in shown], sweep)
    better = np.minimum if sweep.space.metric.goal == "minimize" else np.maximum
    axes.step(
        [trial.number for trial in finished],
        better.accumulate(np.array([trial.value for trial in finished], dtype=float)),
        where="post", color=_BEST, lw=1.4, label="the best so far",
    )  # fmt: skip
    figures.label(axes, "Best so far", x="trial", y=sweep.space.metric.name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    figures.legend(axes, below=True)
    return figures.picture(figure, "best_so_far", "The metric of every trial and the best so far")


def against_setting(sweep: Sweep, parameter: Parameter, name: str) -> Picture | None:
    """The metric by one setting: a scatter where it is a number, else a column for each level."""
    shown = _valued(sweep)
    if not shown:
        return None
    figure, axes = figures.new_axes()
    places = [parameter.place(trial.values[parameter.name]) for trial in shown]
    if parameter.is_numeric:
        _points(axes, shown, places, sweep)
        if parameter.is_log:
            axes.set_xscale("log")
        if 0 < len(parameter.levels) <= _MOST_LABELS:
            axes.set_xticks(parameter.levels, [number(level) for level in parameter.levels])
            axes.minorticks_off()
    else:
        _points(axes, shown, _spread(places), sweep)
        for place in range(len(parameter.levels)):
            values = [t.value for t, x in zip(shown, places, strict=True)
                      if x == place and t.is_finished and t.value is not None]  # fmt: skip
            if values:
                axes.plot([place - 0.35, place + 0.35], [statistics.median(values)] * 2,
                          color=_FINISHED, lw=2)  # fmt: skip
        _label_levels(axes, parameter.levels)
        axes.set_xlim(-0.6, len(parameter.levels) - 0.4)
    what = parameter.name if parameter.is_numeric else f"{parameter.name} (bar: median)"
    figures.label(axes, parameter.name, x=what, y=sweep.space.metric.name)
    if not parameter.is_numeric:
        axes.tick_params(axis="x", labelsize=7)
    figures.legend(axes, below=True)
    return figures.picture(
        figure, name, f"{sweep.space.metric.name} of every trial by {parameter.name}"
    )


def parallel(sweep: Sweep, order: Sequence[str]) -> Picture | None:
    """A line a finished trial through all its settings to its metric; the best is on top."""
    ranked = sweep.ranking()
    chosen = [p for name in order for p in sweep.parameters if p.name == name][:_MOST_AXES]
    if len(ranked) < 2 or len(chosen) < 2:
        return None
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("rank", [_BEST, "#b98a12", _FINISHED, figures.GREY])
    figure, axes = figures.new_axes(wide=True)
    values = [trial.value or 0.0 for trial in ranked]
    lowest, highest = min(values), _edge(values, "minimize")
    if sweep.space.metric.goal == "maximize":
        lowest, highest = _edge(values, "maximize"), max(values)
    columns = [_column(parameter, ranked) for parameter in chosen]
    columns.append([_between(min(max(v, lowest), highest), lowest, highest) for v in values])
    lines = np.array(columns)
    x = np.arange(len(lines))
    faintest = max(0.15, min(0.5, 6 / len(ranked)))  # few lines hide nothing
    dimmed = min(1.0, 60 / len(ranked) + 0.4)
    for place in reversed(range(len(ranked))):
        rank = place / max(len(ranked) - 1, 1)
        axes.plot(
            x, lines[:, place], color=colors(rank), lw=2.2 if place == 0 else 1.0,
            alpha=1.0 if place == 0 else max(faintest, 0.8 - rank) * dimmed,
        )  # fmt: skip
    for place, parameter in enumerate(chosen):
        _axis(axes, place, _ticks(parameter))
    _axis(axes, len(chosen), [(0.0, number(lowest)), (1.0, number(highest))])
    names = [_broken(parameter.name) for parameter in chosen]
    axes.set_xticks(x, [*names, sweep.space.metric.name], fontsize=8)
    axes.set_yticks([])
    axes.set_xlim(-0.2, len(chosen) + 0.45)
    axes.set_ylim(-0.06, 1.06)
    axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    for text in (*axes.get_xticklabels(), *axes.texts):
        text.set_parse_math(False)
    axes.set_title("All settings at once: orange is best, grey is worst", fontsize=10)
    return figures.picture(
        figure, "parallel_coordinates", "A line for each trial through all its settings",
        wide=True,
    )  # fmt: skip


def importance(shares: Mapping[str, float]) -> Picture | None:
    if len(shares) < 2:
        return None
    figure, axes = figures.new_axes()
    names = list(shares)
    axes.barh(range(len(names)), [100 * shares[name] for name in names], color=_FINISHED)
    axes.set_yticks(range(len(names)), [figures.name(name, 36) for name in names])
    axes.invert_yaxis()
    figure.set_figheight(max(2.2, 1.2 + 0.28 * len(names)))
    figures.label(axes, "Importance (PED-ANOVA)", x="share in %", y="")
    for text in axes.get_yticklabels():
        text.set_parse_math(False)
    return figures.picture(figure, "importance", "Share of each setting in what is good")


def _valued(sweep: Sweep) -> list[Trial]:
    return [trial for trial in sweep.trials if trial.value is not None]


def _points(axes: Any, shown: Sequence[Trial], places: Sequence[float], sweep: Sweep) -> None:
    """Each trial at its place and metric, with the standard error of its evaluation."""
    x = np.array(places, dtype=float)
    y = np.array([trial.value for trial in shown], dtype=float)
    errors = np.array([trial.stderr or 0.0 for trial in shown], dtype=float)
    finished = np.array([trial.is_finished for trial in shown])
    minimize = sweep.space.metric.goal == "minimize"
    edge = _edge(y[finished] if finished.any() else y, sweep.space.metric.goal)
    off = y > edge if minimize else y < edge
    y = np.where(off, edge, y)
    triangle = "^" if minimize else "v"
    best = np.array([trial is next(iter(sweep.ranking()), None) for trial in shown])
    for chosen, color, size in (
        (finished & ~best, _FINISHED, 5), (~finished, figures.GREY, 5), (best, _BEST, 8)
    ):  # fmt: skip
        told = chosen & ~off & (errors > 0)
        axes.errorbar(x[told], y[told], yerr=errors[told], fmt="none", ecolor=color, elinewidth=0.8)
        style: dict[str, Any] = {"ls": "none", "color": color, "ms": size, "alpha": 0.8}
        if color == figures.GREY:
            style["mfc"] = "none"
        axes.plot(x[chosen & ~off], y[chosen & ~off], marker="o", **style)
        axes.plot(x[chosen & off], y[chosen & off], marker=triangle, **style)
    named = {"marker": "o", "ls": "none", "color": figures.GREY, "mfc": "none"}
    if not finished.all():
        axes.plot([], [], label="cut short", **named)
    if off.any():
        axes.plot([], [], label=f"{off.sum()} beyond the edge", **named | {"marker": triangle})


def _edge(values: Any, goal: str) -> float:
    """Beyond which a value is far off: three times as far from the best as three in four are."""
    sign = 1.0 if goal == "minimize" else -1.0
    ordered = np.sort(sign * np.array(values, dtype=float))
    reach = 3 * (np.quantile(ordered, 0.75) - ordered[0])
    kept = ordered[ordered <= ordered[0] + reach] if reach > 0 else ordered
    return float(sign * kept[-1])


def _spread(places: Sequence[float]) -> list[float]:
    """The points of a level beside each other, in their order."""
    counts: dict[float, int] = {}
    totals = {place: places.count(place) for place in places}
    spread = []
    for place in places:
        count = counts[place] = counts.get(place, 0) + 1
        total = totals[place]
        spread.append(place + (_WIDTH * (2 * count - total - 1) / total if total > 1 else 0.0))
    return spread


def _label_levels(axes: Any, levels: Sequence[Any]) -> None:
    stride = math.ceil(len(levels) / _MOST_LABELS) if levels else 1
    shown = range(0, len(levels), stride)
    names = [figures.name(setting(levels[place]), _MOST_CHARACTERS) for place in shown]
    slanted = sum(map(len, names)) > 40
    axes.set_xticks(
        list(shown), names, rotation=30 if slanted else 0, ha="right" if slanted else "center"
    )
    for text in axes.get_xticklabels():
        text.set_parse_math(False)


def _column(parameter: Parameter, ranked: Sequence[Trial]) -> list[float]:
    """Where the lines cross the axis; those of one level a little apart, to be seen one by one."""
    places = [_fraction(parameter, trial.values[parameter.name]) for trial in ranked]
    if not parameter.levels:
        return places
    apart = np.linspace(-_APART, _APART, len(ranked))
    return [place + offset for place, offset in zip(places, apart, strict=True)]


def _fraction(parameter: Parameter, value: Any) -> float:
    if not parameter.is_numeric:
        return _between(parameter.place(value), 0.0, len(parameter.levels) - 1.0)
    low, high = parameter.bounds
    place = parameter.place(value)
    if parameter.is_log:
        low, high, place = math.log(low), math.log(high), math.log(place)
    return _between(place, low, high)


def _between(value: float, low: float, high: float) -> float:
    return (value - low) / (high - low) if high > low else 0.5


def _ticks(parameter: Parameter) -> list[tuple[float, str]]:
    if parameter.is_numeric:
        low, high = parameter.bounds
        shown = parameter.levels[:_MOST_LABELS] or sorted({low, high})
        return [(_fraction(parameter, value), number(value)) for value in shown]
    stride = math.ceil(len(parameter.levels) / _MOST_LABELS)
    return [
        (_fraction(parameter, level), figures.name(setting(level), _MOST_CHARACTERS))
        for level in parameter.levels[::stride]
    ]


def _axis(axes: Any, place: int, ticks: Sequence[tuple[float, str]]) -> None:
    axes.plot([place, place], [0, 1], color=figures.GREY, lw=1, zorder=1)
    for height, name in ticks:
        axes.text(
            place + 0.04, height, name, fontsize=7, va="center", zorder=6,
            bbox={"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1},
        )  # fmt: skip


def _broken(name: str) -> str:
    """A dotted path in lines: the axes stand close."""
    return "\n".join(figures.name(part, 20) for part in name.split("."))
