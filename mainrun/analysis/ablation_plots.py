"""Pictures of ablation panels: median curves with their spread, peak memory by choice."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mainrun.analysis import figures
from mainrun.analysis.ablation import Panel, curve
from mainrun.analysis.document import Picture


def curves(panel: Panel, metric: str) -> Picture | None:
    """A line for each choice: the median of its trials, and the middle half of them around it."""
    figure, axes = figures.new_axes()
    floors = []
    for (level, runs), color in zip(panel.levels.items(), _colors(panel), strict=True):
        found = curve(runs, metric)
        if found is None:
            continue
        floors.append(found.lower.min())
        axes.plot(found.steps, found.median, color=color, lw=1.6, label=_named(level, runs))
        axes.fill_between(
            found.steps, found.lower, found.upper, color=color, alpha=0.2, lw=0,
        )  # fmt: skip
    if not axes.lines:
        return None
    figures.label(axes, panel.name, x="optimizer step", y=metric)
    figures.frame_ends(axes)
    axes.set_ylim(bottom=min([axes.get_ylim()[0], *floors]))
    figures.legend(axes)
    return figures.picture(
        figure, f"ablation_{_file_name(panel)}",
        f"Median {metric} by step for each choice of: {panel.name}; shaded: the middle half",
    )  # fmt: skip


def memory(panel: Panel) -> Picture | None:
    """Peak memory of every trial, by choice; a bar is the mean."""
    figure, axes = figures.new_axes()
    named = [
        (level, [run.peak_bytes / 2**20 for run in runs if run.peak_bytes is not None])
        for level, runs in panel.levels.items()
    ]
    known = [(level, sizes) for level, sizes in named if sizes]
    if not known:
        return None
    for place, ((_, sizes), color) in enumerate(zip(known, _colors(panel), strict=False)):
        axes.bar([place], [np.mean(sizes)], color=color, alpha=0.45, width=0.6)
        spread = np.linspace(-0.2, 0.2, len(sizes)) if len(sizes) > 1 else [0.0]
        axes.plot(place + np.array(spread), sizes, ls="none", marker="o", ms=4, color=color)
    axes.set_xticks(range(len(known)), [_named(*each) for each in known])
    for text in axes.get_xticklabels():
        text.set_parse_math(False)
    figures.label(axes, f"Peak memory: {panel.name}", x="", y="MiB")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    return figures.picture(figure, "ablation_memory", f"Peak memory of the trials: {panel.name}")


def _named(level: str, of: Sequence[object]) -> str:
    return f"{figures.name(level)} ({len(of)})"


def _colors(panel: Panel) -> Any:
    return [figures.COLORS[i % len(figures.COLORS)] for i in range(len(panel.levels))]


def _file_name(panel: Panel) -> str:
    return panel.name.lower().replace(" ", "_")
