"""Settings as nested mappings, before they are checked: merged, and their kinds filled in."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mainrun import complaints
from mainrun.config.kinds import UNITS


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings in nested mappings, each under its dotted path."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        found |= leaves(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` wins; mappings merge, but one whose kind or unit changes is replaced."""
    merged = dict(base)
    for key, new in over.items():
        old = merged.get(key)
        if isinstance(new, Mapping) and isinstance(old, Mapping) and not _replaces(new, old):
            merged[key] = merge(old, new)
        else:
            merged[key] = new
    return merged


def with_kinds(value: Any, annotation: Any, default: Any = None) -> Any:
    """The settings, where a mapping leaves its `kind` open having that of the default.

    So `attention: {kind: sparse, pattern: {stride: 16}}` need not say what kind its pattern is,
    although the mapping in which the base says it has been replaced.
    """
    classes = complaints.dataclasses_in(annotation)
    if not classes or not isinstance(value, Mapping):
        return value
    kind = value.get("kind", getattr(default, "kind", None))
    whole = value if kind is None else {**value, "kind": kind}
    for cls in of_kind(classes, kind):
        hints, inner = complaints.hints_of(cls), defaults(cls)
        return {
            name: with_kinds(item, hints[name], inner[name]) if name in inner else item
            for name, item in whole.items()
        }
    return whole


def of_kind(classes: list[type], kind: Any) -> list[type]:
    """Those of the classes that have this kind; all of them where it is None."""
    return [cls for cls in classes if kind is None or kind in complaints.kinds_of(cls)]


def defaults(cls: type) -> dict[str, Any]:
    """What each field of a class of settings is where nothing is said."""
    return {
        field.name: (
            field.default
            if field.default_factory is dataclasses.MISSING
            else field.default_factory()
        )
        for field in dataclasses.fields(cls)
    }


def _replaces(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    units = set(UNITS)
    of_another_kind = "kind" in old and new.get("kind", old["kind"]) != old["kind"]
    return of_another_kind or (bool(new) and set(new) <= units and set(old) <= units)
