"""The trained run that another starts from: its parameters, and how they are found again.

`training.init_from` names it. Adapters are nothing without it, so a run keeps a reference: where
the base was, which checkpoint of it, and a fingerprint of what that checkpoint held.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from mainrun import config as configs
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.model.gpt import Params


@dataclass(frozen=True, eq=False)
class Base:
    """Plain parameters, adapters merged, and the tokenizer that goes with them."""

    run_dir: Path
    step: int
    params: Params
    tokenizer: Tokenizer
    fingerprint: str

    def reference(self) -> dict[str, Any]:
        """What finds it again."""
        return {
            "run_dir": str(self.run_dir.resolve()),
            "step": self.step,
            "fingerprint": self.fingerprint,
        }


def fingerprint(params: Mapping[str, Any], beneath: str = "") -> str:
    """A hash of names, shapes and numbers; for adapters also of the fingerprint `beneath` them.

    Of what is stored, not of what merging computes: that differs between machines by rounding.
    """
    digest = hashlib.sha256(beneath.encode())
    for name in sorted(params):
        array = np.ascontiguousarray(params[name])
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(array.view(np.uint8).data)
    return digest.hexdigest()


def check_same_architecture(config: Config, base: Config) -> None:
    """Raises UserError that names every setting by which the parameters would not fit."""
    ours, theirs = _shaping(config), _shaping(base)
    # What only one of them has belongs to a kind that the other is not: the kinds say it.
    differing = [
        f"{path}={_shown(value)} (the run has {_shown(theirs[path])})"
        for path, value in ours.items()
        if path in theirs and not _fits(path, value, theirs[path])
    ]
    if differing:
        raise UserError(
            f"training.init_from={config.training.init_from}: that run's parameters do not fit "
            f"this model: {', '.join(differing)}; set what the run has"
        )


def _shaping(config: Config) -> dict[str, Any]:
    """The settings that say which parameters there are, and what their numbers mean."""
    tree = configs.as_dict(config)
    shaping = configs.leaves({"model": tree["model"], "tokenizer": tree["tokenizer"]})
    if config.model.position == "learned":
        shaping["data.context_length"] = config.data.context_length
    return {path: value for path, value in shaping.items() if not configs.is_training_only(path)}


def _fits(path: str, ours: Any, theirs: Any) -> bool:
    if path == "model.layer_scale":  # where training of the scales begins, if there are any
        return (ours is None) == (theirs is None)
    return bool(ours == theirs)


def _shown(value: Any) -> str:
    """As YAML has it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
