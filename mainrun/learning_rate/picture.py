"""The picture of a range test: every loss, its smoothed course, and the rate that was found."""

from pathlib import Path

from mainrun.learning_rate.curve import Curve
from mainrun.learning_rate.ramp import decimal
from mainrun.plots import RAW, TRAIN, VALIDATION, label_axes, new_figure


def draw(path: Path, name: str, curve: Curve, found: float | None) -> None:
    """Writes it; the format is the path's suffix. What lies far above the first loss is cut off."""
    figure, (axes,) = new_figure(name, panels=1)
    axes.plot(curve.rates, curve.losses, color=RAW, linewidth=1.0, label="loss of a step")
    axes.plot(curve.rates, curve.smoothed, color=TRAIN, linewidth=1.6, label="smoothed")
    if found is not None:
        style = {"color": VALIDATION, "linewidth": 1.2, "linestyle": "--"}
        axes.axvline(found, label=f"falls fastest: {decimal(found)}", **style)
    axes.set_xscale("log")
    if len(curve.losses):
        first, least = curve.losses[0], min(curve.losses)
        margin = 0.05 * (first - least) or 1.0
        axes.set_ylim(least - margin, min(max(curve.losses) + margin, 2 * first - least + margin))
        axes.legend(frameon=False)
    label_axes(axes, "Learning-rate range test", x="learning rate", y="nats per token")
    figure.savefig(path)
