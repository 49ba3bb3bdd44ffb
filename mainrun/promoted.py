"""What a promoted config says of itself: the `result` section of a file in `config/sota/`.

It is information and changes no setting: `config.load` looks at it and leaves it out. It holds the
numbers of the runs that were promoted, what they were made with, and a small check that is run
again to see whether the code still comes to the same.
"""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

_STRICT = ConfigDict(extra="forbid", strict=True)

Finite = Annotated[float, Field(allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class Measured:
    """One run's best evaluation, and where it was made."""

    run: str
    seed: int
    value: Finite
    stderr_over_documents: NotNegative | None
    step: Annotated[int, Field(ge=0)]
    data_fingerprint: str
    commit: str | None
    dirty: bool | None
    device: str
    date: str
    """Of its end, UTC."""


@dataclass(frozen=True, config=_STRICT)
class Check:
    """A small training on the CPU, made at promotion: what it was, and where it ended.

    `tolerance` is for the same text, `tolerance_other_text` where the source has another, as
    `python-docs` has under another Python.
    """

    overrides: tuple[str, ...]
    value: Finite
    tolerance: Positive
    tolerance_other_text: Positive
    data_fingerprint: str
    made_with: str


@dataclass(frozen=True, config=_STRICT)
class Result:
    metric: Literal["val/loss"]
    unit: Literal["nats per character"]
    mean: Finite
    standard_error: NotNegative | None
    standard_error_over: Literal["seeds", "documents"]
    """Of one run there is only its evaluation's own, which knows nothing of other seeds."""
    runs: Annotated[tuple[Measured, ...], Field(min_length=1)]
    coverage: Positive
    """Share of the validation text's tokens that were scored: 1.0 is every one, once."""
    validation_tokens: Count
    parameters: Count
    trained_parameters: Count
    steps: Count
    tokens_seen: Count
    data: str | None
    """What the source does not say of itself, such as that it is a file of the promoter's own."""
    command: str
    """That made the first run, without its folder and without paths of the machine."""
    versions: Mapping[str, str]
    check: Check


@dataclass(frozen=True, config=_STRICT)
class Section:
    """The top level of the file, as far as it is no setting."""

    result: Result
