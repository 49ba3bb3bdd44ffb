"""A learning rate that rises by the same factor from each update to the next."""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float

from mainrun.errors import UserError

_LOWEST, _HIGHEST = 1e-30, 1e30  # well inside float32
_LEAST_FACTOR = 100
_STEPS_PER_DECADE = 8
"""At least: rates need time to be tried. With 4 the answer was 4.5 times the best rate of a sweep,
with 8 twice, with 16 (100 steps over six decades) that rate, with 66 a quarter, with 166 half of it
(hn_titles, two layers, AdamW)."""


@dataclass(frozen=True)
class Ramp:
    """low · (high/low)^(t/(steps-1)) at update t. Raises UserError where it could tell nothing."""

    low: float
    high: float
    steps: int

    def __post_init__(self) -> None:
        for name, rate in (("min", self.low), ("max", self.high)):
            if not _LOWEST <= rate <= _HIGHEST:
                raise UserError(f"--{name}={rate:g} is no rate to try: give one above 0, as 1e-5")
        if self.high <= self.low:
            raise UserError(f"--min={self.low:g} is not below --max={self.high:g}")
        if self.high < _LEAST_FACTOR * self.low:
            raise UserError(
                f"--max={self.high:g} is less than {_LEAST_FACTOR} times --min={self.low:g}: in so "
                "narrow a range no descent stands out"
            )
        least = 1 + math.ceil(_STEPS_PER_DECADE * math.log10(self.high / self.low))
        if self.steps < least:
            raise UserError(
                f"--steps={self.steps} are too few from {self.low:g} to {self.high:g}: at least "
                f"{least}, or a narrower range"
            )

    @property
    def decades_per_step(self) -> float:
        return math.log10(self.high / self.low) / (self.steps - 1)

    def __call__(self, update: Array | int) -> Float[Array, ""]:
        """As an Optax schedule."""
        growth = math.log(10) * self.decades_per_step
        return jnp.exp(math.log(self.low) + growth * update)


def decimal(rate: float) -> str:
    """With two digits, as a config has it: `3.2e-3`."""
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"
