"""Pictures of a run, from its record: `plots/loss.png`, `learning_rate.png`, `throughput.png`.

Colours mean the same in each: blue is training, orange is validation, pale is what was measured,
strong is its smoothed course. Matplotlib is loaded when something is drawn, never before.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mainrun.record import Row, metrics, read_events
from mainrun.result import by_loss, last_event, median, warm_rows

TRAIN, VALIDATION, RAW = "#2a6fbb", "#d9541e", "#b9cfe8"
_RAW_POINTS = 4000  # more than an image has columns to show


def write_plots(run_dir: Path) -> None:
    """Writes the three pictures; a run without a metric yet has none."""
    events = read_events(run_dir / "events.jsonl")
    rows = metrics(events)
    if not rows:
        return
    name = last_event(events, "run_started").get("name", run_dir.resolve().name)
    (run_dir / "plots").mkdir(exist_ok=True)
    _plot_loss(run_dir / "plots" / "loss.png", name, rows)
    _plot_learning_rate(run_dir / "plots" / "learning_rate.png", name, rows)
    _plot_throughput(run_dir / "plots" / "throughput.png", name, warm_rows(events, rows))


def _plot_loss(path: Path, name: str, rows: Sequence[Row]) -> None:
    figure, (per_token, per_character) = new_figure(name, panels=2)
    steps, losses = _series(rows, "train/loss")
    per_token.plot(*_thinned(steps, losses), color=RAW, linewidth=0.6)
    per_token.plot(steps, _smoothed(losses), color=TRAIN, linewidth=1.6, label="training, smoothed")
    steps, losses = _series(rows, "val/nats_per_token")
    style = {"color": VALIDATION, "marker": "o", "markersize": 4, "linewidth": 1.2}
    if len(steps):
        per_token.plot(steps, losses, label="validation", **style)
    _label(per_token, "Loss per token", "nats per token")
    if per_token.has_data():
        per_token.legend(frameon=False)

    evaluated = [row for row in rows if "val/loss" in row]
    steps, losses = _series(evaluated, "val/loss")
    per_character.plot(steps, losses, label="validation", **style)
    with_errors = [row for row in evaluated if "val/loss_stderr" in row]
    if with_errors:
        steps, losses = _series(with_errors, "val/loss")
        _, errors = _series(with_errors, "val/loss_stderr")
        per_character.fill_between(
            steps,
            losses - errors,
            losses + errors,
            color=VALIDATION,
            alpha=0.25,
            linewidth=0,
            label="± 1 standard error",
        )
    if evaluated:
        best = min(evaluated, key=by_loss)
        label = f"best: {best['val/loss']:.3f} at step {int(best['step'])}"
        per_character.axhline(
            best["val/loss"], color="#999999", linewidth=1, linestyle=":", label=label
        )
        per_character.legend(frameon=False)
    else:
        per_character.text(
            0.5, 0.5, "no evaluation", transform=per_character.transAxes, ha="center"
        )
    _label(per_character, "Validation loss (val/loss)", "nats per character")
    figure.savefig(path)


def _plot_learning_rate(path: Path, name: str, rows: Sequence[Row]) -> None:
    figure, (axes,) = new_figure(name, panels=1)
    axes.plot(*_series(rows, "optimizer/learning_rate"), color=TRAIN, linewidth=1.6)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    _label(axes, "Learning rate", "learning rate")
    figure.savefig(path)


def _plot_throughput(path: Path, name: str, rows: Sequence[Row]) -> None:
    figure, (axes,) = new_figure(name, panels=1)
    steps, speeds = _series(rows, "perf/tokens_per_second")
    axes.plot(*_thinned(steps, speeds), color=RAW, linewidth=0.6)
    axes.plot(steps, _smoothed(speeds), color=TRAIN, linewidth=1.6, label="smoothed")
    middle = median(rows, "perf/tokens_per_second")
    if middle is not None:
        label = f"median {middle:,.0f}"
        axes.axhline(middle, color=VALIDATION, linewidth=1, linestyle="--", label=label)
        axes.legend(frameon=False)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _label(axes, "Throughput", "tokens per second")
    figure.savefig(path)


def new_figure(name: str, *, panels: int) -> tuple[Any, Any]:
    """A figure under this name, and its axes side by side."""
    from matplotlib.figure import Figure  # without pyplot: no window, nothing global

    figure = Figure(figsize=(5.2 * panels, 3.8), dpi=150, layout="constrained")
    # A run's name is data: a dollar sign in it is not the start of a formula.
    figure.suptitle(name, parse_math=False, fontsize=11, fontweight="bold")
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def label_axes(axes: Any, title: str, *, x: str, y: str) -> None:
    """Title and units, and a grid behind what is drawn."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _label(axes: Any, title: str, unit: str) -> None:
    label_axes(axes, title, x="optimizer step", y=unit)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _series(rows: Iterable[Row], name: str) -> tuple[Any, Any]:
    """Steps and values of the rows that have the metric, as arrays; what is no number is a gap."""
    import numpy as np

    pairs = [(row["step"], row[name]) for row in rows if name in row]
    steps, values = np.array(pairs, dtype=float).reshape(-1, 2).T
    return steps, np.where(np.isfinite(values), values, np.nan)


def _smoothed(values: Any) -> Any:
    """The mean over a fiftieth of the run around each value; gaps are left out of the means."""
    import numpy as np

    window = np.ones(2 * (len(values) // 100) + 1)
    if len(values) < len(window):
        return values
    known = np.isfinite(values)
    totals = np.convolve(np.where(known, values, 0), window, mode="same")
    counts = np.convolve(known, window, mode="same")
    return np.where(known, totals / np.maximum(counts, 1), np.nan)


def _thinned(steps: Any, values: Any) -> tuple[Any, Any]:
    stride = len(steps) // _RAW_POINTS + 1
    return steps[::stride], values[::stride]
