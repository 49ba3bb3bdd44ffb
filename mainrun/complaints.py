"""What is said of a setting that does not fit: value, dotted path, place, what would be accepted.

pydantic finds what is wrong; here its findings become one line in the user's own terms. What the
schema says is kept: finding it anew was most of what loading a config cost, 0.6 of 0.75 ms.
"""

import dataclasses
import difflib
import functools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union

from pydantic import ValidationError


def message(
    error: ValidationError, schema: type, tree: Mapping[str, Any], origins: Mapping[str, str]
) -> str:
    """One line for the first thing wrong with `tree`; `origins` says where each path was set."""
    unknown = ("extra_forbidden", "unexpected_keyword_argument")
    errors = error.errors()
    path = _dotted(min(errors, key=lambda e: e["type"] not in unknown)["loc"], tree)
    # Of a union, pydantic tells what each alternative has against the value: words go last.
    of_path = [e for e in errors if _dotted(e["loc"], tree) == path]
    of_path.sort(key=lambda e: (e["type"] not in unknown, e["type"] == "literal_error"))
    return _line(of_path, path, schema, tree, origins)


def _line(
    errors: Sequence[Any],
    path: str,
    schema: type,
    tree: Mapping[str, Any],
    origins: Mapping[str, str],
) -> str:
    error = errors[0]
    where = place([path], origins)
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"unknown setting `{path}`{nearest(path, schema)}{where}"
        case "value_error":
            said = str(context["error"])
            named = re.findall(r"\w+(?:\.\w+)+", said)
            written = [name for name in named if name in origins]
            names_itself = not path or said.partition("=")[0] in all_paths(schema)
            prefix = "" if names_itself else f"{path}: "
            return f"{prefix}{said}{place(written or [*named, path], origins)}"
        case "literal_error":
            return f"{path}={_show(given)}: accepted are {context['expected']}{where}"
        case "union_tag_invalid" | "union_tag_not_found" | "dict_type":
            kinds = ", ".join(repr(k) for cls in _classes_at(path, schema) for k in kinds_of(cls))
            if isinstance(given, Mapping):
                return f"{path}.kind={_show(given.get('kind'))}: accepted are {kinds}{where}"
            expected = f"a mapping of settings is expected, whose `kind` is one of {kinds}"
            return f"{path}={_show(given)}: {expected}{where}"
        case "missing":
            return f"{path} is missing{where}"
        case _:
            return f"{path}={_show(given)}: {_expectations(errors)}{where}"


def _expectations(errors: Sequence[Any]) -> str:
    """What would be accepted, by each alternative: `a whole number or 'auto' is expected`."""
    first, *others = dict.fromkeys(_expectation(error) for error in errors)
    accepted, suffix, _ = first.partition(" is expected")
    return " or ".join([accepted, *(o.removesuffix(" is expected") for o in others)]) + suffix


def _expectation(error: Any) -> str:
    context = error.get("ctx", {})
    words = {
        "greater_than_equal": "must be at least {ge}",
        "greater_than": "must be greater than {gt}",
        "less_than_equal": "must be at most {le}",
        "less_than": "must be less than {lt}",
        "int_type": "a whole number is expected",
        "int_from_float": "a whole number is expected",
        "float_type": "a number is expected",
        "finite_number": "a finite number is expected",
        "bool_type": "true or false is expected",
        "string_type": "text is expected",
        "string_too_short": "must not be empty",
        "dataclass_type": "a mapping of settings is expected",
        "tuple_type": "a list is expected",
        "literal_error": "{expected} is expected",
    }
    return words.get(error["type"], error["msg"][:1].lower() + error["msg"][1:]).format(**context)


def place(paths: Sequence[str], origins: Mapping[str, str]) -> str:
    """` (file:line)` where the settings were written; what the command line says goes first."""
    found = dict.fromkeys(origin for path in paths if (origin := _origin(path, origins)))
    if not found:
        return ""
    return f" ({'command line' if 'command line' in found else ', '.join(found)})"


def _origin(path: str, origins: Mapping[str, str]) -> str | None:
    """Of the setting itself, else of the first inside it, else of the nearest around it."""
    inside = (origin for name, origin in origins.items() if name.startswith(f"{path}."))
    parts = path.split(".")
    around = (origins.get(".".join(parts[:end])) for end in range(len(parts) - 1, 0, -1))
    return origins.get(path) or next(inside, None) or next(filter(None, around), None)


def _dotted(loc: Sequence[str | int], tree: Any) -> str:
    """The path as the user wrote it: pydantic puts a union's tag between, which nobody typed."""
    parts: list[str] = []
    for part in loc:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, Mapping) and (tree.get("kind") == part or not _is_name(part)):
            continue
        elif isinstance(tree, (list, tuple)) and isinstance(part, int):
            tree = tree[part]
        elif not isinstance(tree, Mapping):
            continue  # the branch of `int | None` that was tried
        parts.append(str(part))
    return ".".join(parts)


def _is_name(part: str | int) -> bool:
    """Whether it can be a setting's: `constrained-int` and `literal['auto']` are branches."""
    return not re.search(r"[-\[]", str(part))


def nearest(path: str, schema: type) -> str:
    """What to write instead: another kind, the same name elsewhere, a name spelt nearly so."""
    parent, _, name = path.rpartition(".")
    if any(name in kinds_of(cls) for cls in _classes_at(parent, schema)):
        return (
            f": it is a kind, written {parent}.kind={name}; an override {path}.SETTING=… changes "
            "what only that kind has"
        )
    if ":" in name:
        return f"; write `{name.replace(':', ': ', 1)}` with a space after the colon"
    owners = [cls for cls in _classes_at(parent, schema) if name in _field_names(cls)]
    if owners:
        kinds = ", ".join(kind for cls in owners for kind in kinds_of(cls))
        return f": it belongs to {parent}.kind={kinds}"
    known = list(all_paths(schema))
    beside = (name for cls in _classes_at(parent, schema) for name in _field_names(cls))
    siblings = [f"{parent}.{name}" if parent else name for name in dict.fromkeys(beside)]
    close = difflib.get_close_matches(path, siblings, n=1, cutoff=0.6)
    elsewhere = [p for p in known if p.rpartition(".")[2] == name]
    by_name = {p.rpartition(".")[2]: p for p in known}
    near_name = [by_name[n] for n in difflib.get_close_matches(name, by_name, n=1, cutoff=0.75)]
    for candidate in (*elsewhere, *close, *near_name):
        return f"; did you mean `{candidate}`?"
    where = f"`{parent}`" if parent else "the top level"
    return f"; {where} has {', '.join(s.rpartition('.')[2] for s in siblings)}"


def all_paths(schema: Any, prefix: str = "") -> Iterator[str]:
    """Every dotted path of the schema, of every variant."""
    for cls in dataclasses_in(schema):
        hints = hints_of(cls)
        for field in dataclasses.fields(cls):
            dotted = f"{prefix}.{field.name}" if prefix else field.name
            yield dotted
            yield from all_paths(hints[field.name], dotted)


def dataclasses_in(annotation: Any) -> list[type]:
    """The classes of settings that the annotation allows."""
    return list(_dataclasses_in(annotation))


@functools.cache
def _dataclasses_in(annotation: Any) -> tuple[type, ...]:
    if typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        return tuple(c for arg in typing.get_args(annotation) for c in _dataclasses_in(arg))
    is_class = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return (annotation,) if is_class else ()


@functools.cache
def kinds_of(cls: type) -> tuple[str, ...]:
    """The values of its `kind`, by which a union knows the class; none where it has no `kind`."""
    return typing.get_args(hints_of(cls).get("kind"))


@functools.cache
def hints_of(cls: type) -> Mapping[str, Any]:
    """The type of each field."""
    return typing.get_type_hints(cls, include_extras=True)


def _classes_at(path: str, schema: type) -> list[type]:
    """Those that may stand at the path, whatever kinds are chosen above it."""
    found = [schema]
    for name in path.split(".") if path else ():
        if name.isdigit():  # a place in a list: what may stand there was found with its name
            continue
        hints = [hints_of(cls).get(name) for cls in found]
        inner = (cls for hint in hints for cls in (*dataclasses_in(hint), *_listed(hint)))
        found = list(dict.fromkeys(inner))
    return found


def _listed(annotation: Any) -> list[type]:
    """The classes of settings that a list may hold."""
    is_list = typing.get_origin(annotation) is tuple
    return [c for arg in typing.get_args(annotation) for c in dataclasses_in(arg)] * is_list


def _field_names(cls: type) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
