"""A search space: which settings a sweep varies and over what; what no trial could use is refused.

Here are the space, the grid that it spans, and the check of every value against the config's schema
before any trial starts. What one parameter is drawn from is `distribution`'s, how a file says it
all `sweep_file`'s.
"""

import json
import math
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from mainrun import config, yaml12
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.sweep.distribution import (
    Distribution,
    Fixed,
    ends,
    nth,
    num_values,
)
from mainrun.sweep.hyperband import Hyperband
from mainrun.sweep.metric import Metric, why_not_logged

Method = Literal["grid", "random", "bayes"]

_COMBINATIONS_TRIED = 64
"""How many values of the other parameters a value is tried with before it is called impossible."""

_POINTS_LOOKED_AT = 10_000
"""Of a grid; each takes 0.5 to 1 ms."""


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
    """`file:line` of each parameter, and of `metric`."""
    early_terminate: Hyperband | None = None
    notes: tuple[str, ...] = ()
    """What was assumed in reading a file that speaks of the report's layout."""

    def varied(self) -> dict[str, Distribution]:
        return {p: d for p, d in self.parameters.items() if not isinstance(d, Fixed)}

    def is_same_search(self, other: "SearchSpace") -> bool:
        """Whether both ask for the same trials of their base config."""
        return (self.method, self.metric, list(self.parameters.items())) == (
            (other.method, other.metric, list(other.parameters.items()))
        )


@dataclass(frozen=True)
class Grid:
    """The points of a grid, looked at one by one."""

    points: int
    impossible: Counter[str]
    """How many are no config, by the reason."""
    repeated: int
    """How many differ from another only in settings of kinds that they do not choose."""


def with_overrides(space: SearchSpace, overrides: Sequence[str]) -> SearchSpace:
    """The same search with overrides for all trials. UserError where one is a parameter."""
    for override in overrides:
        setting = override.lstrip("-").partition("=")[0]
        for varied in space.parameters:
            if _is_said_twice(setting, varied):
                raise UserError(
                    f"{override!r}: `{varied}` is a parameter of the sweep "
                    f"({space.places[varied]}): change it there"
                )
    return replace(space, overrides=(*space.overrides, *overrides))


def base_config(space: SearchSpace) -> Config:
    """What all trials share. UserError where it is no config."""
    return config.load(_base_path(space), space.overrides)


def base_yaml(space: SearchSpace) -> str:
    """A file of what all trials share, in which `auto` stands as it was written.

    So the number of heads still follows from the widths that a trial has.
    """
    whole = config.read(_base_path(space)).with_overrides(space.overrides)
    return yaml.safe_dump(whole.tree, sort_keys=False, allow_unicode=True)


def check(space: SearchSpace) -> None:
    """UserError for a setting that does not exist, or a value that no trial could have.

    A value that the base config refuses may fit together with other values of the space (heads
    that divide another width); only one that fits with none of those tried is a mistake. So is a
    setting of a kind that no trial has.
    """
    trials = _Trials(space, config.read(_base_path(space)))
    for setting in space.parameters:
        if setting not in config.known_paths():
            refusal = trials.refusal({setting: None})
            raise UserError(f"{space.places[setting]}: {refusal or f'unknown setting `{setting}`'}")
    for setting in trials.source.left_out(space.overrides):
        raise UserError(
            f"`{setting}` is said of a kind that the base config has not: to set it for the trials "
            f"that have, make it a parameter, `{setting}: {{value: …}}`"
        )
    if not any(_is_said_twice(p, "training.weight_average") for p in space.parameters) and (
        reason := why_not_logged(space.metric, base_config(space))
    ):
        raise UserError(f"{space.places['metric']}: {reason}")
    shared = {p: d.value for p, d in space.parameters.items() if isinstance(d, Fixed)}
    for setting, distribution in space.parameters.items():
        for value in ends(distribution):
            alone = {**shared, setting: value}
            refusal = trials.refusal(alone)
            if refusal is None and setting not in trials.unused(alone):
                continue
            tried = [
                v for v in _combinations(space, setting, value) if setting not in trials.unused(v)
            ]
            if not tried:
                kinds = (f"{where}.kind={kind}" for where, kind in _conditions(setting))
                raise UserError(
                    f"{space.places[setting]}: `{setting}` changes nothing: no trial has "
                    f"{' and '.join(kinds)}"
                )
            refusals = [trials.refusal(values) for values in tried]
            if all(refusals):
                raise UserError(f"{space.places[setting]}: {refusal or refusals[0]}")


def as_overrides(values: Mapping[str, Any]) -> tuple[str, ...]:
    """The values of a trial as words of the command line."""
    return tuple(f"{setting}={yaml_text(value)}" for setting, value in values.items())


def grid_size(space: SearchSpace) -> int:
    """Points of the grid."""
    return math.prod(num_values(d) or 0 for d in space.parameters.values())


def grid_point(space: SearchSpace, index: int) -> dict[str, Any]:
    """The point of that index, from 0: parameters in the file's order, the last changing first."""
    values: dict[str, Any] = {}
    for setting, distribution in reversed(list(space.parameters.items())):
        index, digit = divmod(index, num_values(distribution) or 1)
        values[setting] = nth(distribution, digit)
    assert index == 0, "beyond the end of the grid"
    return dict(reversed(list(values.items())))


def grid(space: SearchSpace) -> Grid | None:
    """What comes of the points of the grid; None where they are too many to look at."""
    points = grid_size(space)
    if points > _POINTS_LOOKED_AT:
        return None
    trials = _Trials(space, config.read(_base_path(space)))
    impossible: Counter[str] = Counter()
    seen: set[tuple[str, ...]] = set()
    repeated = 0
    has_conditions = any(_conditions(setting) for setting in space.parameters)
    for index in range(points):
        values = grid_point(space, index)
        if reason := trials.refusal(values):
            impossible[reason] += 1
        elif has_conditions:
            unused = trials.unused(values)
            used = as_overrides({p: v for p, v in values.items() if p not in unused})
            repeated += used in seen
            seen.add(used)
    return Grid(points, impossible, repeated)


@dataclass(frozen=True)
class _Trials:
    """What trials of a space would be; the file of their base config is read once."""

    space: SearchSpace
    source: config.Source

    def refusal(self, values: Mapping[str, Any]) -> str | None:
        """Why no trial can have these values; None where one can."""
        try:
            found = self.source.load([*self.space.overrides, *as_overrides(values)])
        except UserError as error:
            return str(error).removesuffix(" (command line)")  # the sweep file's line is in front
        return why_not_logged(self.space.metric, found)

    def unused(self, values: Mapping[str, Any]) -> set[str]:
        """The settings that are said of kinds which a trial with these values has not."""
        left_out = self.source.left_out([*self.space.overrides, *as_overrides(values)])
        said = [p for p in values if _conditions(p)]
        return {p for p in said for path in left_out if f"{path}.".startswith(f"{p}.")}


def _conditions(setting: str) -> tuple[tuple[str, str], ...]:
    return config.path_of(setting).conditions


def _is_said_twice(one: str, other: str) -> bool:
    """Whether both paths are of one setting, or one is inside the other, in some config."""
    first, second = config.path_of(one), config.path_of(other)
    kinds = dict(first.conditions)
    if any(kinds[where] != kind for where, kind in second.conditions if where in kinds):
        return False
    settings = f"{first.setting}.", f"{second.setting}."
    return settings[0].startswith(settings[1]) or settings[1].startswith(settings[0])


def _combinations(space: SearchSpace, setting: str, value: Any) -> Iterator[dict[str, Any]]:
    """Trials with this value, drawn from the ends of the other parameters; none twice.

    They have the kinds of which the setting is said, where those are parameters of their own.
    """
    draw = random.Random(0)
    kinds = {f"{where}.kind": kind for where, kind in _conditions(setting)}
    needed = {p: k for p, k in kinds.items() if p in space.parameters}
    needed = {p: k for p, k in needed.items() if k in ends(space.parameters[p])}
    drawn = (
        {p: draw.choice(ends(d)) for p, d in space.parameters.items()} | needed | {setting: value}
        for _ in range(_COMBINATIONS_TRIED)
    )
    yield from {as_overrides(values): values for values in drawn}.values()


def _base_path(space: SearchSpace) -> Path:
    return space.config or config.default_config_root() / "base" / "quickstart.yaml"


def yaml_text(value: Any) -> str:
    """The value in YAML: plain where that reads back as the same, else as JSON."""
    plain = str(value)
    try:
        if isinstance(value, str) and plain.strip() and yaml12.parse(plain) == value:
            return plain
    except ValueError:
        pass
    return json.dumps(value, ensure_ascii=False)
