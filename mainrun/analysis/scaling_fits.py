"""What runs of different sizes say: the laws that they determine, each number with its interval.

A power law of one quantity is fitted to the frontier: of each N the tokens with the least loss, of
each D the size, of the compute what nothing cheaper beats. So L(N) is Kaplan's only where tokens
are plenty, and L(D) only where the largest model is large enough. The joint law is fitted to every
run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from jaxtyping import Float64

from mainrun.analysis import bootstrap
from mainrun.analysis.scaling_laws import (
    FLOPS_PER_PARAMETER_AND_TOKEN,
    JointFit,
    JointLaw,
    PowerLaw,
    power_law,
)
from mainrun.analysis.scaling_runs import Run
from mainrun.errors import UserError

Law = TypeVar("Law", PowerLaw, JointLaw)

LEAST_POINTS = 4
"""Different x of a power law, which has two parameters: two are left to tell its error by."""
LEAST_CELLS, LEAST_SIDE = 10, 3
"""Different (N, D) of the joint law, which has five parameters; different N and different D."""
RESAMPLES = 500


@dataclass(frozen=True)
class Estimate:
    """A number and where it lies with 95 %; bounds are NaN where the runs do not tell."""

    value: float
    low: float
    high: float

    @property
    def includes_zero(self) -> bool:
        return not (self.low > 0 or self.high < 0)

    def within(self, least: float, most: float) -> "Estimate":
        """The same number where it can be at all; a widened interval may reach further."""
        return Estimate(self.value, max(self.low, least), min(self.high, most))

    def exp(self) -> "Estimate":
        with np.errstate(over="ignore"):  # a number that is hardly determined may be anything
            return Estimate(*(float(np.exp(x)) for x in (self.value, self.low, self.high)))


def _estimate(
    number: Callable[[Law], float],
    law: Law,
    resampled: Sequence[Law],
    *,
    points: int,
    parameters: int,
) -> Estimate:
    value, estimates = number(law), np.array([number(other) for other in resampled])
    ends = bootstrap.interval(value, estimates, points=points, parameters=parameters)
    return Estimate(value, *ends)


@dataclass(frozen=True, eq=False)
class Frontier:
    """A power law through the best runs for each x."""

    quantity: str  # N, D or C
    x_of: Callable[[Run], float]
    x: Float64[np.ndarray, " runs"]
    losses: Float64[np.ndarray, " runs"]
    points: int
    law: PowerLaw
    resampled: Sequence[PowerLaw]

    @property
    def exponent(self) -> Estimate:
        return self._estimate(lambda law: law.exponent)

    @property
    def log_scale(self) -> Estimate:
        return self._estimate(lambda law: law.log_scale)

    def band(
        self, x: Float64[np.ndarray, " points"]
    ) -> tuple[Float64[np.ndarray, " points"], Float64[np.ndarray, " points"]]:
        """Between which losses the law lies at each x."""
        ends = [self._estimate(lambda law, at=at: law.log_loss(at)) for at in x]  # type: ignore[misc]
        return np.exp([e.low for e in ends]), np.exp([e.high for e in ends])

    def _estimate(self, number: Callable[[PowerLaw], float]) -> Estimate:
        return _estimate(number, self.law, self.resampled, points=self.points, parameters=2)


@dataclass(frozen=True, eq=False)
class Joint:
    """The law of N and D; N is all parameters."""

    law: JointLaw
    points: int
    resampled: Sequence[JointLaw]

    def estimate(self, number: Callable[[JointLaw], float]) -> Estimate:
        return _estimate(number, self.law, self.resampled, points=self.points, parameters=5)

    def positive(self, number: Callable[[JointLaw], float]) -> Estimate:
        """Of a number that is above 0: its interval is one of its logarithm."""
        return self.estimate(lambda law: float(np.log(number(law)))).exp()

    def optimum(self, C: float) -> tuple[Estimate, Estimate]:
        """N and D of least loss with 6·N·D = C."""
        return (
            self.positive(lambda law: law.optimum(C)[0]),
            self.positive(lambda law: law.optimum(C)[1]),
        )

    def without_optimum(self) -> int:
        """Resamples whose law has no compute-optimal point: an exponent is not above 0."""
        return sum(not (law.alpha > 0 and law.beta > 0) for law in self.resampled)


@dataclass(frozen=True, eq=False)
class Fits:
    frontiers: Sequence[Frontier]
    joint: Joint | None
    missing: Sequence[tuple[str, str]]
    """Laws that could not be fitted, and why."""


def fit(runs: Sequence[Run], *, resamples: int | None = None) -> Fits:
    """All laws that the runs determine. UserError where that is none."""
    resamples = resamples or RESAMPLES
    frontiers: list[Frontier] = []
    missing: list[tuple[str, str]] = []
    for quantity, x_of in (("N", _size), ("D", _tokens), ("C", compute)):
        chosen = _frontier(runs, x_of, is_total=quantity == "C")
        points = len({x_of(run) for run in chosen})
        if points < LEAST_POINTS:
            missing.append((f"L({quantity})", _few(quantity, points)))
        else:
            frontiers.append(_fitted_frontier(quantity, chosen, x_of, resamples))
    joint, why = _fitted_joint(runs, resamples)
    if joint is None:
        missing.append(("L(N, D)", why))
    if not frontiers and joint is None:
        raise UserError(
            f"{len(runs)} finished runs determine no scaling law: {missing[0][0]} {missing[0][1]}; "
            "see config/sweep/scaling.yaml"
        )
    return Fits(frontiers, joint, missing)


def compute(run: Run) -> float:
    """C = 6·N·D in floating-point operations, N without embeddings: Kaplan et al., section 2.1."""
    return FLOPS_PER_PARAMETER_AND_TOKEN * run.non_embedding * run.tokens


def _size(run: Run) -> float:
    return float(run.non_embedding)


def _tokens(run: Run) -> float:
    return float(run.tokens)


def _few(quantity: str, points: int) -> str:
    what = {"N": "sizes", "D": "numbers of tokens", "C": "amounts of compute that pay"}[quantity]
    return f"needs {LEAST_POINTS} different {what}, and there are {points}"


def _cells(runs: Sequence[Run]) -> dict[tuple[int, int, int], list[Run]]:
    """Runs that differ in their seed alone, as far as a law can see."""
    found: dict[tuple[int, int, int], list[Run]] = {}
    for run in runs:
        found.setdefault((run.non_embedding, run.parameters, run.tokens), []).append(run)
    return found


def _frontier(runs: Sequence[Run], x_of: Callable[[Run], float], *, is_total: bool) -> list[Run]:
    """The runs of the best cell of each x; with `is_total`, only where no smaller x is as good."""
    best: dict[float, list[Run]] = {}
    for cell in _cells(runs).values():
        x = x_of(cell[0])
        if x not in best or _mean(cell) < _mean(best[x]):
            best[x] = cell
    chosen: list[list[Run]] = []
    for x in sorted(best):
        if not is_total or not chosen or _mean(best[x]) < _mean(chosen[-1]):
            chosen.append(best[x])
    return [run for cell in chosen for run in cell]


def _mean(cell: Sequence[Run]) -> float:
    return float(np.mean([run.last for run in cell]))


def _fitted_frontier(
    quantity: str, runs: Sequence[Run], x_of: Callable[[Run], float], resamples: int
) -> Frontier:
    x, losses = np.array([x_of(run) for run in runs], float), np.array([run.last for run in runs])
    drawn = bootstrap.resamples(
        x.tolist(), resamples, seed=0, usable=lambda counts: len(set(x[counts > 0])) >= 3
    )
    laws = [power_law(x, losses, counts) for counts in drawn]
    law = power_law(x, losses, np.ones(len(x)))
    return Frontier(quantity, x_of, x, losses, len(set(x)), law, laws)


def _fitted_joint(runs: Sequence[Run], resamples: int) -> tuple[Joint | None, str]:
    N, D = (np.array([getattr(r, n) for r in runs], float) for n in ("parameters", "tokens"))
    cells = list(zip(N.tolist(), D.tolist(), strict=True))
    if min(len(set(N)), len(set(D))) < LEAST_SIDE or len(set(cells)) < LEAST_CELLS:
        return None, (
            f"needs {LEAST_CELLS} different pairs of size and tokens, with {LEAST_SIDE} different "
            f"of each, and there are {len(set(cells))}, with {len(set(N))} sizes and "
            f"{len(set(D))} numbers of tokens"
        )

    def usable(counts: Float64[np.ndarray, " runs"]) -> bool:
        """More cells than parameters, and enough of each side."""
        drawn = {cells[i] for i in np.flatnonzero(counts)}
        sides = (len({cell[i] for cell in drawn}) for i in (0, 1))
        return len(drawn) > 5 and min(sides) >= LEAST_SIDE

    found = JointFit(N, D, np.array([run.last for run in runs]))
    drawn = bootstrap.resamples(cells, resamples, seed=0, usable=usable)
    laws = [found.resampled(counts) for counts in drawn]
    return Joint(found.law(), len(set(cells)), laws), ""
