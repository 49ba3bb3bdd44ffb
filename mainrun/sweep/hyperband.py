"""W&B's `early_terminate: {type: hyperband, ...}`: at which evaluations a poor trial is stopped.

Li et al. 2018 (arXiv:1603.06560), as W&B's server does it. Here are what a sweep file may say and
the bands that follow from it; who watches trials and stops them is the engine's.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mainrun.errors import UserError

_KEYS = ("type", "min_iter", "max_iter", "s", "eta", "strict")
_LAST_BAND = 1_000_000
"""Evaluations; no run has as many."""


@dataclass(frozen=True)
class Hyperband:
    """Where trials are compared: a trial goes on if it is among the best 1/eta there."""

    bands: tuple[int, ...]
    """Evaluations that a trial has logged, rising; the first is W&B's min_iter."""
    eta: float
    strict: bool = True
    """Compare the value at the band; else the best up to now."""

    def verdict(
        self,
        values: Sequence[float],
        others: Sequence[Sequence[float]],
        goal: Literal["minimize", "maximize"],
    ) -> str | None:
        """Why a trial with these values of its evaluations shall end now; None where it goes on.

        `others` are the values of the other trials, some of which have come as far.
        """
        count = len(values)
        if count not in self.bands:
            return None
        sign = 1 if goal == "minimize" else -1
        reached = [self._at(count, other, sign) for other in others if len(other) >= count]
        better = sum(other < self._at(count, values, sign) for other in reached)
        stay = max(1, int((len(reached) + 1) / self.eta))
        if better < stay:
            return None
        return (
            f"pruned at evaluation {count}: {better} of the {len(reached)} other trials that came "
            f"as far were better, and 1 in {self.eta:g} goes on"
        )

    def _at(self, count: int, values: Sequence[float], sign: int) -> float:
        """What is compared, the smaller the better."""
        signed = [sign * value for value in values[:count]]
        return signed[-1] if self.strict else min(signed)

    @property
    def min_iter(self) -> int:
        """The first band."""
        return self.bands[0]


def read(spec: Any, place: str) -> Hyperband | None:
    """What `early_terminate` says, None where it is not there.

    UserError, naming `place`, where it is no hyperband of W&B's.
    """
    if spec is None:
        return None
    example = "{type: hyperband, min_iter: 3}"
    if not isinstance(spec, Mapping):
        raise UserError(f"{place}: `early_terminate` is a mapping, such as {example}")
    for name in spec:
        if name not in _KEYS:
            close = difflib.get_close_matches(str(name), _KEYS, n=1)
            meant = f"; did you mean `{close[0]}`?" if close else ""
            raise UserError(
                f"{place}: `early_terminate` has an unknown key `{name}`{meant}; "
                f"it has {', '.join(_KEYS)}"
            )
    if spec.get("type") != "hyperband":
        raise UserError(
            f"{place}: early_terminate.type={spec.get('type')!r}: accepted is hyperband"
        )
    if ("min_iter" in spec) == ("max_iter" in spec):
        raise UserError(
            f"{place}: `early_terminate` has either min_iter, or max_iter and s, such as {example}"
        )
    eta = spec.get("eta", 3)
    if not _is_number(eta) or not eta > 1:
        raise UserError(f"{place}: early_terminate.eta={eta!r}: a number above 1 is expected")
    eta, strict = float(eta), spec.get("strict", True)
    if not isinstance(strict, bool):
        raise UserError(f"{place}: early_terminate.strict={strict!r}: true or false is expected")
    if "min_iter" in spec:
        if "s" in spec:
            raise UserError(f"{place}: early_terminate.s goes with max_iter, not with min_iter")
        bands = _upwards(_count(spec, "min_iter", place), eta)
    else:
        if "s" not in spec:
            raise UserError(
                f"{place}: early_terminate.max_iter needs `s`, the number of bands below it"
            )
        highest = _count(spec, "max_iter", place)
        bands = _downwards(highest, eta, _count(spec, "s", place))
        if not bands:
            raise UserError(
                f"{place}: early_terminate.max_iter={highest}: the first band below it, "
                f"max_iter / eta={eta:g}, is less than one evaluation"
            )
    return Hyperband(bands, eta, strict)


def _upwards(first: int, eta: float) -> tuple[int, ...]:
    """`first` times the powers of `eta`, whole; none twice."""
    bands: list[int] = []
    band = float(first)
    while band <= _LAST_BAND:
        bands.append(int(band))
        band *= eta
    return tuple(dict.fromkeys(bands))


def _downwards(highest: int, eta: float, count: int) -> tuple[int, ...]:
    """`highest` over the first `count` powers of `eta`, whole and at least 1; the least first."""
    bands: list[int] = []
    band = highest / eta
    while band >= 1 and len(bands) < count:
        bands.append(int(band))
        band /= eta
    return tuple(sorted(set(bands)))


def _count(spec: Mapping[str, Any], name: str, place: str) -> int:
    value = spec[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(
            f"{place}: early_terminate.{name}={value!r}: a whole number above 0 is expected"
        )
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
