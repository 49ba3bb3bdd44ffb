"""Settings of a block's MLP: dense, or a mixture of experts."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT, Count, NonNegative, Positive

Activation = Literal["gelu", "relu", "relu2", "swiglu"]


@dataclass(frozen=True, config=STRICT)
class DenseMlp:
    kind: Activation = "gelu"
    hidden: Count | None = None
    expansion: Positive | None = None

    def hidden_in(self, width: int) -> int:
        """The width between its two layers, in a block of this width."""
        return _hidden(self.hidden, self.expansion, width)

    @model_validator(mode="after")
    def _says_its_width_once(self) -> "DenseMlp":
        _check_said_once(self.hidden, self.expansion)
        return self


@dataclass(frozen=True, config=STRICT)
class MixtureOfExperts:
    kind: Literal["moe"] = "moe"
    activation: Activation = "swiglu"
    hidden: Count | None = None
    expansion: Positive | None = None
    num_experts: Annotated[int, Field(ge=2)] = 4
    top_k: Count = 2
    balance_coefficient: NonNegative = 0.01

    def hidden_in(self, width: int) -> int:
        """The width between the two layers of an expert, in a block of this width."""
        return _hidden(self.hidden, self.expansion, width)

    @model_validator(mode="after")
    def _says_its_width_once(self) -> "MixtureOfExperts":
        _check_said_once(self.hidden, self.expansion)
        return self

    @model_validator(mode="after")
    def _enough_experts(self) -> "MixtureOfExperts":
        if self.top_k > self.num_experts:
            raise ValueError(
                f"model.mlp.top_k={self.top_k} is more than "
                f"model.mlp.num_experts={self.num_experts}"
            )
        return self


Mlp = Annotated[DenseMlp | MixtureOfExperts, Field(discriminator="kind")]


def _hidden(hidden: int | None, expansion: float | None, width: int) -> int:
    if hidden is not None:
        return hidden
    return max(round((4 if expansion is None else expansion) * width), 1)


def _check_said_once(hidden: int | None, expansion: float | None) -> None:
    if hidden is not None and expansion is not None:
        raise ValueError(
            f"model.mlp.expansion={expansion:g} and model.mlp.hidden={hidden} both say how wide "
            "the MLP is: set one, and the other to null"
        )
