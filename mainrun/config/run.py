"""One run, whole: all settings, and where its numbers are told."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.data import Bpe, Data, Tokenizer
from mainrun.config.kinds import STRICT, Count
from mainrun.config.mesh import Mesh
from mainrun.config.model import (
    Attention,
    CausalAttention,
    FixedKeys,
    Gpt,
    LocalKeys,
    Model,
    SparseAttention,
    SparseKAttention,
    StridedKeys,
)
from mainrun.config.optimizer import AdamW, Optimizer
from mainrun.config.schedule import Cosine, Schedule
from mainrun.config.training import Training


@dataclass(frozen=True, config=STRICT)
class Tracking:
    project: Annotated[str, Field(min_length=1)] = "mainrun"
    entity: str | None = None
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    name: str | None = None
    tags: tuple[str, ...] = ()
    log_every: Count = 1


@dataclass(frozen=True, config=STRICT)
class Config:
    """One run, whole: everything that decides its numbers, and where they are told."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1337
    data: Data = dataclasses.field(default_factory=Data)
    tokenizer: Tokenizer = dataclasses.field(default_factory=Bpe)
    model: Model = dataclasses.field(default_factory=Gpt)
    optimizer: Optimizer = dataclasses.field(default_factory=AdamW)
    schedule: Schedule = dataclasses.field(default_factory=Cosine)
    training: Training = dataclasses.field(default_factory=Training)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    tracking: Tracking = dataclasses.field(default_factory=Tracking)

    @model_validator(mode="after")
    def _attention_fits_context(self) -> "Config":
        context = self.data.context_length
        for name, tokens in _stretches(self.model.attention):
            if tokens > context:
                raise ValueError(
                    f"model.attention.{name}={tokens} is more than data.context_length={context}"
                )
        block = getattr(self.model.attention, "block_size", 1)
        if context % block:
            raise ValueError(
                f"data.context_length={context} is not divisible by "
                f"model.attention.block_size={block}"
            )
        return self

    @model_validator(mode="after")
    def _two_passes_differ(self) -> "Config":
        is_off = not self.model.dropout and not self.model.attention_rate
        if self.training.regularization.r_drop and is_off:
            raise ValueError(
                "training.regularization.r_drop compares two passes that dropout makes differ, and "
                "model.dropout=0.0: set both, or neither"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_a_base(self) -> "Config":
        if self.model.lora is not None and self.training.init_from is None:
            raise ValueError(
                "model.lora trains adapters beside a trained model: name its run folder in "
                "training.init_from"
            )
        return self


def _stretches(attention: Attention) -> list[tuple[str, int]]:
    """Settings in tokens that the context must hold."""
    match attention:
        case CausalAttention(window_including_self=int(window)):
            return [("window_including_self", window)]
        case SparseKAttention(window_including_self=window, num_selected=selected):
            return [("window_including_self", window), ("num_selected", selected)]
        case SparseAttention(pattern=LocalKeys(window_including_self=window)):
            return [("pattern.window_including_self", window)]
        case SparseAttention(pattern=FixedKeys(stride=stride) | StridedKeys(stride=stride)):
            return [("pattern.stride", stride)]
        case _:
            return []
