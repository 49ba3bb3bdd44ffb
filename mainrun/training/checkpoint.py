"""Checkpoints: Orbax folders that are complete or absent, the newest few and the best.

A save returns once the state is copied; writing goes on in the background. Each holds the whole
`TrainState` and the loop's `Progress`, with a checksum for every array, so that a damaged one is
noticed and the one before is used: of 12 single flipped bits in a 4 MB array, Orbax itself noticed
none (0.12.8).
"""

import contextlib
import dataclasses
import shutil
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

_SHOWN_CHARACTERS = 200  # of what Orbax says, which can be pages

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


class Checkpoints:
    """The folder `checkpoints/` of a run. Use in a `with`: leaving waits for the last save.

    Only who holds the run's record may open it to write: that removes what an interrupted save has
    left, and would take a living one's for it.
    """

    def __init__(self, folder: Path, *, keep: int = 1, read_only: bool = False) -> None:
        self._folder = folder
        self._kept_steps: tuple[int, ...] = ()  # besides the newest
        self._writing, self._read_only = -1, read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_Kept(keep, lambda: self._kept_steps),
            cleanup_tmp_directories=not read_only,
            create=False,
            read_only=read_only,
            multiprocessing_options=_by_itself(),
        )
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)
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
        """Before Orbax finds out: its writers then print a page of tracebacks from C."""
        free = shutil.disk_usage(self._folder).free
        if free < needed + _METADATA_BYTES:
            raise RunFailed(
                f"no space left for the checkpoint of step {self._writing}: {self._folder} has "
                f"{free / 2**20:.1f} MiB free, and {needed / 2**20:.1f} MiB are needed; make room "
                "and resume the run"
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

    def restore_newest(self, like: TrainState) -> tuple[Restored | None, list[str]]:
        """The newest checkpoint that is whole, and why each newer one is not."""
        damaged: list[str] = []
        for step in reversed(self.steps()):
            try:
                state, progress = self.restore(step, like)
            except Exception as error:  # damage has many shapes: missing files, bad bytes, JSON
                damaged.append(f"step {step}: {one_line(error)[:_SHOWN_CHARACTERS]}")
                continue
            return Restored(step, state, progress), damaged
        return None, damaged

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, Progress]:
        """This step's state, in the structure of `like` (abstract will do), with its frozen part.

        Where `like` lies on several devices, so does it, whatever it was saved on.

        Raises whatever a damaged checkpoint makes Orbax raise, or ValueError for a bad checksum.
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
        restored = self._manager.restore(step, args=args)
        record = restored["record"]
        arrays = {name: array for item in items for name, array in restored[item].items()}
        for name, array in arrays.items():
            if _checksum(array) != record["checksums"][name]:
                raise ValueError(f"{name} does not match its checksum")
        return arrays, Progress(**record["progress"])

    def discard_after(self, step: int) -> None:
        """Delete newer checkpoints, which are damaged, so that their steps can be saved again."""
        for newer in self.steps():
            if newer > step:
                self._manager.delete(newer)
                self._held.discard(newer)

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
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8))
