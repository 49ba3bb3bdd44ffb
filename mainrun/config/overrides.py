"""Overrides: `key.path=value`, the words that change settings of a file.

A kind in the path makes a condition of itself: `model.mlp.moe.top_k=1` is said of `model.mlp.top_k`
where `model.mlp.kind` is `moe`, and of nothing elsewhere. So one list of overrides serves configs
of every kind, which is what a sweep needs: W&B's agent passes all parameters to every trial.
"""

import ast
import contextlib
import copy
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from mainrun import complaints, yaml12
from mainrun.config import report_names, trees
from mainrun.config.run import Config
from mainrun.errors import UserError


class Overrides(NamedTuple):
    """What overrides say, and `command line` for the path of each."""

    tree: dict[str, Any]
    origins: dict[str, str]


class Path(NamedTuple):
    """A dotted path, and the kinds that it is said of, each with where it stands."""

    setting: str
    conditions: tuple[tuple[str, str], ...]


def read(overrides: Sequence[str]) -> Overrides:
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
        tree = trees.merge(tree, value)
        origins |= dict.fromkeys((key, path_of(key).setting), "command line")
    return Overrides(tree, origins)


def settled(
    changes: Mapping[str, Any], base: Mapping[str, Any]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The changes to `base` without conditions, and the paths of those that do not hold.

    Of the same setting said with and without a condition, the one with it counts. Raises UserError
    where a kind has no such setting, whether it is chosen or not.
    """
    said = _Said({}, [])
    return _settled(changes, base, Config, None, "", said), tuple(said.left_out)


@functools.cache
def path_of(dotted: str) -> Path:
    """The path's setting and its conditions; a name that is none stays in the setting."""
    classes: list[type] = [Config]
    names: list[str] = []
    conditions: list[tuple[str, str]] = []
    for name in dotted.split("."):
        if _is_condition(name, classes):
            conditions.append((".".join(names), name))
            classes = trees.of_kind(classes, name)
        else:
            names.append(name)
            hints = (complaints.hints_of(cls).get(name) for cls in classes)
            classes = [inner for hint in hints for inner in complaints.dataclasses_in(hint)]
    return Path(".".join(names), tuple(conditions))


@functools.cache
def known_paths() -> frozenset[str]:
    """Every path that an override may have, with and without conditions."""
    return frozenset(_known(Config, ""))


def _known(annotation: Any, prefix: str) -> Iterator[str]:
    for cls in complaints.dataclasses_in(annotation):
        hints = complaints.hints_of(cls)
        for kind in (None, *complaints.kinds_of(cls)):
            for name in hints:
                if kind and name == "kind":
                    continue
                dotted = ".".join(filter(None, (prefix, kind, name)))
                yield dotted
                yield from _known(hints[name], dotted)


class _Said(NamedTuple):
    """What was found on the way down."""

    written: dict[str, str]
    """How a path inside a condition that holds was written."""
    left_out: list[str]


def _settled(
    changes: Mapping[str, Any],
    base: Mapping[str, Any],
    annotation: Any,
    default: Any,
    prefix: str,
    said: _Said,
) -> dict[str, Any]:
    classes = complaints.dataclasses_in(annotation)
    conditional = {
        name: value
        for name, value in changes.items()
        if isinstance(value, Mapping) and _is_condition(name, classes)
    }
    plain = {name: value for name, value in changes.items() if name not in conditional}
    kind = plain.get("kind", base.get("kind", getattr(default, "kind", None)))
    for name, settings in conditional.items():
        paths = list(trees.leaves(settings, f"{prefix}{name}."))
        _check_known(paths)
        whole = [said.written.get(path, path) for path in paths]
        if name == kind:
            plain = trees.merge(plain, settings)
            said.written.update(zip(trees.leaves(settings, prefix), whole, strict=True))
        else:
            said.left_out.extend(whole)
    if kind != base.get("kind", kind):
        base = {}  # replaced as a whole
    for cls in trees.of_kind(classes, kind)[:1]:
        hints, inner = complaints.hints_of(cls), trees.defaults(cls)
        for name, value in list(plain.items()):
            if isinstance(value, Mapping) and complaints.dataclasses_in(hints.get(name)):
                below = base.get(name)
                below = below if isinstance(below, Mapping) else {}
                plain[name] = _settled(
                    value, below, hints[name], inner[name], f"{prefix}{name}.", said
                )
                if value and not plain[name]:
                    del plain[name]  # all of it was said of other kinds
    return plain


def _check_known(paths: Sequence[str]) -> None:
    known = known_paths()
    for path in paths:
        if path not in known:
            setting = path_of(path).setting
            said = complaints.nearest(setting, Config)
            if setting not in known:
                close = difflib.get_close_matches(path, known, n=1)
                said = f"; did you mean `{close[0]}`?" if close else said
            raise UserError(f"unknown setting `{path}`{said} (command line)")


def _is_condition(name: str, classes: Sequence[type]) -> bool:
    """Whether it is a kind of one of the classes, and no setting of any."""
    return any(name in complaints.kinds_of(cls) for cls in classes) and not any(
        name in complaints.hints_of(cls) for cls in classes
    )


def _value(text: str) -> Any:
    """What the text is in YAML; `None`, alone or in a list or mapping, as Python means it.

    All else that Python writes (`False`, `[128]`, `{'b1': 0.9}`) is YAML as well.
    """
    if "None" in text:
        with contextlib.suppress(ValueError, SyntaxError):
            value = ast.literal_eval(text)
            if value is None or isinstance(value, (list, dict)):
                return value
    return copy.deepcopy(_parsed(text))


@functools.lru_cache(maxsize=4096)
def _parsed(text: str) -> Any:
    """Kept: the points of a grid say the same words again and again."""
    return yaml12.parse(text)
