"""What is said of a setting that does not fit: value, dotted path, place, what would be accepted.

pydantic finds what is wrong; here its findings become one line in the user's own terms.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Union

from pydantic import ValidationError


def message(
    error: ValidationError, schema: type, tree: Mapping[str, Any], origins: Mapping[str, str]
) -> str:
    """One line for the first thing wrong with `tree`; `origins` says where each path was set."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    return _line(first, schema, tree, origins)


def _line(error: Any, schema: type, tree: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    path = _dotted(error["loc"], tree)
    place = _place(path, origins)
    given, context = error["input"], error.get("ctx", {})
    match error["type"]:
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"unknown setting `{path}`{_nearest(path, schema)}{place}"
        case "value_error":
            prefix = (
                "" if str(context["error"]).startswith(("model.", "training.")) else f"{path}: "
            )
            return f"{prefix}{context['error']}{place}"
        case "literal_error":
            return f"{path}={_show(given)}: accepted are {context['expected']}{place}"
        case "union_tag_invalid" | "union_tag_not_found":
            kinds = context.get("expected_tags") or "see config/base.yaml"
            kind = given.get("kind") if isinstance(given, Mapping) else given
            return f"{path}.kind={_show(kind)}: accepted are {kinds}{place}"
        case _:
            return f"{path}={_show(given)}: {_expectation(error)}{place}"


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
    }
    return words.get(error["type"], error["msg"][:1].lower() + error["msg"][1:]).format(**context)


def _place(path: str, origins: Mapping[str, str]) -> str:
    """` (file:line)` of the nearest enclosing setting that was written somewhere."""
    parts = path.split(".")
    for end in range(len(parts), 0, -1):
        if origin := origins.get(".".join(parts[:end])):
            return f" ({origin})"
    return ""


def _dotted(loc: Sequence[str | int], tree: Any) -> str:
    """The path as the user wrote it: pydantic puts a union's tag between, which nobody typed."""
    parts: list[str] = []
    for part in loc:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, Mapping) and (tree.get("kind") == part or "-" in str(part)):
            continue
        elif isinstance(tree, (list, tuple)) and isinstance(part, int):
            tree = tree[part]
        elif not isinstance(tree, Mapping):
            continue  # the branch of `int | None` that was tried
        parts.append(str(part))
    return ".".join(parts)


def _nearest(path: str, schema: type) -> str:
    """`; did you mean …?`: the same name elsewhere, else a name spelt nearly so."""
    parent, _, name = path.rpartition(".")
    if ":" in name:
        return f"; write `{name.replace(':', ': ', 1)}` with a space after the colon"
    known = list(all_paths(schema))
    siblings = [p for p in known if p.rpartition(".")[0] == parent]
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
    for cls in _dataclasses_in(schema):
        hints = typing.get_type_hints(cls, include_extras=True)
        for field in dataclasses.fields(cls):
            dotted = f"{prefix}.{field.name}" if prefix else field.name
            yield dotted
            yield from all_paths(hints[field.name], dotted)


def _dataclasses_in(annotation: Any) -> list[type]:
    if typing.get_origin(annotation) in (Annotated, Union, types.UnionType):
        return [c for arg in typing.get_args(annotation) for c in _dataclasses_in(arg)]
    is_class = isinstance(annotation, type) and dataclasses.is_dataclass(annotation)
    return [annotation] if is_class else []


def _show(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
