"""The loss curve of a run as text that GitHub draws: a Mermaid `xychart-beta` in Markdown.

A step summary shows no local picture and no `data:` address; a Mermaid block it does draw. Both
curves are in nats per token, the one unit that training and validation share. Nothing of a run but
its numbers stands in the chart.

Mermaid spreads the values of a line evenly from end to end of the axis, whatever steps they belong
to, and knows no gaps. So each curve is sampled here at even distances between the first and the
last evaluation, and what could not be drawn is said below.
"""

import itertools
import math
from collections.abc import Sequence

from mainrun.markdown import fenced
from mainrun.record import Number, Row

_INTERVALS = 64
"""Of a curve at most. A power of two: before 11.17 Mermaid adds the distance up, and drops the last
point where rounding takes the sum beyond the end of the axis."""
_MARGIN = 0.05  # of the values' range, above and below

# Sizes in pixels. The palette is that of the pictures in plots/, the blue lighter for a dark page.
_HEAD = """\
---
config:
  xyChart:
    width: 800
    height: 340
  themeVariables:
    xyChart:
      backgroundColor: transparent
      plotColorPalette: "#d9541e, #4489d8"
---
xychart-beta
"""

_Points = Sequence[tuple[Number, Number]]


def loss_curve(rows: Sequence[Row]) -> str:
    """The block and, below it, what it leaves out; empty before the second evaluation.

    A run that was recorded without nats per token is drawn in nats per character, and without its
    training loss, which has no such figure.
    """
    per_token = any("val/nats_per_token" in row for row in rows)
    evaluated = _points(rows, "val/nats_per_token" if per_token else "val/loss")
    validation = _finite(evaluated)
    if len(validation) < 2:
        return ""
    first, last = validation[0][0], validation[-1][0]
    trained = _points(rows, "train/loss") if per_token else []
    curves = [("validation", _sampled(validation, _even_grid(validation)))]
    training = [point for point in _finite(trained) if first <= point[0] <= last]
    grid = _grid(first, last)
    if training:
        curves.append(("training", _sampled(training, grid)))
    block = _block(first, last, curves, "token" if per_token else "character")
    notes = _notes(evaluated, trained, last, grid[1] - grid[0] if training else 1)
    return "\n\n".join([block, *notes])


def _points(rows: Sequence[Row], name: str) -> _Points:
    return [(row["step"], row[name]) for row in rows if name in row]


def _finite(points: _Points) -> _Points:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _grid(first: Number, last: Number) -> list[Number]:
    """Steps at even distances: each of them where they are few."""
    intervals = int(last - first) if last - first <= _INTERVALS else _INTERVALS
    return [first + i * (last - first) / intervals for i in range(intervals + 1)]


def _even_grid(points: _Points) -> list[Number]:
    """The steps of the points themselves where Mermaid would put each at its own place."""
    steps = [step for step, _ in points]
    distances = {after - before for before, after in itertools.pairwise(steps)}
    few = len(points) <= _INTERVALS + 1
    return steps if few and len(distances) == 1 else _grid(steps[0], steps[-1])


def _sampled(points: _Points, grid: Sequence[Number]) -> list[Number]:
    """The mean of the points around each place of the grid; where there are none, in between."""
    distance = grid[1] - grid[0]
    around: list[list[Number]] = [[] for _ in grid]
    for step, value in points:
        around[round((step - grid[0]) / distance)].append(value)
    known = [(i, math.fsum(values) / len(values)) for i, values in enumerate(around) if values]
    return [_between(known, i) for i in range(len(grid))]


def _between(known: _Points, place: int) -> Number:
    """The value at that place of the line through the known ones, which goes on level beyond."""
    before = [point for point in known if point[0] <= place] or known[:1]
    after = [point for point in known if point[0] >= place] or known[-1:]
    (left, low), (right, high) = before[-1], after[0]
    return low if left >= right else low + (high - low) * (place - left) / (right - left)


def _block(
    first: Number, last: Number, curves: Sequence[tuple[str, list[Number]]], per: str
) -> str:
    drawn = [value for _, values in curves for value in values]
    low, high = min(drawn), max(drawn)
    span = high - low or abs(high) or 1
    decimals = max(0, 3 - math.floor(math.log10(span)))  # Mermaid reads no 1e-05

    def number(value: Number) -> str:
        return f"{value:.{decimals}f}"

    colours = ("orange", "blue")
    told = ", ".join(f"{name} ({colours[i]})" for i, (name, _) in enumerate(curves))
    lines = [
        f'title "Loss: {told}"',
        f'x-axis "optimizer step" {first} --> {last}',
        f'y-axis "nats per {per}" {number(low - _MARGIN * span)} --> '
        f"{number(high + _MARGIN * span)}",
        *(f'line "{name}" [{", ".join(map(number, values))}]' for name, values in curves),
    ]
    return fenced(_HEAD + "\n".join(f"  {line}" for line in lines), "mermaid")


def _notes(evaluated: _Points, trained: _Points, last: Number, distance: Number) -> list[str]:
    """What a reader of the chart would not see in it, as one paragraph; none where that is all."""
    notes = []
    if distance >= 2:
        notes.append(f"Each point of the training loss is a mean over {distance:,.0f} steps.")
    for points, one, many in (
        (evaluated, "evaluation that was", "evaluations that were"),
        (trained, "training loss that was", "training losses that were"),
    ):
        if lost := [step for step, value in points if not math.isfinite(value)]:
            what = one if len(lost) == 1 else many
            where = f"at step {lost[0]:,}" if len(lost) == 1 else f"the first at step {lost[0]:,}"
            notes.append(f"Not drawn: {len(lost):,} {what} not a number, {where}.")
    if beyond := [point for point in _finite(trained) if point[0] > last]:
        step, value = beyond[-1]
        notes.append(
            f"The curves end at the last evaluation, step {last:,}; training went on to "
            f"step {step:,}, loss {value:.3f} there."
        )
    return [" ".join(notes)] if notes else []
