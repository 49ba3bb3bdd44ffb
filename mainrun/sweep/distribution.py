"""What a parameter of a sweep is drawn from: a closed union, each able to say its values.

How a file says it is `parameter_file`'s; how a sampler draws from it is the engine's.
"""

from dataclasses import dataclass
from decimal import Decimal
from typing import Any, assert_never


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


def nth(distribution: Distribution, index: int) -> Any:
    """The value of that index, from 0, of one that has an end."""
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
            raise AssertionError("an interval has no nth value")
        case _:
            assert_never(distribution)


def ends(distribution: Distribution) -> tuple[Any, ...]:
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
