"""What a setting does to a run: questions that several commands ask, answered once."""

_NO_EFFECT = ("tracking.", "training.checkpoint.", "training.num_samples")
"""Names, how often is saved, how many texts are drawn."""

_PLACES = ("data.source", "training.init_from")
"""Where something lies that a run knows again by its fingerprint."""


_FIXED = (
    "seed",
    "data.",
    "tokenizer.",
    "model.",
    "optimizer.kind",
    "optimizer.momentum",
    "optimizer.moment_dtype",
    "optimizer.min_size_to_factor",
    "training.batch_size",
    "training.weight_average",
)
"""Parameters, moments and the order of the data depend on it: a run has it from its first step."""


def is_effect(path: str) -> bool:
    """Whether the setting can move a result; the seed does so by chance alone."""
    return path != "seed" and not path.startswith(_NO_EFFECT)


def is_place(path: str) -> bool:
    return path in _PLACES


def is_fixed(path: str) -> bool:
    """Whether a run cannot go on with another value."""
    return path.startswith(_FIXED) and not is_place(path)
