"""A config as the shipped file that it is nearest to, and what differs from that."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mainrun import config as configs
from mainrun.config import Config
from mainrun.config.trees import merge


def nearest(config: Config, root: Path) -> tuple[Path, dict[str, Any]]:
    """The file of `root` with the fewest settings that differ, and these settings.

    Of equals the first: base.yaml, then base/*.yaml by name. Where numbers are told (`tracking`)
    makes no difference.
    """
    files = [root / "base.yaml", *sorted((root / "base").glob("*.yaml"))]
    found = [(file, _difference(config, file)) for file in files]
    return min(found, key=lambda pair: len(configs.leaves(pair[1])))


def _difference(config: Config, file: Path) -> dict[str, Any]:
    source = configs.read(file)
    base = source.load()
    wanted = replace(config, tracking=base.tracking)

    def loaded(tree: Mapping[str, Any]) -> Config:
        return configs.Source(merge(source.tree, tree), {}).load()

    tree = _changes(configs.as_dict(base), configs.as_dict(wanted))
    assert loaded(tree) == wanted
    # A mapping of another kind was taken whole: what is its kind's default need not be said.
    for path in configs.leaves(tree):
        shorter = _without(tree, path.split("."))
        if not path.endswith("kind") and shorter != tree and _makes(loaded, shorter, wanted):
            tree = shorter
    return tree


def _makes(loaded: Any, tree: Mapping[str, Any], wanted: Config) -> bool:
    try:
        return bool(loaded(tree) == wanted)
    except ValueError:
        return False


def _changes(base: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for name, value in wanted.items():
        was = base.get(name)
        if name in base and was == value:
            continue
        if isinstance(value, Mapping) and isinstance(was, Mapping) and _same_kind(was, value):
            value = _changes(was, value)
        changes[name] = value
    return changes


def _same_kind(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return bool(one.get("kind") == other.get("kind"))


def _without(tree: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    """The tree less one leaf, and less mappings that this leaves empty."""
    name, *rest = path
    inner = _without(tree[name], rest) if rest else None
    others = {key: value for key, value in tree.items() if key != name}
    return {key: inner if key == name else tree[key] for key in tree} if inner else others
