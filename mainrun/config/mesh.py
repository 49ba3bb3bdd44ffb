"""How a run is spread over devices."""

from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from mainrun.config.kinds import STRICT

Axis = Literal[-1] | Annotated[int, Field(ge=1)]
"""Devices along an axis of the mesh; -1: all that the other axes leave."""


@dataclass(frozen=True, config=STRICT)
class Mesh:
    """Devices in a grid. Numbers do not depend on it, but for rounding."""

    data: Axis = -1
    fsdp: Axis = 1
    model: Axis = 1

    @model_validator(mode="after")
    def _one_takes_the_rest(self) -> "Mesh":
        if [self.data, self.fsdp, self.model].count(-1) > 1:
            raise ValueError("data, fsdp and model: only one of them can be -1, all that is left")
        return self
