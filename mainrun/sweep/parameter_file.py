"""One parameter of a sweep file: W&B's words for what it is drawn from, read and written.

W&B has several words for the same distribution; those without bounds are refused, because the
engine here searches between bounds and checks them before any trial.
"""

import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any, assert_never

from mainrun.errors import UserError
from mainrun.sweep.distribution import (
    Choices,
    Distribution,
    Fixed,
    Integers,
    Interval,
    Multiples,
)

KEYS = ("value", "values", "min", "max", "distribution", "q", "parameters")

_DISTRIBUTIONS = (
    "constant", "categorical", "int_uniform", "uniform", "q_uniform",
    "log_uniform_values", "q_log_uniform_values", "inv_log_uniform_values",
    "log_uniform", "q_log_uniform", "inv_log_uniform",
)  # fmt: skip
_INSTEAD = {
    "normal": "uniform",
    "q_normal": "q_uniform",
    "log_normal": "log_uniform_values",
    "q_log_normal": "q_log_uniform_values",
    "beta": "uniform",
    "q_beta": "q_uniform",
}
"""W&B's distributions that are not had here, and the nearest that are."""

_LARGEST_POWER = 300.0
"""Of e; what a float holds ends at 709."""

_WEIGHTED = "categorical_w_probabilities"
_OF_OTHERS = ("mu", "sigma", "a", "b", "probabilities")


def read(setting: str, spec: Mapping[str, Any], place: str) -> Distribution:
    """What the parameter is drawn from. UserError, naming `place`, where it is nothing of ours."""
    kind = spec.get("distribution") or _implied(spec)
    if kind == _WEIGHTED or "probabilities" in spec:
        raise UserError(
            f"{place}: `{setting}`: `probabilities` weigh the values in W&B's random search alone: "
            "leave them out, and each value is as likely"
        )
    if kind in _INSTEAD:
        raise UserError(
            f"{place}: `{setting}`: distribution={kind!r} cannot be had here, where values are "
            f"searched between bounds: write {_INSTEAD[kind]} with min and max"
        )
    if kind not in _DISTRIBUTIONS:
        said = "needs `value`, `values`, or `min` and `max`" if kind is None else (
            f"distribution={kind!r}: accepted are {', '.join(_DISTRIBUTIONS)}"
        )  # fmt: skip
        raise UserError(f"{place}: `{setting}` {said}")
    needed = {"constant": {"value"}, "categorical": {"values"}}.get(kind, {"min", "max"})
    allowed = needed | {"distribution"} | ({"q"} if kind.startswith("q_") else set())
    for name in sorted(needed - spec.keys()) or sorted(spec.keys() - allowed):
        verb = "needs" if name in needed else "has no"
        raise UserError(f"{place}: `{setting}`: a parameter of distribution {kind} {verb} `{name}`")
    match kind:
        case "constant":
            return Fixed(spec["value"])
        case "categorical":
            values = spec["values"]
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise UserError(f"{place}: `{setting}`: `values` must be a list that is not empty")
            return Choices(tuple(values))
        case _:
            return _range(setting, kind, spec, place)


def is_key(name: str) -> bool:
    """Whether W&B has this key in a parameter; `read` refuses those that are not had here."""
    return name in KEYS or name in _OF_OTHERS


def written(distribution: Distribution) -> dict[str, Any]:
    """The parameter in W&B's words."""
    match distribution:
        case Fixed(value=value):
            return {"value": value}
        case Choices(values=values):
            return {"values": list(values)}
        case Integers(low=low, high=high):
            return {"distribution": "int_uniform", "min": low, "max": high}
        case Interval(low=low, high=high, log=log):
            return {"distribution": "log_uniform_values" if log else "uniform",
                    "min": low, "max": high}  # fmt: skip
        case Multiples(quantum=quantum, first=first, last=last, log=log):
            return {"distribution": "q_log_uniform_values" if log else "q_uniform", "q": quantum,
                    "min": distribution.at(first), "max": distribution.at(last)}  # fmt: skip
        case _:
            assert_never(distribution)


def _implied(spec: Mapping[str, Any]) -> str | None:
    """The distribution that W&B takes where none is named."""
    if "value" in spec:
        return "constant"
    if "values" in spec:
        return "categorical"
    if "min" in spec and "max" in spec:
        whole = isinstance(spec["min"], int) and isinstance(spec["max"], int)
        return "int_uniform" if whole else "uniform"
    return None


def _range(setting: str, kind: str, spec: Mapping[str, Any], place: str) -> Distribution:
    log = "log" in kind
    for name in ("min", "max", "q"):
        if name in spec and not _is_number(spec[name]):
            raise UserError(f"{place}: `{setting}`: {name}={spec[name]!r}: a number is expected")
    low, high, quantum = spec["min"], spec["max"], spec.get("q", 1)
    if low > high:
        raise UserError(f"{place}: `{setting}`: min={low} is above max={high}")
    if log and not kind.endswith("_values"):
        low, high = _powers(setting, kind, float(low), float(high), place)
    if log and low <= 0:
        raise UserError(f"{place}: `{setting}`: min={low}: must be above 0 for distribution {kind}")
    if quantum <= 0:
        raise UserError(f"{place}: `{setting}`: q={quantum}: must be above 0")
    if kind == "int_uniform":
        if not isinstance(low, int) or not isinstance(high, int):
            raise UserError(f"{place}: `{setting}`: min and max of int_uniform are whole numbers")
        return Integers(low, high)
    if not kind.startswith("q_"):
        return Interval(float(low), float(high), log)
    step = Decimal(str(quantum))
    first = math.ceil(Decimal(str(low)) / step)
    last = math.floor(Decimal(str(high)) / step)
    if log:
        first = max(first, 1)
    if first > last:
        raise UserError(
            f"{place}: `{setting}`: no multiple of q={quantum} lies between {low} and {high}"
        )
    return Multiples(quantum, first, last, log)


def _powers(setting: str, kind: str, low: float, high: float, place: str) -> tuple[float, float]:
    """The values whose logarithms `min` and `max` are: of 1/x, for the inverse one.

    That 1/x is log-uniform is the same as that x is.
    """
    if kind == "inv_log_uniform":
        low, high = -high, -low
    if max(-low, high) > _LARGEST_POWER:
        raise UserError(
            f"{place}: `{setting}`: min and max of {kind} are exponents of e, too large here; "
            "log_uniform_values takes the values themselves"
        )
    return math.exp(low), math.exp(high)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
