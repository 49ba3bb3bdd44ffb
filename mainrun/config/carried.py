"""Settings that a compiled step may have as arrays, so that trials which differ in them share it.

All others decide about shapes, about what is computed, or stand in files that a run leaves. Here is
which these are, and a config in which arrays stand for them.
"""

import copy
from collections.abc import Mapping
from typing import Any

from mainrun.config.load import as_dict
from mainrun.config.model import SparseKAttention
from mainrun.config.run import Config
from mainrun.config.trees import leaves

CARRIED = (
    "optimizer.learning_rate",
    "optimizer.weight_decay",
    "optimizer.b1",
    "optimizer.b2",
    "optimizer.eps",
    "optimizer.momentum",
    "optimizer.adamw_learning_rate",
    "model.dropout",
    "training.grad_clip",
    "training.regularization.label_smoothing",
    "training.regularization.z_loss",
)
"""Numbers that the step computes with.

The schedule is not among them: the step is given the rate of every update. Muon alone needs the
learning rate besides, of which its second one is a multiple.
"""

_APART = (
    "seed",
    "optimizer.learning_rate",
    "schedule.",
    "data.order",
    "data.validation_fraction",
    "data.num_documents",
    "training.epochs",
    "training.max_steps",
    "training.evals_per_epoch",
    "training.patience",
    "training.num_samples",
    "training.checkpoint.",
    "training.divergence.action",
    "training.divergence.limit",
    "tracking.",
)
"""Settings that the step never sees: they decide about states, batches, rates, or the loop."""


def is_zero(value: Any) -> bool:
    """Whether this is the number 0, known before the step is compiled. An array is not."""
    return isinstance(value, (int, float)) and value == 0


def carried_values(config: Config, paths: frozenset[str]) -> dict[str, float]:
    """The numbers that this config has for those of the paths that can be carried."""
    flat = leaves(as_dict(config))
    return {path: flat[path] for path in CARRIED if path in paths and _can_be(config, flat, path)}


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """The config with arrays in place of numbers. Nothing is validated: the numbers have been."""
    for path, value in values.items():
        config = _with_value(config, path.split("."), value)
    return config


def structure(config: Config, paths: frozenset[str]) -> frozenset[tuple[str, str]]:
    """What two configs must have alike to share a step that carries these paths."""
    flat = leaves(as_dict(config))
    carried = carried_values(config, paths)
    return frozenset(
        (path, repr(value))
        for path, value in flat.items()
        if path not in carried and not path.startswith(_APART)
    ) | {("carried", repr(sorted(carried)))}


def _can_be(config: Config, flat: Mapping[str, Any], path: str) -> bool:
    value = flat.get(path)
    if not isinstance(value, (int, float)):
        return False  # null switches the whole thing off
    if path == "optimizer.momentum":
        return value != 0  # without it there is no buffer
    if path == "model.dropout":
        # SparseK plans with the rate before anything is traced.
        return not isinstance(config.model.attention, SparseKAttention)
    return True


def _with_value(node: Any, parts: list[str], value: Any) -> Any:
    name, *rest = parts
    changed = copy.copy(node)
    inner = _with_value(getattr(node, name), rest, value) if rest else value
    object.__setattr__(changed, name, inner)
    return changed
