"""A sweep file: a search space in W&B's own sweep YAML, so that one file serves both engines.

A parameter's name is a dotted path into the config; parameters may nest as W&B lets them. What all
trials share stands where W&B has it, in `command`: the config file and its overrides. Whatever is
no such file is a `UserError` naming line and remedy.
"""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, assert_never, cast

from mainrun import yaml12
from mainrun.config import report_names
from mainrun.errors import UserError
from mainrun.sweep import report_sweep
from mainrun.sweep.search_space import (
    METRICS,
    Choices,
    Distribution,
    Fixed,
    Integers,
    Interval,
    Method,
    Metric,
    Multiples,
    SearchSpace,
    num_values,
    yaml_text,
)  # fmt: skip

ARGUMENTS = "${args_no_hyphens}"
"""Where W&B's agent puts a trial's parameters, as `key.path=value`."""

_KEYS = (
    "method", "metric", "parameters", "command", "run_cap", "early_terminate",
    "program", "project", "entity", "name", "description",
)  # fmt: skip
_FOR_WANDB = ("name", "description", "project", "entity", "run_cap", "early_terminate")
_PARAMETER_KEYS = ("value", "values", "min", "max", "distribution", "q", "parameters")
_OLD_PROGRAM = ("program", "train.py")  # of the mainrun report, whose names are translated
_DISTRIBUTIONS = (
    "constant", "categorical", "int_uniform", "uniform", "q_uniform",
    "log_uniform_values", "q_log_uniform_values",
)  # fmt: skip


def read(path: Path) -> SearchSpace:
    """The search space in the file. UserError where it is none, naming the line."""
    tree, places = yaml12.read(path)
    return from_definition(tree, places, name=path.stem, source=str(path))


def from_definition(
    tree: Mapping[str, Any], places: Mapping[str, str], *, name: str, source: str
) -> SearchSpace:
    """The same of what W&B's server has; `source` stands in messages where no line is known."""
    for key in tree:
        if key not in _KEYS:
            raise UserError(
                f"{places.get(key, source)}: unknown key `{key}`"
                f"{_nearest(key, _KEYS)}; a sweep file has {', '.join(_KEYS)}"
            )
    method = tree.get("method")
    if method not in ("grid", "random", "bayes"):
        raise UserError(
            f"{places.get('method', source)}: method={method!r}: accepted are grid, random, bayes"
        )
    parameters: dict[str, Distribution] = {}
    lines: dict[str, str] = {}
    listed = tree.get("parameters")
    if not isinstance(listed, Mapping) or not listed:
        raise UserError(
            f"{places.get('parameters', source)}: `parameters` must name at least one setting"
        )
    written = [
        (setting, spec, places.get(path, source))
        for setting, spec, path in _flat(listed, "", "parameters", places, source)
    ]
    base: Path | None = None
    notes: tuple[str, ...] = ()
    if any(report_names.is_old_name(setting) for setting, _, _ in written):
        written, base, notes = report_sweep.translate(written)
        tree = {key: value for key, value in tree.items() if (key, value) != _OLD_PROGRAM}
    for setting, spec, place in written:
        if setting in parameters:
            raise UserError(f"{place}: `{setting}` is given twice")
        parameters[setting] = _distribution(setting, spec, place)
        lines[setting] = place
    file, overrides = _command(tree, places.get("command", source))
    if file is None and base is not None:
        file = base
        notes += (f"{source}: a trial is a `mainrun train` of {base}; `command` names another",)
    space = SearchSpace(
        name=str(tree.get("name") or name),
        method=cast(Method, method),
        metric=_metric(tree.get("metric"), places.get("metric", source)),
        parameters=parameters,
        config=file,
        overrides=overrides,
        run_cap=_run_cap(tree.get("run_cap"), places.get("run_cap", source)),
        others={key: tree[key] for key in _FOR_WANDB if key in tree},
        places=lines,
        notes=notes,
    )
    if method == "grid":
        for setting, distribution in parameters.items():
            if num_values(distribution) is None:
                raise UserError(
                    f"{lines[setting]}: `{setting}` has endlessly many values, which no grid can "
                    "try: list some under `values`, or use method: random or bayes"
                )
    return space


def definition(space: SearchSpace) -> dict[str, Any]:
    """The search as W&B takes it, and `from_definition` reads it: parameters are flat."""
    file = [] if space.config is None else [str(space.config)]
    return {
        **space.others,
        "method": space.method,
        "metric": vars(space.metric),
        "parameters": {setting: _written(d) for setting, d in space.parameters.items()},
        "command": ["mainrun", "train", *file, *space.overrides, ARGUMENTS],
    }


def _flat(
    listed: Mapping[str, Any], prefix: str, path: str, places: Mapping[str, str], source: str
) -> Iterator[tuple[str, Mapping[str, Any], str]]:
    """Every parameter with its dotted path, its content and where that stands in the file."""
    for key, spec in listed.items():
        setting, written = f"{prefix}{key}", f"{path}.{key}"
        place = places.get(written, source)
        if not isinstance(spec, Mapping):
            raise UserError(
                f"{place}: `{setting}`: a parameter is a mapping, such as "
                f"{{value: {yaml_text(spec)}}} or {{values: [...]}}"
            )
        for name in spec:
            if name not in _PARAMETER_KEYS:
                raise UserError(
                    f"{places.get(f'{written}.{name}', place)}: `{setting}` has an unknown key "
                    f"`{name}`{_nearest(name, _PARAMETER_KEYS)}; a parameter has "
                    f"{', '.join(_PARAMETER_KEYS)}"
                )
        if "parameters" not in spec:
            yield setting, spec, written
            continue
        if len(spec) > 1 or not isinstance(spec["parameters"], Mapping):
            raise UserError(f"{place}: `{setting}` has nested `parameters` and nothing beside them")
        inner = spec["parameters"]
        yield from _flat(inner, f"{setting}.", f"{written}.parameters", places, source)


def _distribution(setting: str, spec: Mapping[str, Any], place: str) -> Distribution:
    kind = spec.get("distribution") or _implied(spec)
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


def _metric(spec: Any, place: str) -> Metric:
    if spec is None:
        return Metric()
    if not isinstance(spec, Mapping) or not set(spec) <= {"name", "goal"}:
        raise UserError(f"{place}: `metric` has a `name` and a `goal`, such as val/loss, minimize")
    name, goal = spec.get("name", METRICS[0]), spec.get("goal", "minimize")
    if name not in METRICS:
        raise UserError(
            f"{place}: metric.name={name!r} is never logged{_nearest(str(name), METRICS)}; "
            f"accepted are {', '.join(METRICS)}"
        )
    if goal not in ("minimize", "maximize"):
        raise UserError(f"{place}: metric.goal={goal!r}: accepted are minimize, maximize")
    return Metric(name, goal)


def _command(tree: Mapping[str, Any], place: str) -> tuple[Path | None, tuple[str, ...]]:
    """The config and the overrides of all trials, from what W&B's agent would run.

    Anything but `mainrun train` is refused: a sweep that is joined comes from a server, and must
    not choose what runs here.
    """
    program = tree.get("program")
    if program not in (None, "mainrun"):
        raise UserError(
            f"{place}: program={program!r}: every trial is a `mainrun train`; remove `program`"
        )
    words = tree.get("command", ["mainrun", "train", ARGUMENTS])
    example = f'[mainrun, train, config/base/quickstart.yaml, "{ARGUMENTS}"]'
    if not isinstance(words, Sequence) or isinstance(words, str):
        raise UserError(f"{place}: `command` is a list of words: {example}")
    rest = [str(word) for word in words if word != "${env}"]
    if rest[:1] == ["${program}"] and program is not None:
        rest[0] = "mainrun"
    if rest[:2] != ["mainrun", "train"] or rest.count(ARGUMENTS) != 1:
        raise UserError(
            f"{place}: `command` must run `mainrun train` with its arguments: {example}"
        )
    fixed = [word for word in rest[2:] if word != ARGUMENTS]
    if strange := [word for word in fixed if word.startswith("-") or "${" in word]:
        raise UserError(f"{place}: `command` cannot have {strange[0]!r}: {example}")
    files = [word for word in fixed if "=" not in word]
    if len(files) > 1:
        raise UserError(f"{place}: `command` names one config, not {' and '.join(files)}")
    return Path(files[0]) if files else None, tuple(word for word in fixed if "=" in word)


def _run_cap(value: Any, place: str) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UserError(f"{place}: run_cap={value!r}: a whole number of trials is expected")
    return value


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1) or [n for n in names if name in n][:1]
    return f"; did you mean `{close[0]}`?" if close else ""


def _written(distribution: Distribution) -> dict[str, Any]:
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


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
