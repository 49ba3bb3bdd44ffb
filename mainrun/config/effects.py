"""What a setting does to a run: questions that several commands ask, answered once.

A name stands for all settings below it. `carried` has those of a step that several runs share.
"""

from collections.abc import Sequence

NO_EFFECT = ("tracking", "training.checkpoint", "training.num_samples")
"""Names, how often is saved, how many texts are drawn."""

PLACES = ("data.source", "training.init_from")
"""Where something lies that a run knows again by its fingerprint."""

FIXED = (
    "seed",
    "data",
    "tokenizer",
    "model",
    "optimizer.kind",
    "optimizer.momentum",
    "optimizer.moment_dtype",
    "optimizer.min_size_to_factor",
    "training.batch_size",
    "training.weight_average",
)
"""Parameters, moments and the order of the data depend on it: a run has it from its first step."""

TRAINING_ONLY = (
    "model.dropout",
    "model.lora",
    "model.init",
    "model.scale_residual_init",
    "model.mlp.balance_coefficient",
)
"""Of the model, and yet a trained one is what it is without them."""

SAME_TEXT = ("data.num_documents", "data.order")
"""Of the data, and yet it is the same kind of text, in the same windows."""


def is_effect(path: str) -> bool:
    """Whether the setting can move a result; the seed does so by chance alone."""
    return path != "seed" and not _is_of(NO_EFFECT, path)


def is_place(path: str) -> bool:
    return path in PLACES


def is_fixed(path: str) -> bool:
    """Whether a run cannot go on with another value."""
    return _is_of(FIXED, path) and path not in PLACES


def is_training_only(path: str) -> bool:
    return _is_of(TRAINING_ONLY, path)


def is_of_text(path: str) -> bool:
    """Whether losses per token compare only where it is the same."""
    return _is_of(("data", "tokenizer"), path) and path not in SAME_TEXT


def _is_of(names: Sequence[str], path: str) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)
