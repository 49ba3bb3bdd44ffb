"""YAML 1.2 scalars and the line of every setting, by PyYAML.

PyYAML itself reads YAML 1.1, where `1e-3` is a word and `on` is true. Files, overrides and the
values W&B passes all go through here, so that one text means one value.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from mainrun.errors import UserError, one_line

_MOST_CHARACTERS = 10_000_000


def read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The file's mapping, and `file:line` for every dotted path in it; UserError if it has none."""
    try:
        root = _composed(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read the config file ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the config file is not UTF-8 text") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if root is None:
        return {}, {}
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}: a config file is a mapping of settings")
    lines: dict[str, int] = {}
    try:
        tree = _plain(root, "", lines)
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    return tree, {key: f"{path}:{line}" for key, line in lines.items()}


def parse(text: str) -> Any:
    """The value that the text is in YAML; ValueError if it is none."""
    try:
        return _plain(_composed(text), "", {})
    except yaml.YAMLError as error:
        raise ValueError(f"not a YAML value: {one_line(error)}") from error


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2's core schema instead of 1.1's."""


def _core_schema() -> None:
    _Loader.yaml_implicit_resolvers = {}
    number = "-+.0123456789"
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list(number)),
        (
            "float",
            r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
            list(number),
        ),
    ):
        regexp = re.compile(f"^(?:{pattern})$")
        _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", regexp, first)

    _Loader.add_constructor("tag:yaml.org,2002:int", lambda _, node: _integer(node.value))


def _integer(text: str) -> int:
    """`012` is twelve: in YAML 1.1 it was ten."""
    return int(text, 0) if text[1:2] in ("x", "o") else int(text)


_core_schema()


def _composed(text: str) -> yaml.Node | None:
    """The text's nodes, an alias being the node itself that it names; YAMLError where it has none.

    A few lines of aliases can stand for more than there is memory, or for something without an end.
    """
    try:
        root = yaml.compose(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    if root is not None and _num_characters(root, {}) > _MOST_CHARACTERS:
        raise yaml.YAMLError("its aliases stand for too much")
    return root


def _num_characters(node: yaml.Node, counted: dict[int, int]) -> int:
    """Of the node written out, without aliases; too many where it is a part of itself."""
    if isinstance(node, yaml.ScalarNode):
        return 1 + len(node.value)
    if id(node) not in counted:
        counted[id(node)] = _MOST_CHARACTERS
        parts = node.value if isinstance(node, yaml.SequenceNode) else itertools.chain(*node.value)
        counted[id(node)] = 1 + sum(_num_characters(part, counted) for part in parts)
    return counted[id(node)]


def _plain(node: yaml.Node | None, path: str, lines: dict[str, int]) -> Any:
    """The node as dicts, lists and scalars; `lines` gets the line of every dotted path."""
    match node:
        case None:
            return None
        case yaml.MappingNode():
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key, line = str(key_node.value), key_node.start_mark.line + 1
                dotted = f"{path}.{key}" if path else key
                if key in mapping:
                    raise ValueError(f"line {line}: `{dotted}` is set twice")
                lines[dotted] = line
                mapping[key] = _plain(value_node, dotted, lines)
            return mapping
        case yaml.SequenceNode():
            return [_plain(item, path, lines) for item in node.value]
        case _:
            return _Loader("").construct_object(node)
