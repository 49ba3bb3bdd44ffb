"""Settings of the learning rate's course over a run."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Duration, Positive

Fraction = Annotated[float, Field(ge=0, le=1)]


def _no_warmup() -> Duration:
    return Duration(steps=0)


def _tenth() -> Duration:
    return Duration(fraction=0.1)


def _fifth() -> Duration:
    return Duration(fraction=0.2)


def _third() -> Duration:
    return Duration(fraction=1 / 3)


@dataclass(frozen=True, config=STRICT)
class Cosine:
    kind: Literal["cosine"] = "cosine"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    final_fraction: Fraction = 0.0


@dataclass(frozen=True, config=STRICT)
class Linear:
    kind: Literal["linear"] = "linear"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    final_fraction: Fraction = 0.0


@dataclass(frozen=True, config=STRICT)
class WarmupStableDecay:
    kind: Literal["wsd"] = "wsd"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    decay: Duration = dataclasses.field(default_factory=_fifth)
    shape: Literal["linear", "cosine", "one_minus_sqrt"] = "one_minus_sqrt"
    final_fraction: Fraction = 0.0


@dataclass(frozen=True, config=STRICT)
class Step:
    kind: Literal["step"] = "step"
    warmup: Duration = dataclasses.field(default_factory=_no_warmup)
    every: Duration = dataclasses.field(default_factory=_third)
    factor: Positive = 0.1


@dataclass(frozen=True, config=STRICT)
class Constant:
    kind: Literal["constant"] = "constant"
    warmup: Duration = dataclasses.field(default_factory=_no_warmup)


@dataclass(frozen=True, config=STRICT)
class NoSchedule:
    kind: Literal["none"] = "none"


Schedule = Annotated[
    Cosine | Linear | WarmupStableDecay | Step | Constant | NoSchedule,
    Field(discriminator="kind"),
]
