"""From files and overrides to one frozen `Config`, and back.

`load` merges a file, its `extends` parents and the overrides of the command line; whatever does not
fit is a `UserError` that names the dotted path, where it was written and what would be accepted. A
file in the mainrun report's own layout is translated on the way (`report_layout`).
"""

import ast
import contextlib
import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from mainrun import complaints, yaml12
from mainrun.config import report_layout, report_names
from mainrun.config.kinds import UNITS
from mainrun.config.run import Config
from mainrun.errors import UserError

Settings = TypeVar("Settings")

_ADAPTER = TypeAdapter(Config)


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config that the file, its `extends` parents and `key.path=value` overrides make.

    What neither states has its default. Raises UserError: one line, naming path, place and remedy.
    """
    file = _read_with_parents(path, seen=()) if path else _defaults()
    changes, changed = _read_overrides(overrides)
    return checked(Config, _merge(file.tree, changes), {**file.origins, **changed})


def notes(path: Path) -> tuple[str, ...]:
    """What was assumed or left out in reading a file of the report's layout; none for one of ours.

    Raises UserError as `load` does.
    """
    return _read_with_parents(path, seen=()).notes


def as_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: what `to_yaml` writes and W&B stores."""
    plain = _without_unset_units(_ADAPTER.dump_python(config, mode="json"))
    model = plain["model"]
    shape = ("kind", "d_model", *type(config.model).__annotations__)  # before what all models have
    plain["model"] = {name: model[name] for name in dict.fromkeys((*shape, *model))}
    return typing.cast(dict[str, Any], plain)


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings in nested mappings, each under its dotted path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def to_yaml(config: Config) -> str:
    """A file that `load` reads back to the same config."""
    return yaml.safe_dump(as_dict(config), sort_keys=False, allow_unicode=True)


def default_config_root() -> Path:
    """The folder `config/` of a checkout, or its copy inside an installed package."""
    package = Path(__file__).resolve().parent.parent
    beside = package.parent / "config"
    return beside if (beside / "base.yaml").is_file() else package / "_config"


# ---------------------------------------------------------------------------------------------
# Reading


class _File(typing.NamedTuple):
    """What a file and its parents say: settings, where each was written, and what to know of it."""

    tree: dict[str, Any]
    origins: dict[str, str]
    notes: tuple[str, ...] = ()


def _defaults() -> _File:
    return _File(as_dict(Config()), {})


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> _File:
    resolved = path.resolve()
    if resolved in seen:
        chain = " → ".join(str(p.name) for p in (*seen, resolved))
        raise UserError(f"{path}: the config extends itself ({chain})")
    tree, origins = yaml12.read(path)
    parent = tree.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise UserError(f"{path}: `extends` names one file, not {parent!r}")
    base = _defaults()
    if parent is not None:
        base = _read_with_parents(path.parent / parent, (*seen, resolved))
    own = _File(tree, origins)
    if report_layout.is_report_layout(tree):
        own = _File(*report_layout.translate(tree, origins, str(path)))
    return _File(
        _merge(base.tree, own.tree), {**base.origins, **own.origins}, (*base.notes, *own.notes)
    )


def _read_overrides(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """`a.b=1` as {a: {b: 1}}; later ones win, and a kind may stand before or behind its settings.

    What a sweep's agent of W&B passes is taken too: leading dashes, values as Python writes them,
    and keys of W&B's own, which are no settings.
    """
    tree: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for override in overrides:
        key, equals, text = override.lstrip("-").partition("=")
        if not equals or not key or not all(key.split(".")):
            raise UserError(f"{override!r} is not an override: write key.path=value")
        if key.startswith("_wandb"):
            continue
        report_names.refuse_old_name(key)
        try:
            value = _value(text)
        except ValueError as error:
            raise UserError(f"{key}={text}: {error}") from error
        for part in reversed(key.split(".")):
            value = {part: value}
        tree = _merge(tree, value)
        origins[key] = "command line"
    return tree, origins


def _value(text: str) -> Any:
    """What the text is in YAML; `None`, alone or in a list or mapping, as Python means it.

    All else that Python writes (`False`, `[128]`, `{'b1': 0.9}`) is YAML as well.
    """
    if "None" in text:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
            if value is None or isinstance(value, (list, dict)):
                return value
    return yaml12.parse(text)


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge, but one whose kind or unit changes is replaced."""
    merged = dict(base)
    for key, new in over.items():
        old = merged.get(key)
        if isinstance(new, Mapping) and isinstance(old, Mapping) and not _replaces(new, old):
            merged[key] = _merge(old, new)
        else:
            merged[key] = new
    return merged


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    units = set(UNITS)
    of_another_kind = "kind" in old and new.get("kind", old["kind"]) != old["kind"]
    return of_another_kind or (bool(new) and set(new) <= units and set(old) <= units)


# ---------------------------------------------------------------------------------------------
# Validation


def checked(
    schema: type[Settings], tree: Mapping[str, Any], origins: Mapping[str, str]
) -> Settings:
    """The settings that `tree` states; UserError naming path, place and remedy where it cannot."""
    adapter = _ADAPTER if schema is Config else TypeAdapter(schema)
    whole = _with_kinds(tree, schema)
    try:
        # As JSON, because strict mode then still takes mappings for classes and lists for tuples.
        return typing.cast(Settings, adapter.validate_json(json.dumps(whole)))
    except ValidationError as error:
        raise UserError(complaints.message(error, schema, whole, origins)) from None


def _with_kinds(value: Any, annotation: Any, default: Any = None) -> Any:
    """The settings, where a mapping leaves its `kind` open having that of the default.

    So `attention: {kind: sparse, pattern: {stride: 16}}` need not say what kind its pattern is,
    although the mapping in which the base says it has been replaced.
    """
    classes = complaints.dataclasses_in(annotation)
    if not classes or not isinstance(value, Mapping):
        return value
    kind = value.get("kind", getattr(default, "kind", None))
    whole = value if kind is None else {**value, "kind": kind}
    for cls in classes:
        if kind is None or kind in complaints.kinds_of(cls):
            hints = typing.get_type_hints(cls, include_extras=True)
            inner = {field.name: _default(field) for field in dataclasses.fields(cls)}
            return {
                name: _with_kinds(item, hints[name], inner[name]) if name in inner else item
                for name, item in whole.items()
            }
    return whole


def _default(field: "dataclasses.Field[Any]") -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()


def _without_unset_units(value: Any) -> Any:
    """A duration as the one unit that was given."""
    if isinstance(value, dict):
        if set(value) == set(UNITS):
            return {unit: amount for unit, amount in value.items() if amount is not None}
        return {key: _without_unset_units(item) for key, item in value.items()}
    return value
