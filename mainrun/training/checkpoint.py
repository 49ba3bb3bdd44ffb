"""Checkpoints: Orbax folders that are complete or absent, the newest few and the best.

A save returns once the state is copied; writing goes on in the background. Each holds the whole
`TrainState` and the loop's `Progress`, with a checksum for every array: of 12 single flipped bits
in a 4 MB array, Orbax itself noticed none (0.12.8). When it is written it is sealed: a list of its
files with size and checksum.

A checkpoint that cannot be read need not be damaged: memory may be short, the disk away, the
config edited. So damage is only what its own files prove, one that is missing or not as it was
written; then the checkpoint is set aside under another name and the one before is used. Nothing
is ever deleted because it could not be read.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import absl.logging
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mainrun.errors import RunFailed, one_line
from mainrun.model.gpt import Params
from mainrun.training.mesh import placed
from mainrun.training.step import TrainState

absl.logging.set_verbosity(absl.logging.FATAL)  # Orbax tells at length what it also raises


_METADATA_BYTES = 2**20  # that a checkpoint may take besides its arrays

_FILES = 100  # inodes that a checkpoint may take: 46 with an average, and what Orbax removes again

_SHOWN_CHARACTERS = 200  # of what Orbax says, which can be pages

_SEAL = "seal.json"  # in a checkpoint's folder: bytes and CRC-32 of each file of its items

_PIECE_BYTES = 2**20  # of a file that is read for its checksum

_SEPARATOR = "|"  # parameter names have dots, and a slash would make folders


@dataclasses.dataclass(frozen=True)
class Progress:
    """What the loop knows beside the state. All of it follows from the steps before."""

    evaluated_step: int = -1  # the last step whose parameters were evaluated
    best_step: int = -1
    best_loss: float = float("inf")
    evaluations_since_best: int = 0
    planned_step: int = -1  # of the newest checkpoint that a run never stopped makes as well
    train_seconds: float = 0.0  # in optimizer steps, compilation and evaluation not counted


@dataclasses.dataclass(frozen=True)
class Restored:
    step: int
    state: TrainState
    progress: Progress


class Damaged(Exception):
    """A file of a checkpoint is missing, or is not what was written."""


class Checkpoints:
    """The folder `checkpoints/` of a run. Use in a `with`: leaving waits for the last save.

    Only who holds the run's record may open it to write: that removes what an interrupted save has
    left, and would take a living one's for it.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        read_only: bool = False,
        fingerprint: Mapping[str, Any] | None = None,
    ) -> None:
        """`fingerprint` says what run it is (`fingerprint.py`), and stands in each checkpoint."""
        self._folder, self._fingerprint = folder, dict(fingerprint or {})
        self._kept_steps: tuple[int, ...] = ()  # besides the newest
        self._writing, self._read_only = -1, read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, lambda: self._kept_steps),
            cleanup_tmp_directories=not read_only,
            create=False,
            read_only=read_only,
            multiprocessing_options=_by_itself(),
            async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
        )
        try:
            if not read_only:
                folder.mkdir(parents=True, exist_ok=True)
            self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
        except OSError as error:
            raise RunFailed(f"{folder} cannot be opened: {error.strerror}") from error
        self._held = set(self.steps())

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        try:
            with self._telling_failure():
                self._manager.close()
        except RunFailed:
            if error is None:  # else that one is the reason
                raise

    def save(self, step: int, state: TrainState, progress: Progress) -> None:
        """Start to save; raises RunFailed if this save or the one before could not be written.

        A step that is saved already stays as it is: its state can be no other, and a run stopped
        in an evaluation does that again anyway. Every process of a run takes part, and the one
        that may write does.
        """
        self._kept_steps = progress.best_step, progress.planned_step
        if step in self._held:  # not whoever looks: of several processes all must think the same
            return
        self._held.add(step)
        self.wait()
        self._writing = step
        # Copies: views of the state would keep the next step from reusing its memory.
        trained = state._replace(frozen={})  # the base is another run's, and never changes
        arrays = {name: _on_host(array) for name, array in _named(trained).items()}
        if self._read_only:
            return
        record = {
            "progress": dataclasses.asdict(progress),
            "checksums": {name: _checksum(array) for name, array in arrays.items()},
            "fingerprint": self._fingerprint,
        }
        self._check_space(sum(array.nbytes for array in arrays.values()))
        with self._telling_failure():
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{item: ocp.args.StandardSave(part) for item, part in _split(arrays).items()},
                    record=ocp.args.JsonSave(record),
                ),
            )

    def wait(self) -> None:
        """Return when everything is on disk; raises RunFailed if it cannot get there."""
        with self._telling_failure():
            self._manager.wait_until_finished()

    def _check_space(self, needed: int) -> None:
        """Before Orbax finds out: its writers then print pages of tracebacks, or never end."""
        try:
            disk = os.statvfs(self._folder)
        except OSError as error:
            raise RunFailed(
                f"the checkpoint of step {self._writing} cannot be written: {self._folder}: "
                f"{error.strerror}"
            ) from error
        free, wanted = disk.f_bavail * disk.f_frsize, needed + _METADATA_BYTES
        lack = ""
        if free < wanted:
            lack = f"{free / 2**20:.1f} MiB free, and {wanted / 2**20:.1f} MiB are needed"
        elif disk.f_files > 0 and disk.f_favail < _FILES:  # some file systems count none
            lack = f"room for {disk.f_favail} files, and {_FILES} are needed"
        if lack:
            raise RunFailed(
                f"no space left for the checkpoint of step {self._writing}: {self._folder} has "
                f"{lack}; make room and resume the run"
            )

    @contextlib.contextmanager
    def _telling_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax raises what its writer threads met, of any type
            full = "No space left on device"
            reason = full if full in str(error) else one_line(error)[:_SHOWN_CHARACTERS]
            raise RunFailed(
                f"the checkpoint of step {self._writing} could not be written: {reason}"
            ) from error

    def _seal(self) -> None:
        """Called by Orbax, in its thread: all is written, and the folder has not its name yet."""
        folder = next(self._folder.glob(f"{self._writing}.*-tmp*"))
        # Not what lies beside the items: Orbax has still to write when it has committed.
        files = sorted(path for path in folder.glob("*/**/*") if path.is_file())
        seal = {str(path.relative_to(folder)): _size_and_checksum(path) for path in files}
        (folder / _SEAL).write_text(json.dumps(seal), encoding="utf-8")

    def restore_newest(self, like: TrainState) -> tuple[Restored | None, list[str]]:
        """The newest checkpoint that is whole, and why each newer one is not; None without any.

        Raises RunFailed where one cannot be read though nothing proves it damaged, or all are.
        """
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                state, progress = self.restore(step, like)
            except Damaged as error:
                damaged.append(f"step {step}: {error}")
                continue
            return Restored(step, state, progress), damaged
        if damaged:
            raise RunFailed(
                f"no checkpoint in {self._folder} is whole ({'; '.join(damaged)}): put them back "
                "from a copy, or train anew; nothing was changed"
            )
        return None, []

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        """This step's state, in the structure of `like` (abstract will do), with its frozen part.

        Where `like` lies on several devices, so does it, whatever it was saved on.

        Raises Damaged, or RunFailed where it cannot be read for another reason.
        """
        named = _named(like._replace(frozen={}))
        arrays, progress = self._read(step, _split(named))
        leaves = [_placed(arrays[name], leaf) for name, leaf in named.items()]
        structure = jax.tree.structure(like._replace(frozen={}))
        return jax.tree.unflatten(structure, leaves)._replace(frozen=like.frozen), progress

    def restore_params(
        self, step: int, like: Mapping[str, Any], *, average: bool = False
    ) -> Params:
        """This step's parameters alone, or their average; raises as `restore` does."""
        item = "average" if average else "params"
        prefix = f"{item}{_SEPARATOR}"
        named = {prefix + name: leaf for name, leaf in like.items()}
        arrays, _ = self._read(step, {item: named})
        return {name.removeprefix(prefix): jnp.asarray(a) for name, a in arrays.items()}

    def progress(self, step: int) -> Progress:
        """What the loop knew when it saved this step; raises as `restore` does."""
        return self._read(step, {})[1]

    def _read(
        self, step: int, items: dict[str, dict[str, Any]]
    ) -> tuple[dict[str, np.ndarray], Progress]:
        wanted = {
            item: ocp.args.StandardRestore(
                {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
            )
            for item, leaves in items.items()
        }
        args = ocp.args.Composite(**wanted, record=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            record = restored["record"]
            progress = Progress(**record["progress"])
            arrays = {name: array for item in items for name, array in restored[item].items()}
            for name, array in arrays.items():
                if _checksum(array) != record["checksums"][name]:
                    raise Damaged(f"{name} does not match its checksum")
        except Damaged:
            raise
        except Exception as error:  # Orbax, TensorStore and the system raise as they please
            folder, reason = self._folder / str(step), one_line(error)[:_SHOWN_CHARACTERS]
            if damage := _damage(folder, error):
                raise Damaged(damage) from error
            raise RunFailed(f"{folder} cannot be read: {reason}; nothing was changed") from error
        return arrays, progress

    def set_aside_after(self, step: int) -> None:
        """Rename newer checkpoints, so that their steps can be saved again; none is deleted."""
        self.wait()
        for newer in self.steps():
            if newer > step:
                aside = self._folder / f"{newer}.set-aside"
                for number in itertools.count(2):
                    if not aside.exists():
                        break
                    aside = aside.with_name(f"{newer}.set-aside-{number}")
                os.rename(self._folder / str(newer), aside)
                self._held.discard(newer)
        self._manager.reload()

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())


def _by_itself() -> ocp.options.MultiprocessingOptions:
    """Orbax in one process waits for no other: who writes and who reads is said elsewhere."""
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=f"process{own}"
    )


class _Kept(preservation_policy.PreservationPolicy):
    """The newest few, the best, and the one that training may go back to."""

    def __init__(self, keep: int, others: Callable[[], tuple[int, ...]]) -> None:
        self._keep, self._others = keep, others

    def should_preserve(self, checkpoints: Sequence[Any], *, context: object) -> list[bool]:
        oldest_kept = len(checkpoints) - self._keep
        return [
            place >= oldest_kept or checkpoint.step in self._others()
            for place, checkpoint in enumerate(checkpoints)
        ]


def _named(state: TrainState) -> dict[str, Any]:
    """The leaves under names, in the order of `jax.tree.leaves`: no structure to go stale."""
    return {
        jax.tree_util.keystr(path, simple=True, separator=_SEPARATOR): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def _on_host(array: jax.Array) -> np.ndarray:
    """The array, whole, as a copy; of what lies with several processes, by all of them at once."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.array(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _placed(array: np.ndarray, like: Any) -> jax.Array:
    """On the devices on which `like` lies."""
    if isinstance(sharding := getattr(like, "sharding", None), jax.sharding.NamedSharding):
        return placed(array, sharding)
    return jnp.asarray(array)


def _split(named: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The parameters and their average apart from the rest, so that they can be read alone."""
    items: dict[str, dict[str, Any]] = {}
    for name, leaf in named.items():
        field = name.partition(_SEPARATOR)[0]
        item = field if field in ("params", "average") else "rest"
        items.setdefault(item, {})[name] = leaf
    return items


def _checksum(array: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data)


def _damage(folder: Path, error: Exception) -> str | None:
    """The file of a checkpoint that is proven to be missing or changed; None where none is.

    Of one without a seal, which another version or a killed process left, no more is known than
    what reading it raised.
    """
    try:
        seal = json.loads((folder / _SEAL).read_text(encoding="utf-8"))
        files = {str(name): (size, checksum) for name, (size, checksum) in seal.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return one_line(error) if isinstance(error, FileNotFoundError) else None
    for name, written in files.items():
        try:
            if _size_and_checksum(folder / name) != written:
                return f"{name} is not as it was written"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError:  # the disk's word, or of whoever may read: no proof
            continue
    return None


def _size_and_checksum(path: Path) -> tuple[int, int]:
    size, checksum = 0, 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            size, checksum = size + len(piece), zlib.crc32(piece, checksum)
    return size, checksum
