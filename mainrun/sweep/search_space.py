"""A search space: which settings a sweep varies and over what; what no trial could use is refused.

Here are the distributions, a closed union, the grid that they span, and the check of every value
against the config's schema before any trial starts. How a file says it is `sweep_file`'s.
"""

import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, assert_never

from mainrun import complaints, config, yaml12
from mainrun.config import Config
from mainrun.errors import UserError

METRICS = (
    "val/loss", "val/nats_per_token", "val/perplexity", "val/bits_per_byte", "val/loss_mainrun",
)  # fmt: skip
"""What every evaluation of a run logs and a sweep may ask for."""

Method = Literal["grid", "random", "bayes"]
Goal = Literal["minimize", "maximize"]

_COMBINATIONS_TRIED = 64
"""How many values of the other parameters a value is tried with before it is called impossible."""


@dataclass(frozen=True)
class Fixed:
    """The same value in every trial."""

    value: Any


@dataclass(frozen=True)
class Choices:
    """One of these values, each as likely."""

    values: tuple[Any, ...]


@dataclass(frozen=True)
class Integers:
    """The whole numbers from `low` to `high`, both included."""

    low: int
    high: int


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` to `high`; with `log`, equal ratios are equally likely."""

    low: float
    high: float
    log: bool


@dataclass(frozen=True)
class Multiples:
    """`quantum` times the whole numbers from `first` to `last`, both included."""

    quantum: int | float
    first: int
    last: int
    log: bool

    def at(self, count: int) -> int | float:
        """The multiple as it is written: 3 × 0.1 is 0.3, and whole where the quantum is."""
        if isinstance(self.quantum, int):
            return self.quantum * count
        return float(Decimal(str(self.quantum)) * count)


Distribution = Fixed | Choices | Integers | Interval | Multiples


@dataclass(frozen=True)
class Metric:
    name: str = METRICS[0]
    goal: Goal = "minimize"


@dataclass(frozen=True)
class SearchSpace:
    """A sweep file, read: what is varied over what, in the file's order."""

    name: str
    method: Method
    metric: Metric
    parameters: Mapping[str, Distribution]
    config: Path | None
    overrides: tuple[str, ...]
    run_cap: int | None
    others: Mapping[str, Any]
    """What else the file says, for W&B: name, project, early_terminate and the like."""
    places: Mapping[str, str]
    """`file:line` of each parameter."""
    notes: tuple[str, ...] = ()
    """What was assumed in reading a file that speaks of the report's layout."""

    def varied(self) -> dict[str, Distribution]:
        return {p: d for p, d in self.parameters.items() if not isinstance(d, Fixed)}

    def is_same_search(self, other: "SearchSpace") -> bool:
        """Whether both ask for the same trials of their base config."""
        return (self.method, self.metric, list(self.parameters.items())) == (
            (other.method, other.metric, list(other.parameters.items()))
        )


def with_overrides(space: SearchSpace, overrides: Sequence[str]) -> SearchSpace:
    """The same search with overrides for all trials. UserError where one is a parameter."""
    for override in overrides:
        setting = override.lstrip("-").partition("=")[0]
        for varied in space.parameters:
            if f"{varied}.".startswith(f"{setting}.") or f"{setting}.".startswith(f"{varied}."):
                raise UserError(
                    f"{override!r}: `{varied}` is a parameter of the sweep "
                    f"({space.places[varied]}): change it there"
                )
    return replace(space, overrides=(*space.overrides, *overrides))


def base_config(space: SearchSpace) -> Config:
    """What all trials share. UserError where it is no config."""
    return config.load(_base_path(space), space.overrides)


def check(space: SearchSpace) -> None:
    """UserError for a setting that does not exist, or a value that no trial could have.

    A value that the base config refuses may fit together with other values of the space (heads
    that divide another width); only one that fits with none of those tried is a mistake.
    """
    known = set(complaints.all_paths(Config))
    for setting, place in space.places.items():
        if setting not in known:
            refusal = _refusal(space, {setting: None})
            raise UserError(f"{place}: {refusal or f'unknown setting `{setting}`'}")
    shared = {p: d.value for p, d in space.parameters.items() if isinstance(d, Fixed)}
    for setting, distribution in space.parameters.items():
        for value in _ends(distribution):
            refusal = _refusal(space, {**shared, setting: value})
            if refusal and all(_refusal(space, v) for v in _combinations(space, setting, value)):
                raise UserError(f"{space.places[setting]}: {refusal}")


def as_overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of a trial as words of the command line."""
    return tuple(f"{setting}={yaml_text(value)}" for setting, value in values.items())


def num_values(distribution: Distribution) -> int | None:
    """How many values it has; None for endlessly many."""
    match distribution:
        case Fixed():
            return 1
        case Choices(values=values):
            return len(values)
        case Integers(low=low, high=high) | Multiples(first=low, last=high):
            return high - low + 1
        case Interval():
            return None
        case _:
            assert_never(distribution)


def grid_size(space: SearchSpace) -> int:
    """Points of the grid."""
    return math.prod(num_values(d) or 0 for d in space.parameters.values())


def grid_point(space: SearchSpace, index: int) -> dict[str, Any]:
    """The point of that index, from 0: parameters in the file's order, the last changing first."""
    values: dict[str, Any] = {}
    for setting, distribution in reversed(list(space.parameters.items())):
        index, digit = divmod(index, num_values(distribution) or 1)
        values[setting] = _nth(distribution, digit)
    assert index == 0, "beyond the end of the grid"
    return dict(reversed(list(values.items())))


def _ends(distribution: Distribution) -> tuple[Any, ...]:
    """All of few values, or the two between which the others lie."""
    match distribution:
        case Fixed(value=value):
            return (value,)
        case Choices(values=values):
            return values
        case Integers(low=low, high=high) | Interval(low=low, high=high):
            return (low, high)
        case Multiples(first=first, last=last):
            return (distribution.at(first), distribution.at(last))
        case _:
            assert_never(distribution)


def _combinations(space: SearchSpace, setting: str, value: Any) -> list[dict[str, Any]]:
    """Trials with this value, drawn from the ends of the other parameters; none twice."""
    draw = random.Random(0)
    drawn = (
        {**{p: draw.choice(_ends(d)) for p, d in space.parameters.items()}, setting: value}
        for _ in range(_COMBINATIONS_TRIED)
    )
    return list({as_overrides(values): values for values in drawn}.values())


def _nth(distribution: Distribution, index: int) -> Any:
    match distribution:
        case Fixed(value=value):
            return value
        case Choices(values=values):
            return values[index]
        case Integers(low=low):
            return low + index
        case Multiples(first=first):
            return distribution.at(first + index)
        case Interval():
            raise AssertionError("no grid has an interval")
        case _:
            assert_never(distribution)


def _base_path(space: SearchSpace) -> Path:
    return space.config or config.default_config_root() / "base" / "quickstart.yaml"


def _refusal(space: SearchSpace, values: Mapping[str, Any]) -> str | None:
    """Why no trial can have these values; None where one can."""
    try:
        config.load(_base_path(space), [*space.overrides, *as_overrides(values)])
    except UserError as error:
        return str(error).removesuffix(" (command line)")  # the sweep file's line stands in front
    return None


def yaml_text(value: Any) -> str:
    """The value in YAML: plain where that reads back as the same, else as JSON."""
    plain = str(value)
    try:
        if isinstance(value, str) and plain.strip() and yaml12.parse(plain) == value:
            return plain
    except ValueError:
        pass
    return json.dumps(value, ensure_ascii=False)
