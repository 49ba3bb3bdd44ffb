"""What a sweep says of single choices: its trials by optimizer, MoE, window, gate, tying, memory.

The six panels of DantinoX's ablations. A panel is there only where the trials differ in its choice.
The choice is read in each run's config, so it counts whether the sweep varies `optimizer.kind` or
the whole of `optimizer`. Other settings differ between the trials too: a panel compares
what was tried, not one change alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mainrun.analysis.quantities import setting
from mainrun.analysis.run_folder import Run
from mainrun.analysis.run_plots import series
from mainrun.analysis.trials import Sweep

_POINTS = 100  # of a curve


@dataclass(frozen=True)
class Panel:
    name: str
    levels: Mapping[str, Sequence[Run]]
    """The finished runs of each choice, two choices at least."""


@dataclass(frozen=True)
class Curve:
    """Of the runs of one choice, over the steps that all of them reached."""

    steps: Any
    median: Any
    lower: Any
    upper: Any
    """Between them lies the middle half of the runs."""


_CHOICES: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("Optimizer", "optimizer.kind", setting),
    ("MoE against dense", "model.mlp.kind", lambda kind: "MoE" if kind == "moe" else "dense"),
    (
        "Sliding window", "model.attention.window_including_self",
        lambda window: "without a window" if window is None else "with a window",
    ),
    ("Output gate", "model.attention.output_gate",
     lambda gate: "with a gate" if gate else "without a gate"),
    ("Tied embeddings", "model.tie_embeddings", lambda tied: "tied" if tied else "untied"),
)  # fmt: skip


def panels(sweep: Sweep) -> list[Panel]:
    runs = [trial.run for trial in sweep.trials if trial.is_finished and trial.run is not None]
    found = []
    for name, path, level in _CHOICES:
        levels: dict[str, list[Run]] = {}
        for run in runs:
            if run.settings:
                # A kind of attention that has no window, or no gate, has it not.
                levels.setdefault(level(run.settings.get(path)), []).append(run)
        if len(levels) > 1:
            found.append(Panel(name, dict(sorted(levels.items()))))
    return found


def memory(found: Sequence[Panel]) -> Panel | None:
    """The panel whose choices the peak memory is told by: MoE against dense, else the first."""
    preferred = [panel for panel in found if panel.name == "MoE against dense"]
    return next(iter([*preferred, *found]), None)


def curve(runs: Sequence[Run], metric: str) -> Curve | None:
    """The median of a metric by step, each run's evaluations joined by lines.

    Not the mean: one trial that diverged would be all that there is to see.
    """
    known = [(steps[np.isfinite(y)], y[np.isfinite(y)]) for steps, y in
             (series(run.rows, metric) for run in runs)]  # fmt: skip
    known = [(steps, values) for steps, values in known if len(steps)]
    if not known:
        return None
    first = max(steps[0] for steps, _ in known)
    last = min(steps[-1] for steps, _ in known)
    if last <= first:
        return None
    own = np.unique(np.concatenate([steps for steps, _ in known]))
    own = own[(first <= own) & (own <= last)]
    grid = own if len(own) <= _POINTS else np.linspace(first, last, _POINTS)
    values = np.array([np.interp(grid, steps, y) for steps, y in known])
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    return Curve(grid, median, lower, upper)
