"""The training loss under a rising learning rate: its smoothed course, where it falls fastest.

Numbers in, a number out; how they are measured is `range_test`'s. Smoothing and slopes reach over
decades of the rate, not over steps: a ramp of more steps is looked at as closely, with less noise.

A smoothed loss stands at the rate of its newest step, as in fastai, so it is somewhat behind; the
answer is nearer to what trains best than where single losses fall fastest. Measured with 100 steps
over six decades (SGD: seven), as answer / best rate of a sweep in factors of two or so, and the
same with each smoothed loss at the mean rate of what it is made of:

    quickstart, AdamW, 656 steps                  0.6   0.3
    hn_titles, two layers, AdamW, 400 steps       1.1   0.6
    the same, SGD                                 0.6   0.3
    the same, Lion                                1.4   0.8
    the same, Muon                                0.6   0.3
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from mainrun.errors import RunFailed
from mainrun.learning_rate.ramp import decimal

SMOOTHING_DECADES = 0.25
"""Mean age of what a smoothed loss is made of."""
WINDOW_DECADES = 0.5
"""Reach of the straight line whose slope is the descent at its middle."""
DIVERGED_FACTOR = 4.0
"""Smoothed loss over its least so far, above which training has diverged (fastai's)."""
_CLEAR_DEVIATIONS = 8.0
"""Standard deviations of the smoothed loss that a fall is at least. Of 20,000 curves of pure noise,
of 49 and of 100 steps, three fell as far."""


class NoAnswer(RunFailed):
    """The curve does not tell a rate: why, and what to change."""


class Smoothing:
    """An exponential moving average that begins right: its weights sum to one from the first value.

    Sums and weights, divided last: Kingma & Ba 2015 (arXiv:1412.6980), section 3, rearranged.
    """

    def __init__(self, decades_per_step: float) -> None:
        self.decay = SMOOTHING_DECADES / (SMOOTHING_DECADES + decades_per_step)
        self._total = self._weight = 0.0

    def after(self, value: float) -> float:
        """The average once this value has been added."""
        self._total = self.decay * self._total + value
        self._weight = self.decay * self._weight + 1
        return self._total / self._weight


@dataclass(frozen=True, eq=False)
class Curve:
    """A loss for each rate that was tried, before the update that was made with it.

    `diverged` says why the ramp ended early, if it did; the loss that ended it is left out where it
    is no number.
    """

    decades_per_step: float
    rates: Float64[np.ndarray, " steps"]
    losses: Float64[np.ndarray, " steps"]
    diverged: str | None = None

    @cached_property
    def smoothed(self) -> Float64[np.ndarray, " steps"]:
        smoothing = Smoothing(self.decades_per_step)
        return np.array([smoothing.after(loss) for loss in self.losses])


def steepest(curve: Curve) -> float:
    """The rate at which the smoothed loss falls fastest against the rate's logarithm.

    Its slope is that of a straight line through half a decade, by least squares, so no single step
    decides. Only what comes before the least loss counts. Raises NoAnswer where the loss does not
    clearly fall, or falls fastest at either end of the ramp.

    Smith 2015 (arXiv:1506.01186), section 3.3, reads bounds off the curve by eye; the steepest
    point is fastai's reading of it. The least loss is where training is about to fail.
    """
    start, window = _steps(curve, SMOOTHING_DECADES), 1 + _steps(curve, WINDOW_DECADES)
    if len(curve.losses) < start + 2 * window:
        raise NoAnswer(
            f"{curve.diverged or 'the ramp ended'} after {len(curve.losses)} steps, before a rate "
            "could be told: lower --min"
        )
    least = window + int(np.argmin(curve.smoothed[window:]))
    opening, noise = float(np.mean(curve.losses[:window])), _noise(curve)
    clear = _CLEAR_DEVIATIONS * noise + 1e-6 * abs(opening)
    if not opening - curve.smoothed[least] > clear:
        rises = curve.diverged is not None or curve.smoothed[-1] - opening > clear
        raise NoAnswer(
            f"the loss never clearly falls: {opening:.3f} at first, smoothed "
            f"{curve.smoothed[least]:.3f} at best, with a noise of {noise:.3f}; "
            + (
                "it rises: lower --min and --max"
                if rises
                else "raise --max, or --steps and training.batch_size against the noise"
            )
        )
    firsts: Int64[np.ndarray, " windows"] = np.arange(start, max(start, least - window + 1) + 1)
    x = curve.decades_per_step * (np.arange(window) - (window - 1) / 2)
    slopes = np.array([x @ curve.smoothed[i : i + window] for i in firsts]) / (x @ x)
    best = int(np.argmin(slopes))
    if best == 0:
        raise NoAnswer(
            f"the loss falls fastest at {decimal(curve.rates[0])}, the start: lower --min"
        )
    if curve.diverged is None and firsts[best] + window == len(curve.losses):
        raise NoAnswer(
            f"the loss falls fastest at {decimal(curve.rates[-1])}, the end: raise --max"
        )
    tried = curve.rates[firsts[best] : firsts[best] + window]
    return float(np.exp(np.mean(np.log(tried))))


def _steps(curve: Curve, decades: float) -> int:
    return round(decades / curve.decades_per_step)


def _noise(curve: Curve) -> float:
    """Standard deviation of the smoothed loss that comes from single steps' alone.

    By the median difference of neighbours: a fall, or a jump, hardly counts in it.
    """
    of_step = float(np.median(np.abs(np.diff(curve.losses)))) / (math.sqrt(2) * 0.6745)
    decay = Smoothing(curve.decades_per_step).decay
    return of_step * math.sqrt((1 - decay) / (1 + decay))
