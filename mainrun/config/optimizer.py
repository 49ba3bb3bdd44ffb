"""Settings of the optimizers: one class for each kind, and groups of parameters with own rates."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Count, NonNegative, Positive, Probability

DecayOn = Literal["matrices", "all"]
MomentDtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, config=STRICT)
class Group:
    """Parameters whose dotted names match a pattern, and what they have of their own."""

    parameters: Annotated[str, Field(min_length=1)]
    learning_rate_factor: NonNegative = 1.0
    weight_decay: NonNegative | None = None

    @model_validator(mode="after")
    def _says_something(self) -> "Group":
        if self.learning_rate_factor == 1.0 and self.weight_decay is None:
            raise ValueError(
                f"the group {self.parameters} has neither a learning_rate_factor nor a "
                "weight_decay of its own: say one, or leave it out"
            )
        return self


Groups = tuple[Group, ...]


@dataclass(frozen=True, config=STRICT)
class Sgd:
    kind: Literal["sgd"] = "sgd"
    learning_rate: NonNegative = 6e-3
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class Adam:
    kind: Literal["adam"] = "adam"
    learning_rate: NonNegative = 1e-3
    b1: Probability = 0.9
    b2: Probability = 0.999
    eps: Positive = 1e-8
    moment_dtype: MomentDtype = "float32"
    weight_decay: NonNegative = 0.0
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class AdamW:
    kind: Literal["adamw"] = "adamw"
    learning_rate: NonNegative = 1e-3
    b1: Probability = 0.9
    b2: Probability = 0.95
    eps: Positive = 1e-8
    moment_dtype: MomentDtype = "float32"
    weight_decay: NonNegative = 0.1
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class Adagrad:
    kind: Literal["adagrad"] = "adagrad"
    learning_rate: NonNegative = 1e-2
    initial_accumulator: NonNegative = 0.0
    eps: Positive = 1e-10
    weight_decay: NonNegative = 0.0
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class RmsProp:
    kind: Literal["rmsprop"] = "rmsprop"
    learning_rate: NonNegative = 1e-3
    b2: Probability = 0.99
    eps: Positive = 1e-8
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class Adafactor:
    kind: Literal["adafactor"] = "adafactor"
    learning_rate: NonNegative = 1e-2
    decay_exponent: Annotated[float, Field(gt=0, lt=1)] = 0.8
    clip_update_rms: Positive | None = 1.0
    scale_by_parameter: bool = True
    min_size_to_factor: Count = 128
    weight_decay: NonNegative = 0.0
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class Lion:
    kind: Literal["lion"] = "lion"
    learning_rate: NonNegative = 1e-4
    b1: Probability = 0.9
    b2: Probability = 0.99
    moment_dtype: MomentDtype = "float32"
    weight_decay: NonNegative = 1.0
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class Muon:
    kind: Literal["muon"] = "muon"
    learning_rate: Positive = 0.02
    momentum: Probability = 0.95
    newton_schulz_steps: Count = 5
    adamw_learning_rate: NonNegative = 1e-3
    b1: Probability = 0.9
    b2: Probability = 0.95
    eps: Positive = 1e-8
    moment_dtype: MomentDtype = "float32"
    weight_decay: NonNegative = 0.1
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


@dataclass(frozen=True, config=STRICT)
class ScheduleFreeAdamW:
    kind: Literal["schedule_free_adamw"] = "schedule_free_adamw"
    learning_rate: NonNegative = 2.5e-3
    b1: Annotated[float, Field(gt=0, lt=1)] = 0.9
    b2: Probability = 0.999
    eps: Positive = 1e-8
    weight_lr_power: NonNegative = 2.0
    weight_decay: NonNegative = 0.1
    decay_on: DecayOn = "matrices"
    groups: Groups = ()


Optimizer = Annotated[
    Sgd | Adam | AdamW | Adagrad | RmsProp | Adafactor | Lion | Muon | ScheduleFreeAdamW,
    Field(discriminator="kind"),
]
