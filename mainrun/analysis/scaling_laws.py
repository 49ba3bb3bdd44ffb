"""Scaling laws fitted to losses: power laws of one quantity, and the joint law of size and tokens.

Kaplan et al. 2020 (arXiv:2001.08361), eq. 1.1 to 1.3: L(x) = (x_c / x)^exponent, a straight line in
logarithms, by least squares. Hoffmann et al. 2022 (arXiv:2203.15556), approach 3:
L(N, D) = E + A / N^alpha + B / D^beta, by the Huber loss of logarithms, L-BFGS from a grid of
starts. Numbers in, numbers out; where they come from is `scaling`'s, how sure they are
`bootstrap`'s.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64
from scipy.optimize import minimize  # JAX brings SciPy: no lock has one without the other

HUBER_DELTA = 1e-3
"""Residuals of log loss above which a run counts linearly: Hoffmann et al., section D.2."""
FLOPS_PER_PARAMETER_AND_TOKEN = 6.0
"""C = 6·N·D: a multiplication and an addition for each parameter forward, twice that backward."""

_DESCENTS = 8  # of the grid's starts, the best, that are followed to the end
_LARGEST_EXPONENT = 50.0  # of a term that a descent tries: beyond lies only overflow
_EXPONENTS = (-2.0, 5.0)  # what a law of losses can have, generously: keeps a descent from infinity


Numbers = np.ndarray | float | int


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = (scale / x)^exponent, as the point at the data's middle and the slope through it.

    The scale may lie so many orders of magnitude away that it is no float.
    """

    exponent: float
    mean_log_x: float
    mean_log_loss: float

    @property
    def log_scale(self) -> float:
        return self.mean_log_x + self.mean_log_loss / self.exponent if self.exponent else np.nan

    def log_loss(self, x: float) -> float:
        return self.mean_log_loss - self.exponent * float(np.log(x) - self.mean_log_x)


@dataclass(frozen=True)
class JointLaw:
    """L(N, D) = E + A / N^alpha + B / D^beta."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N: Numbers, D: Numbers) -> Float64[np.ndarray, "*shape"]:
        """Of numbers or arrays, which are broadcast."""
        of_size = self.A * np.asarray(N, float) ** -self.alpha
        return np.asarray(self.E + of_size + self.B * np.asarray(D, float) ** -self.beta)

    def optimum(self, C: float) -> tuple[float, float]:
        """N and D of least loss with 6·N·D = C; NaN where the law has no such point.

        Hoffmann et al., eq. 4.
        """
        if not (self.alpha > 0 and self.beta > 0 and self.A > 0 and self.B > 0):
            return np.nan, np.nan
        budget = np.log(C / FLOPS_PER_PARAMETER_AND_TOKEN)
        both = self.alpha + self.beta
        log_G = (np.log(self.alpha * self.A) - np.log(self.beta * self.B)) / both
        log_N = log_G + self.beta / both * budget
        with np.errstate(over="ignore"):  # a law that is hardly determined may say infinity
            return float(np.exp(log_N)), float(np.exp(budget - log_N))


def power_law(
    x: Float64[np.ndarray, " runs"],
    losses: Float64[np.ndarray, " runs"],
    counts: Float64[np.ndarray, " runs"],
) -> PowerLaw:
    """The law whose logarithm is nearest to the losses', run i counting `counts[i]` times.

    At least two different x must count.
    """
    share = counts / counts.sum()
    log_x, log_loss = np.log(x), np.log(losses)
    mean_x, mean_loss = float(share @ log_x), float(share @ log_loss)
    centred = log_x - mean_x
    exponent = -float((share * centred) @ log_loss / ((share * centred) @ centred))
    return PowerLaw(exponent, mean_x, mean_loss)


class JointFit:
    """The joint law of these runs, and of resamples of them, each a descent from the whole's."""

    def __init__(
        self,
        N: Float64[np.ndarray, " runs"],
        D: Float64[np.ndarray, " runs"],
        losses: Float64[np.ndarray, " runs"],
    ) -> None:
        # Centred, a term and its exponent are hardly correlated, and a descent is short.
        self._means = np.array([np.log(N).mean(), np.log(D).mean()])
        self._log_N, self._log_D = np.log(N) - self._means[0], np.log(D) - self._means[1]
        self._log_loss, self._least = np.log(losses), float(losses.min())
        every = np.ones(len(N))
        starts = sorted(self._starts(losses), key=lambda start: self._objective(start, every)[0])
        found = [self._descended(start, every) for start in starts[:_DESCENTS]]
        self._best = min(found, key=lambda pair: pair[0])[1]

    def law(self) -> JointLaw:
        return self._law(self._best)

    def resampled(self, counts: Float64[np.ndarray, " runs"]) -> JointLaw:
        """The law where run i stands in the data `counts[i]` times."""
        return self._law(self._descended(self._best, counts)[1])

    def _starts(self, losses: np.ndarray) -> list[np.ndarray]:
        """Shares of the loss that no size removes, and how the rest divides into the other two."""
        mean, least = float(losses.mean()), float(losses.min())
        shares, parts, exponents = (0.0, 0.3, 0.6, 0.9), (0.2, 0.5, 0.8), (0.1, 0.3, 0.6, 1.0, 1.6)
        return [
            np.array([
                np.log(part * (mean - share * least)), np.log((1 - part) * (mean - share * least)),
                share * least, alpha, beta,
            ])
            for share, part, alpha, beta in itertools.product(shares, parts, exponents, exponents)
        ]  # fmt: skip

    def _objective(self, theta: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of Huber losses over δ², and its gradient.

        A sum, and divided by δ²: with the mean of them L-BFGS stopped too early in the paper's own
        fit (Besiroglu et al. 2024, arXiv:2404.10102). E is itself among the variables, not its
        logarithm, whose gradient is lost where E is small: no descent comes back from there.
        """
        a, b, E, alpha, beta = theta
        exponents = np.stack([a - alpha * self._log_N, b - beta * self._log_D])
        terms = np.exp(np.minimum(exponents, _LARGEST_EXPONENT))
        total = terms.sum(0) + E
        residual = (np.log(total) - self._log_loss) / HUBER_DELTA
        size = np.abs(residual)
        value = np.where(size <= 1, residual**2 / 2, size - 0.5)
        slope = counts * np.clip(residual, -1, 1) / HUBER_DELTA / total
        of_a, of_b = terms * slope
        gradient = [of_a.sum(), of_b.sum(), slope.sum(), -of_a @ self._log_N, -of_b @ self._log_D]
        return float(counts @ value), np.array(gradient)

    def _descended(self, start: np.ndarray, counts: np.ndarray) -> tuple[float, np.ndarray]:
        bounds = [(None, None)] * 2 + [(0, self._least)] + [_EXPONENTS] * 2
        options = {"maxiter": 3000, "maxfun": 6000, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-9}
        found = minimize(
            self._objective, start, (counts,), "L-BFGS-B", jac=True, bounds=bounds, options=options
        )
        return float(found.fun), found.x

    def _law(self, theta: np.ndarray) -> JointLaw:
        a, b, E, alpha, beta = theta
        log_A, log_B = a + alpha * self._means[0], b + beta * self._means[1]
        with np.errstate(over="ignore"):
            A, B = float(np.exp(log_A)), float(np.exp(log_B))
        return JointLaw(float(E), A, B, float(alpha), float(beta))
