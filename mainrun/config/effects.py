"""What a setting does to a run: questions that several commands ask, answered once."""

_NO_EFFECT = ("tracking.", "training.checkpoint.", "training.num_samples")
"""Names, how often is saved, how many texts are drawn."""

_PLACES = ("data.source", "training.init_from")
"""Where something lies that a run knows again by its fingerprint."""


def is_effect(path: str) -> bool:
    """Whether the setting can move a result; the seed does so by chance alone."""
    return path != "seed" and not path.startswith(_NO_EFFECT)


def is_place(path: str) -> bool:
    return path in _PLACES
