"""Pictures of scaling laws: runs, the law through them and its 95 % band, all axes logarithmic."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from mainrun.analysis.document import Picture
from mainrun.analysis.figures import COLORS, GREY, label, legend, new_axes, picture
from mainrun.analysis.scaling_fits import Frontier, Joint
from mainrun.analysis.scaling_runs import Run

AXES = {
    "N": "parameters without embeddings, N",
    "D": "tokens seen, D",
    "C": "compute C = 6·N·D, floating-point operations",
}
_LOSS = "validation loss, nats per token"
_CURVE = 60  # points of a drawn law


def frontier(found: Frontier, runs: Sequence[Run]) -> Picture:
    """A power law with its band, the runs that it was fitted to, and all others."""
    figure, axes = new_axes()
    xs = [found.x_of(run) for run in runs]
    axes.scatter(xs, [r.last for r in runs], s=12, color=GREY, label="all runs", zorder=2)
    axes.scatter(found.x, found.losses, s=22, color=COLORS[0], label="the best", zorder=3)
    curve = np.geomspace(found.x.min(), found.x.max(), _CURVE)
    axes.plot(
        curve,
        [np.exp(found.law.log_loss(x)) for x in curve],
        color=COLORS[1],
        linewidth=1.4,
        label="power law",
    )
    low, high = found.band(curve)
    axes.fill_between(curve, low, high, color=COLORS[1], alpha=0.2, linewidth=0, label="95 %")
    _logarithmic(axes)
    label(axes, f"L({found.quantity})", x=AXES[found.quantity], y=_LOSS)
    legend(axes)
    exponent = found.exponent
    return picture(
        figure,
        f"scaling_{found.quantity}",
        f"Loss against {AXES[found.quantity]}: a power law of exponent {exponent.value:.3g}",
    )


def joint(found: Joint, runs: Sequence[Run]) -> Picture:
    """The loss against size: a curve of the joint law, and the runs, for each number of tokens."""
    figure, axes = new_axes()
    N = np.array([run.parameters for run in runs], float)
    curve = np.geomspace(N.min(), N.max(), _CURVE)
    amounts = sorted({run.tokens for run in runs})
    shown = amounts if len(amounts) <= len(COLORS) else amounts[:: len(amounts) // len(COLORS) + 1]
    for color, D in zip(COLORS, shown, strict=False):
        here = [run for run in runs if run.tokens == D]
        axes.scatter(
            [run.parameters for run in here], [run.last for run in here], s=16, color=color
        )
        axes.plot(curve, found.law.loss(curve, D), color=color, linewidth=1.2, label=f"D = {D:.3g}")
    _logarithmic(axes)
    label(axes, "L(N, D) = E + A/N^α + B/D^β", x="all parameters, N", y=_LOSS)
    legend(axes)
    return picture(
        figure, "scaling_joint", "Loss against all parameters, for each D; the joint law"
    )


def optimum(found: Joint, budgets: Float64[np.ndarray, " points"], trained: float) -> Picture:
    """The compute-optimal size with its band; beyond `trained` it is extrapolated."""
    figure, axes = new_axes()
    estimates = [found.optimum(C) for C in budgets]
    for color, name, which in ((COLORS[0], "N*", 0), (COLORS[1], "D*", 1)):
        numbers = [pair[which] for pair in estimates]
        axes.plot(budgets, [n.value for n in numbers], color=color, linewidth=1.4, label=name)
        low, high = [n.low for n in numbers], [n.high for n in numbers]
        axes.fill_between(budgets, low, high, color=color, alpha=0.2, linewidth=0)
    axes.axvline(trained, color=GREY, linewidth=1, linestyle=":", label="most that was trained")
    axes.set_xscale("log")
    axes.set_yscale("log")
    label(axes, "Compute-optimal size and tokens", x="compute C = 6·N·D, N all parameters", y="")
    legend(axes)
    return picture(
        figure, "scaling_optimum", "Compute-optimal parameters and tokens against compute"
    )


def _logarithmic(axes: Any) -> None:
    """Ticks in plain numbers: the losses of one study span less than a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 6, 8)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
