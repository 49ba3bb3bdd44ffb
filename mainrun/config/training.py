"""Settings of the training around the optimizer: how long, in which numbers, what is guarded."""

import dataclasses
import os
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Count, Duration, NonNegative, Positive, Probability


def _every_epoch() -> Duration:
    return Duration(epochs=1)


def _last_quarter() -> Duration:
    return Duration(fraction=0.75)


def _twentieth() -> Duration:
    return Duration(fraction=0.05)


@dataclass(frozen=True, config=STRICT)
class Checkpoint:
    every: Duration = dataclasses.field(default_factory=_every_epoch)
    keep: Annotated[int, Field(ge=1)] = 2


@dataclass(frozen=True, config=STRICT)
class LossScale:
    initial: Positive = 2.0**15
    growth_factor: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 2.0
    growth_interval: Count = 2000
    backoff_factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    min: Positive = 1.0
    max: Positive = 2.0**24
    limit_at_min: Count = 20

    @model_validator(mode="after")
    def _in_order(self) -> "LossScale":
        if not self.min <= self.initial <= self.max:
            raise ValueError(
                f"training.loss_scale.initial={self.initial} is not between "
                f"training.loss_scale.min={self.min} and training.loss_scale.max={self.max}"
            )
        return self


@dataclass(frozen=True, config=STRICT)
class Regularization:
    label_smoothing: Probability = 0.0
    z_loss: NonNegative = 0.0
    r_drop: NonNegative = 0.0


@dataclass(frozen=True, config=STRICT)
class Divergence:
    action: Literal["skip", "stop", "go_back"] = "skip"
    spike_deviations: Positive | None = None
    spike_window: Annotated[int, Field(ge=2)] = 100
    limit: Count = 5


@dataclass(frozen=True, config=STRICT)
class Ema:
    kind: Literal["ema"] = "ema"
    decay: Annotated[float, Field(gt=0, lt=1)] = 0.999


@dataclass(frozen=True, config=STRICT)
class Swa:
    kind: Literal["swa"] = "swa"
    start: Duration = dataclasses.field(default_factory=_last_quarter)
    every: Duration = dataclasses.field(default_factory=_twentieth)


WeightAverage = Annotated[Ema | Swa, Field(discriminator="kind")]


@dataclass(frozen=True, config=STRICT)
class Training:
    epochs: Positive = 7.0
    max_steps: Count | None = None
    init_from: Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)] | None = None
    batch_size: Count = 64
    grad_accumulation: Count | Literal["auto"] = 1
    remat: Literal["none", "blocks"] = "none"
    grad_clip: Positive | None = 1.0
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    attention_kernel: Literal["auto", "plain", "fused"] = "auto"
    loss_scale: LossScale = dataclasses.field(default_factory=LossScale)
    regularization: Regularization = dataclasses.field(default_factory=Regularization)
    weight_average: WeightAverage | None = None
    divergence: Divergence = dataclasses.field(default_factory=Divergence)
    noise_scale_decay: Annotated[float, Field(gt=0, lt=1)] = 0.99
    evals_per_epoch: Annotated[int, Field(ge=0)] = 3
    patience: Count | None = None
    num_samples: Annotated[int, Field(ge=0)] = 4
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> "Training":
        if self.grad_accumulation != "auto" and self.batch_size % self.grad_accumulation:
            raise ValueError(
                f"training.batch_size={self.batch_size} is not divisible by "
                f"training.grad_accumulation={self.grad_accumulation}"
            )
        return self
