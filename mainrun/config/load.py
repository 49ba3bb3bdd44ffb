"""From files and overrides to one frozen `Config`, and back.

`load` merges a file, its `extends` parents and the overrides of the command line; whatever does not
fit is a `UserError` that names the dotted path, where it was written and what would be accepted. A
file in the mainrun report's own layout is translated on the way (`report_layout`).
"""

import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from mainrun import complaints, promoted, yaml12
from mainrun.config import heads, report_layout, trees
from mainrun.config.kinds import UNITS
from mainrun.config.overrides import read as read_overrides
from mainrun.config.overrides import settled
from mainrun.config.run import Config
from mainrun.errors import UserError

Settings = TypeVar("Settings")

_ADAPTER = TypeAdapter(Config)


class Source(typing.NamedTuple):
    """What a file and its parents say, read once: settings, and where each was written."""

    tree: dict[str, Any]
    origins: dict[str, str]
    notes: tuple[str, ...] = ()

    def load(self, overrides: Sequence[str] = ()) -> Config:
        """The config that the file and `key.path=value` overrides make.

        What neither states has its default. Raises UserError: one line, naming path, place and
        remedy.
        """
        whole = self.with_overrides(overrides)
        return checked(Config, heads.with_number(whole.tree, whole.origins), whole.origins)

    def with_overrides(self, overrides: Sequence[str]) -> "Source":
        """The settings with the overrides, not yet checked; `auto` is still a word."""
        changes, origins = read_overrides(overrides)
        tree = trees.merge(self.tree, settled(changes, self.tree)[0])
        return Source(tree, {**self.origins, **origins}, self.notes)

    def left_out(self, overrides: Sequence[str]) -> tuple[str, ...]:
        """The paths of those overrides that are said of a kind which is not chosen."""
        return settled(read_overrides(overrides).tree, self.tree)[1]


def read(path: Path | None) -> Source:
    """The file with its `extends` parents, or the defaults without one. UserError as `load`."""
    return _read_with_parents(path, seen=()) if path else _defaults()


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config that the file, its `extends` parents and `key.path=value` overrides make.

    What neither states has its default. Raises UserError: one line, naming path, place and remedy.
    """
    return read(path).load(overrides)


def notes(path: Path) -> tuple[str, ...]:
    """What was assumed or left out in reading a file of the report's layout; none for one of ours.

    Raises UserError as `load` does.
    """
    return read(path).notes


def as_dict(config: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: what `to_yaml` writes and W&B stores."""
    plain = _without_unset_units(_ADAPTER.dump_python(config, mode="json"))
    model = plain["model"]
    shape = ("kind", "d_model", *type(config.model).__annotations__)  # before what all models have
    plain["model"] = {name: model[name] for name in dict.fromkeys((*shape, *model))}
    return typing.cast(dict[str, Any], plain)


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


def _defaults() -> Source:
    return Source(as_dict(Config()), {})


def _read_with_parents(path: Path, seen: tuple[Path, ...]) -> Source:
    resolved = path.resolve()
    if resolved in seen:
        chain = " → ".join(str(p.name) for p in (*seen, resolved))
        raise UserError(f"{path}: the config extends itself ({chain})")
    tree, origins = yaml12.read(path)
    parent = tree.pop("extends", None)
    if parent is not None and not isinstance(parent, str):
        raise UserError(f"{path}: `extends` names one file, not {parent!r}")
    result = tree.pop("result", None)
    if result is not None:  # what a promoted config came to: information, no setting
        checked(promoted.Section, {"result": result}, origins)
    base = _defaults()
    if parent is not None:
        base = _read_with_parents(path.parent / parent, (*seen, resolved))
    own = Source(tree, origins)
    if report_layout.is_report_layout(tree):
        own = Source(*report_layout.translate(tree, origins, str(path)))
    return Source(
        trees.merge(base.tree, own.tree), {**base.origins, **own.origins}, (*base.notes, *own.notes)
    )


# ---------------------------------------------------------------------------------------------
# Validation


def checked(
    schema: type[Settings], tree: Mapping[str, Any], origins: Mapping[str, str]
) -> Settings:
    """The settings that `tree` states; UserError naming path, place and remedy where it cannot."""
    adapter = _ADAPTER if schema is Config else TypeAdapter(schema)
    whole = trees.with_kinds(tree, schema)
    try:
        # As JSON, because strict mode then still takes mappings for classes and lists for tuples.
        return typing.cast(Settings, adapter.validate_json(json.dumps(whole)))
    except ValidationError as error:
        raise UserError(complaints.message(error, schema, whole, origins)) from None


def _without_unset_units(value: Any) -> Any:
    """A duration as the one unit that was given."""
    if isinstance(value, dict):
        if set(value) == set(UNITS):
            return {unit: amount for unit, amount in value.items() if amount is not None}
        return {key: _without_unset_units(item) for key, item in value.items()}
    return value
