"""Settings of the optimizer, its schedule and the training around them."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Count, Duration, NonNegative, Positive, Probability


@dataclass(frozen=True, config=STRICT)
class Sgd:
    kind: Literal["sgd"] = "sgd"
    learning_rate: NonNegative = 6e-3
    momentum: Probability = 0.0
    weight_decay: NonNegative = 0.0
    decay_on: Literal["matrices", "all"] = "matrices"


@dataclass(frozen=True, config=STRICT)
class AdamW:
    kind: Literal["adamw"] = "adamw"
    learning_rate: NonNegative = 1e-3
    b1: Probability = 0.9
    b2: Probability = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    decay_on: Literal["matrices", "all"] = "matrices"


Optimizer = Annotated[Sgd | AdamW, Field(discriminator="kind")]


def _no_warmup() -> Duration:
    return Duration(steps=0)


def _tenth() -> Duration:
    return Duration(fraction=0.1)


@dataclass(frozen=True, config=STRICT)
class Cosine:
    kind: Literal["cosine"] = "cosine"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, config=STRICT)
class Linear:
    kind: Literal["linear"] = "linear"
    warmup: Duration = dataclasses.field(default_factory=_tenth)
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0


@dataclass(frozen=True, config=STRICT)
class Constant:
    kind: Literal["constant"] = "constant"
    warmup: Duration = dataclasses.field(default_factory=_no_warmup)


Schedule = Annotated[Cosine | Linear | Constant, Field(discriminator="kind")]


def _every_epoch() -> Duration:
    return Duration(epochs=1)


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    every: Duration = dataclasses.field(default_factory=_every_epoch)
    keep: Annotated[int, Field(ge=1)] = 2


@dataclass(frozen=True, config=STRICT)
class Training:
    epochs: Positive = 7.0
    max_steps: Count | None = None
    init_from: Annotated[str, Field(min_length=1)] | None = None
    batch_size: Count = 64
    grad_accumulation: Count = 1
    grad_clip: Positive | None = 1.0
    precision: Literal["float32", "bfloat16"] = "float32"
    evals_per_epoch: Annotated[int, Field(ge=0)] = 3
    num_samples: Annotated[int, Field(ge=0)] = 4
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "Training":
        if self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not divisible by "
                f"training.grad_accumulation={self.grad_accumulation}"
            )
        return self
