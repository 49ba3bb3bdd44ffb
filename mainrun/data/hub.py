"""The documents of a data set of the Hugging Face hub, at a commit that can be told and pinned.

What was read is kept in this machine's cache under its commit, and so is which commit was the
newest: a second run asks nobody, unless it names a branch or tag. A hub that refuses or does not
answer becomes one line with a remedy. How a file is read is not decided here but in `files`, and
which data set the settings mean in `sources`.
"""

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mainrun.data import cache, files
from mainrun.errors import UserError, one_line

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TIMEOUT = 10  # seconds for the hub to begin an answer; requests about a data set are not repeated
_INSTEAD = (
    "data.source=file:PATH reads a file of yours (.txt .csv .jsonl .parquet), "
    "data.source=python-docs needs no network"
)


def read(name: str, field: str, revision: str | None) -> list[str]:
    """The values of `field` in the data set's training files, kept under the commit they are of."""
    commit = commit_of(name, revision)
    key = ("huggingface", name, commit, field)
    texts = cache.load(*key)
    if texts is None:
        texts = _fetched(name, commit, field)
        cache.store(texts, *key)
    return texts


def commit_of(name: str, revision: str | None) -> str:
    """The 40 hex digits that `revision` means.

    A commit is taken at its word, and a branch or tag is asked for each time. None means the commit
    that this machine's cache remembers, and the newest when it remembers none: a data set does not
    change under a series of runs, and they need no network after the first.
    """
    if revision is not None and re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    key = ("huggingface", name, "newest")
    if revision is None and (remembered := cache.load(*key)):
        return remembered[0]
    with _client(name, revision) as client:
        commit = client.dataset_info(name, revision=revision, timeout=_TIMEOUT).sha
    assert commit is not None
    if revision is None:
        cache.store([commit], *key)
    return commit


def _fetched(name: str, commit: str, field: str) -> list[str]:
    place = f"data.source=huggingface:{name}"
    with _client(name, commit) as client:
        info = client.dataset_info(name, revision=commit, timeout=_TIMEOUT, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        chosen = _training_files(list(sizes), place)
        with _download_folder() as folder:
            needed, free = sum(sizes[f] for f in chosen), shutil.disk_usage(folder).free
            if needed > free:
                raise UserError(
                    f"{place}: its {len(chosen)} files have {needed / 2**30:.1f} GiB and {folder} "
                    f"has {free / 2**30:.1f} GiB free; HF_HOME names another folder"
                )
            values = []
            for file in chosen:
                path = client.hf_hub_download(
                    name, file, repo_type="dataset", revision=commit, cache_dir=folder
                )
                values += files.read(Path(path), field, f"{place} ({file})")
    return values


@contextlib.contextmanager
def _client(name: str, revision: str | None) -> Iterator["HfApi"]:
    """The hub's client; what goes wrong with it becomes one line that says what to use instead."""
    from huggingface_hub import HfApi, constants, errors

    place = f"data.source=huggingface:{name}"
    try:
        yield HfApi()
    except errors.HFValidationError as error:
        raise UserError(f"{place}: not a data set's name ({one_line(error)})") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{place}: it has no data.revision={revision}") from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{place}: its owner grants access on request; set HF_TOKEN to a token that has it"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{place}: the hub has no such data set, or a private one that needs HF_TOKEN"
        ) from error
    except (
        errors.HTTPError,
        errors.OfflineModeIsEnabled,
        errors.LocalEntryNotFoundError,
        errors.XetDownloadError,
    ) as error:
        raise UserError(
            f"{place}: {constants.ENDPOINT} cannot be reached ({one_line(error)}); {_INSTEAD}"
        ) from error
    except OSError as error:
        raise UserError(f"{place}: cannot be stored ({error.strerror or error})") from error


@contextlib.contextmanager
def _download_folder() -> Iterator[Path]:
    """The hub's own cache, which other programs share; a temporary one where it is not writable."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mainrun-")))
        yield folder


def _training_files(names: Sequence[str], place: str) -> list[str]:
    """The files to read: one format, the training split where files are named after splits."""
    for suffix in files.SUFFIXES:
        if alike := sorted(n for n in names if PurePosixPath(n).suffix.lower() == suffix):
            break
    else:
        shown = ", ".join(sorted(names)[:5]) or "none"
        raise UserError(
            f"{place}: no {' '.join(files.SUFFIXES)} among its files ({shown}); {_INSTEAD}"
        )
    training = [n for n in alike if _split_at(n, "train") is not None]
    others = ("test", "validation", "valid", "val", "dev", "eval")
    unnamed = [n for n in alike if all(_split_at(n, other) is None for other in others)]
    chosen = training or unnamed or alike
    subsets = sorted({"/".join(PurePosixPath(n).parts[: _split_at(n, "train")]) for n in training})
    if len(subsets) > 1:
        raise UserError(
            f"{place}: it has several subsets ({', '.join(subsets)}); download the one you mean "
            "and use data.source=file:PATH"
        )
    return chosen


def _split_at(name: str, split: str) -> int | None:
    """Which part of the path says, as a word of its own, that the file is of this split."""
    for i, part in enumerate(PurePosixPath(name.lower()).parts):
        if split in re.split("[^a-z]+", part):
            return i
    return None
