"""A sweep file: a search space in W&B's own sweep YAML, so that one file serves both engines.

A parameter's name is a dotted path into the config; parameters may nest as W&B lets them. What all
trials share stands where W&B has it, in `command`: the config file and its overrides. Whatever is
no such file is a `UserError` naming line and remedy.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mainrun import yaml12
from mainrun.config import report_names
from mainrun.errors import UserError
from mainrun.sweep import hyperband, metric, parameter_file, report_sweep
from mainrun.sweep.distribution import Distribution, num_values
from mainrun.sweep.search_space import Method, SearchSpace, yaml_text

ARGUMENTS = "${args_no_hyphens}"
"""Where W&B's agent puts a trial's parameters, as `key.path=value`."""

_FOR_WANDB = (
    "name", "description", "project", "entity", "run_cap", "early_terminate", "controller",
)  # fmt: skip
_KEYS = ("method", "metric", "parameters", "command", "program", *_FOR_WANDB)
_NOT_HERE = {
    "job": "it is for W&B Launch; trials run where `mainrun sweep` does",
    "image_uri": "it is for W&B Launch; `mainrun launch sweep` runs trials in our container",
    "scheduler": "what chooses trials is `method`: grid, random or bayes",
}
"""Keys that W&B has and a sweep here cannot, and why."""
_OLD_PROGRAM = ("program", "train.py")  # of the mainrun report, whose names are translated


def read(path: Path) -> SearchSpace:
    """The search space in the file. UserError where it is none, naming the line."""
    tree, places = yaml12.read(path)
    return from_definition(tree, places, name=path.stem, source=str(path))


def from_definition(
    tree: Mapping[str, Any], places: Mapping[str, str], *, name: str, source: str
) -> SearchSpace:
    """The same of what W&B's server has; `source` stands in messages where no line is known."""
    for key in tree:
        if key in _NOT_HERE:
            raise UserError(f"{places.get(key, source)}: `{key}` cannot be had: {_NOT_HERE[key]}")
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
        parameters[setting] = parameter_file.read(setting, spec, place)
        lines[setting] = place
    lines["metric"] = places.get("metric", source)
    _check_controller(tree.get("controller"), places.get("controller", source))
    file, overrides = _command(tree, places.get("command", source))
    if file is None and base is not None:
        file = base
        notes += (f"{source}: a trial is a `mainrun train` of {base}; `command` names another",)
    space = SearchSpace(
        name=str(tree.get("name") or name),
        method=cast(Method, method),
        metric=metric.read(tree.get("metric"), lines["metric"]),
        parameters=parameters,
        config=file,
        overrides=overrides,
        run_cap=_run_cap(tree.get("run_cap"), places.get("run_cap", source)),
        others={key: tree[key] for key in _FOR_WANDB if key in tree},
        places=lines,
        early_terminate=None
        if (early := tree.get("early_terminate")) is None
        else hyperband.read(early, places.get("early_terminate", source)),
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
    parameters = {setting: parameter_file.written(d) for setting, d in space.parameters.items()}
    return {
        **space.others,
        "method": space.method,
        "metric": metric.written(space.metric),
        "parameters": parameters,
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
            if not parameter_file.is_key(name):
                raise UserError(
                    f"{places.get(f'{written}.{name}', place)}: `{setting}` has an unknown key "
                    f"`{name}`{_nearest(name, parameter_file.KEYS)}; a parameter has "
                    f"{', '.join(parameter_file.KEYS)}"
                )
        if "parameters" not in spec:
            yield setting, spec, written
            continue
        if len(spec) > 1 or not isinstance(spec["parameters"], Mapping):
            raise UserError(f"{place}: `{setting}` has nested `parameters` and nothing beside them")
        inner = spec["parameters"]
        yield from _flat(inner, f"{setting}.", f"{written}.parameters", places, source)


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


def _check_controller(value: Any, place: str) -> None:
    if value not in (None, {"type": "cloud"}):
        raise UserError(
            f"{place}: controller={value!r}: accepted is {{type: cloud}}; without W&B's server, "
            "`mainrun sweep --backend local` chooses the trials"
        )


def _nearest(name: str, names: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1) or [n for n in names if name in n][:1]
    return f"; did you mean `{close[0]}`?" if close else ""
