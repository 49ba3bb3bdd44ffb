"""What a sweep minimises or maximises: W&B's `metric`, and which of them a run logs."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mainrun.config import Config
from mainrun.errors import UserError

METRICS = (
    "val/loss", "val/nats_per_token", "val/perplexity", "val/bits_per_byte", "val/loss_mainrun",
)  # fmt: skip
"""What every evaluation of a run logs and a sweep may ask for."""

AVERAGE_METRICS = tuple(name.replace("val/", "val_average/") for name in METRICS)
"""The same of the average of the weights: logged with `training.weight_average` only."""

Goal = Literal["minimize", "maximize"]

_FOR_WANDB = {
    "impute": ("latest", "best", "worst"),
    "impute_while_running": ("latest", "best", "worst", "false"),
}
"""How W&B's own search fills in what a trial did not reach; passed on to it."""
_KEYS = ("name", "goal", "target", *_FOR_WANDB)


@dataclass(frozen=True)
class Metric:
    name: str = METRICS[0]
    goal: Goal = "minimize"
    target: float | None = None
    """No trial begins after one that was as good as this; None: all begin."""
    impute: str | None = None
    impute_while_running: str | None = None

    def reaches_target(self, value: float) -> bool:
        """Whether a trial's value is as good as `target`; never, where there is none."""
        if self.target is None:
            return False
        return value <= self.target if self.goal == "minimize" else value >= self.target


def read(spec: Any, place: str) -> Metric:
    """What `metric` says; the default where it is not there. UserError naming `place`."""
    if spec is None:
        return Metric()
    if not isinstance(spec, Mapping):
        raise UserError(f"{place}: `metric` has a `name` and a `goal`, such as val/loss, minimize")
    for key in spec:
        if key not in _KEYS:
            raise UserError(
                f"{place}: `metric` has an unknown key `{key}`{_nearest(key, _KEYS)}; "
                f"it has {', '.join(_KEYS)}"
            )
    name, goal = spec.get("name", METRICS[0]), spec.get("goal", "minimize")
    target, names = spec.get("target"), METRICS + AVERAGE_METRICS
    if name not in names:
        raise UserError(
            f"{place}: metric.name={name!r} is never logged{_nearest(str(name), names)}; "
            f"accepted are {', '.join(names)}"
        )
    if goal not in ("minimize", "maximize"):
        raise UserError(f"{place}: metric.goal={goal!r}: accepted are minimize, maximize")
    if target is not None and not _is_number(target):
        raise UserError(f"{place}: metric.target={target!r}: a number is expected")
    for key, accepted in _FOR_WANDB.items():
        if key in spec and spec[key] not in accepted:
            raise UserError(
                f"{place}: metric.{key}={spec[key]!r}: accepted are {', '.join(accepted)}"
            )
    others = {key: spec[key] for key in _FOR_WANDB if key in spec}
    return Metric(name, goal, target, **others)


def written(metric: Metric) -> dict[str, Any]:
    """The metric in W&B's words."""
    return {key: value for key, value in vars(metric).items() if value is not None}


def why_not_logged(metric: Metric, config: Config) -> str | None:
    """Why a run of this config never logs the metric; None where it does."""
    if metric.name in AVERAGE_METRICS and config.training.weight_average is None:
        return (
            f"metric.name={metric.name} is never logged with training.weight_average=null: "
            "set it for every trial, or choose another metric"
        )
    return None


def _nearest(name: str, names: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
