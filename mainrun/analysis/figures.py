"""Figures of a report: one axes each, drawn once, saved for a light and for a dark page.

Small enough that their words can be read on a phone. Colours of data are chosen to be seen on both
pages; words, axes and grid take the page's. Matplotlib without pyplot: no window, nothing global.
"""

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from mainrun.analysis.document import Picture
from mainrun.console import printable
from mainrun.markdown import shortened
from mainrun.plots import label_axes

COLORS = (
    "#2f7fd0", "#d9541e", "#3a9a55", "#a55fc4", "#b98a12", "#cc4a80", "#1d9a9a", "#858b92",
)  # fmt: skip
"""Of the first, second, ... thing compared. In a run's own curves the first is training, the
second validation, as in `plots`."""
GREY = "#858b92"

_DARK_PAPER, _DARK_INK, _DARK_GRID = "#0d1117", "#d5dbe2", "#30363d"
_DPI = 150


def new_axes(*, wide: bool = False) -> tuple[Figure, Any]:
    figure = Figure(figsize=(10.4, 4.2) if wide else (5.2, 3.5), dpi=_DPI, layout="constrained")
    return figure, figure.subplots()


def name(text: str, characters: int = 40) -> str:
    """Data as a figure can draw it: short, and what no font has spelt out."""
    return shortened(printable(shortened(text, characters)), characters)


def label(axes: Any, title: str, *, x: str, y: str) -> None:
    """Title, units, grid. Words are data: a dollar sign in them starts no formula."""
    label_axes(axes, name(title, 60), x=name(x, 60), y=name(y, 60))
    axes.tick_params(labelsize=8)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_parse_math(False)


def frame_ends(axes: Any) -> None:
    """Leaves off how curves begin, from the same height, and one that diverged: ends are compared.

    Shown is what most curves do after the first tenth of the axis.
    """
    known = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in
             (np.asarray(line.get_data(), dtype=float) for line in axes.lines)]  # fmt: skip
    known = [(x, y) for x, y in known if len(x)]
    if not known:
        return
    begin = 0.1 * max(x.max() for x, _ in known)
    tops = [y[x >= begin].max() for x, y in known if (x >= begin).any()]
    top, bottom = np.quantile(tops, 0.9) if tops else 0.0, min(y.min() for _, y in known)
    if top > bottom:
        margin = 0.05 * (top - bottom)
        axes.set_ylim(bottom - margin, top + margin)


def legend(axes: Any, *, below: bool = False) -> None:
    """Of what has a name; nothing where nothing has one. `below` the axes it hides no point."""
    handles, names = axes.get_legend_handles_labels()
    if not handles:
        return
    style: dict[str, Any] = {"fontsize": 8, "frameon": False}
    if below:
        made = axes.figure.legend(
            handles, names, loc="outside lower center", ncols=len(names), **style
        )
    else:
        made = axes.legend(handles, names, **style)
    for text in made.get_texts():
        text.set_parse_math(False)


def picture(
    figure: Figure, name: str, alt: str, *, wide: bool = False, markdown: str = ""
) -> Picture:
    """The figure as it goes into a document; see `Picture`."""
    light = _png(figure)
    figure.set_layout_engine("none")  # all is placed: colours move nothing
    _darken(figure)
    return Picture(name, alt, light, _png(figure), wide, markdown)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box stands for it
        # Without the version of Matplotlib: the same numbers give the same bytes.
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _darken(figure: Figure) -> None:
    figure.set_facecolor(_DARK_PAPER)
    for axes in figure.axes:
        axes.set_facecolor(_DARK_PAPER)
        axes.tick_params(which="both", color=_DARK_INK, labelcolor=_DARK_INK)
        for spine in axes.spines.values():
            spine.set_edgecolor(_DARK_INK)
        for line in (*axes.xaxis.get_gridlines(), *axes.yaxis.get_gridlines()):
            line.set_color(_DARK_GRID)
    for text in figure.findobj(Text):
        text.set_color(_DARK_INK)
        if (box := text.get_bbox_patch()) is not None:
            box.set_facecolor(_DARK_PAPER)
