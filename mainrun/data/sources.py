"""A source's documents, in an order and a number that only the settings decide.

Four sources: a file of the user's, Hacker News titles, any other data set of the Hugging Face hub,
and the docstrings of the Python that is running. How each is read stands in a file of its own
(`files`, `hub`, `python_docs`), and what a document is made into is decided elsewhere.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mainrun import config
from mainrun.data import files, hub, python_docs
from mainrun.errors import UserError

# The original assessment's titles: one file, story.parquet. Its commit is not pinned here, because
# none could be verified when this was written: no public log or notebook names one, and an invented
# hash is worse than none. The newest commit is resolved once and then remembered in the cache;
# `revision` tells it, and data.revision pins it.
HACKER_NEWS = "julien040/hacker-news-posts"


def documents(data: config.Data, seed: int) -> list[str]:
    """The first `data.num_documents` documents of the source in the seed's order, or all it has.

    Stripped, empty ones dropped before the shuffle. Raises UserError, naming what to use instead,
    when the source cannot be read or has fewer than two documents.
    """
    texts = [text for raw in _read(data) if (text := raw.strip())]
    if len(texts) < 2:
        raise UserError(
            f"data.source={data.source}: {len(texts)} documents that are not blank, "
            "and a training and a validation text need at least one each"
        )
    order = np.random.default_rng(seed).permutation(len(texts))
    return [texts[i] for i in order[: data.num_documents]]


def fingerprint(documents: Sequence[str]) -> str:
    """SHA-256, in hex, of the documents in their order; each is framed by its length in bytes."""
    digest = hashlib.sha256()
    for document in documents:
        body = document.encode()
        digest.update(b"%d:" % len(body) + body)
    return digest.hexdigest()


def split(documents: Sequence[str], validation_fraction: float) -> tuple[list[str], list[str]]:
    """Training and validation documents: the last `validation_fraction` are for validation.

    The same arithmetic as the original assessment's. Raises UserError when either is empty.
    """
    border = int(len(documents) * (1 - validation_fraction))
    train, validation = list(documents[:border]), list(documents[border:])
    if not train or not validation:
        empty = "validation" if train else "training"
        raise UserError(
            f"data.validation_fraction={validation_fraction} of {len(documents)} documents leaves "
            f"none for {empty}: change the fraction or use more documents"
        )
    return train, validation


def revision(data: config.Data) -> str | None:
    """The commit of the hub's data set that `documents` reads; None for the other sources."""
    found = _hub_name_and_field(data)
    return hub.commit_of(found[0], data.revision) if found else None


def _read(data: config.Data) -> list[str]:
    kind, _, rest = data.source.partition(":")
    if on_hub := _hub_name_and_field(data):
        return hub.read(*on_hub, data.revision)
    if kind == "file" and rest:
        path = os.path.expanduser(rest)  # Path.expanduser raises where there is no such user
        return files.read(Path(path), data.field, f"data.source={data.source}")
    if data.source == "python-docs":
        return python_docs.read()
    raise UserError(
        f"data.source={data.source!r}: accepted are hacker-news, huggingface:NAME[:FIELD], "
        f"file:PATH ({' '.join(sorted(files.SUFFIXES))}) and python-docs"
    )


def _hub_name_and_field(data: config.Data) -> tuple[str, str] | None:
    kind, _, rest = data.source.partition(":")
    name, _, field = rest.partition(":")
    if data.source == "hacker-news":
        return HACKER_NEWS, data.field
    return (name, field or data.field) if kind == "huggingface" and name else None
