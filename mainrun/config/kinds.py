"""What settings are made of: ranges of numbers, stretches of training, and how strict they are."""

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", strict=True)

Count = Annotated[int, Field(ge=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0, lt=1)]


UNITS = ("steps", "epochs", "tokens", "fraction")


@dataclass(frozen=True, config=STRICT)
class Duration:
    """A stretch of training, said in exactly one of four units."""

    steps: Annotated[int, Field(ge=0)] | None = None
    epochs: NonNegative | None = None
    tokens: Annotated[int, Field(ge=0)] | None = None
    fraction: Annotated[float, Field(ge=0, le=1)] | None = None

    @model_validator(mode="after")
    def _one_unit(self) -> "Duration":
        if sum(getattr(self, unit) is not None for unit in UNITS) != 1:
            raise ValueError(
                "give exactly one of {steps: n}, {epochs: x}, {tokens: n}, {fraction: x}"
            )
        return self

    def in_steps(self, *, total_steps: int, steps_per_epoch: int, tokens_per_step: int) -> int:
        """The same stretch in optimizer steps, rounded to the nearest."""
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return round(self.epochs * steps_per_epoch)
        if self.tokens is not None:
            return round(self.tokens / tokens_per_step)
        assert self.fraction is not None
        return round(self.fraction * total_steps)
