"""Numbers as a report says them: losses with their errors, bytes, counts, settings."""

import math
from collections.abc import Mapping
from typing import Any

from mainrun.record import Number
from mainrun.sweep.search_space import yaml_text

_MOST_CHARACTERS = 80  # of a setting's value


def loss(value: Number | None, stderr: Number | None = None) -> str:
    """`1.2345 ± 0.0012`; four digits behind the point, as standard errors of a run need them."""
    if value is None or not math.isfinite(value):
        return "not a number"
    error = "" if stderr is None or not math.isfinite(stderr) else f" ± {stderr:.4f}"
    return f"{value:.4f}{error}"


def number(value: Number | None, digits: int = 4) -> str:
    """Digits that count: `0.00312`, `1.5e-06`, `12,345`; empty where there is none."""
    if value is None:
        return ""
    if isinstance(value, int) or (math.isfinite(value) and abs(value) >= 10**digits):
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def bytes_text(value: Number | None) -> str:
    if value is None:
        return ""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value:,.0f} B"


def probability(value: Number) -> str:
    return "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def setting(value: Any) -> str:
    """The value as a config has it, short."""
    text = f"{value:.4g}" if isinstance(value, float) else yaml_text(value)
    return text if len(text) <= _MOST_CHARACTERS else f"{text[: _MOST_CHARACTERS - 1]}…"


def settings_text(values: Mapping[str, Any]) -> str:
    """`model.dropout=0.1 optimizer.learning_rate=0.003`."""
    return " ".join(f"{name}={setting(value)}" for name, value in values.items())
