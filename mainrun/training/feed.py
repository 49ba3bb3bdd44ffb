"""How batches come to the device: looked up there in the whole text, or sent for each dispatch.

A corpus of titles takes a few megabytes, so it lies on the device and a dispatch says which windows
its steps read. What is too large for that is sent, batch by batch. Either way batch n of a run is
what `batches.batch` makes of it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Integer

from mainrun.data.batches import Batch, Windows


@runtime_checkable
class Feed(Protocol):
    """What the steps of a dispatch are given, and how each finds its batch in it."""

    most: int  # steps of a dispatch

    def __call__(self, index: int, count: int) -> Any:
        """For `count` steps, the first of them reading batch `index`."""

    def batch_at(self, given: Any, step: Int[Array, ""]) -> Batch: ...


class Table(NamedTuple):
    """Windows on the device."""

    inputs: Integer[Array, "windows time"]
    targets: Integer[Array, "windows time"]
    has_weight: Bool[Array, "windows time"]


def table_bytes(windows: Windows) -> int:
    """What the windows take on the device."""
    return windows.inputs.nbytes + windows.targets.nbytes + windows.positions.size


class Resident:
    """Windows that lie on the device; a dispatch says the numbers of those that it reads."""

    def __init__(
        self,
        windows: Windows,
        rows: Callable[[int], Int[np.ndarray, " batch"]],
        most: int,
        put: Callable[[np.ndarray], Array] = jnp.asarray,
    ) -> None:
        """`put` lays an array on all devices that read it."""
        self.most = most
        self._rows, self._eos_id = rows, windows.eos_id
        self._table = Table(
            put(windows.inputs),
            put(windows.targets),
            put(windows.positions >= 0),
        )

    def __call__(self, index: int, count: int) -> tuple[Table, Int[np.ndarray, "most batch"]]:
        numbers = [self._rows(index + n) for n in range(count)]
        unused = [numbers[0]] * (self.most - count)
        return self._table, np.stack([*numbers, *unused]).astype(np.int32)

    def batch_at(self, given: tuple[Table, Array], step: Int[Array, ""]) -> Batch:
        table, rows = given
        inputs = table.inputs[rows[step]].astype(jnp.int32)
        return Batch(  # whose fields are NumPy's, for whoever has no JAX
            inputs,  # type: ignore[arg-type]
            table.targets[rows[step]].astype(jnp.int32),  # type: ignore[arg-type]
            jnp.cumsum(inputs == self._eos_id, axis=1, dtype=jnp.int32),  # type: ignore[arg-type]
            table.has_weight[rows[step]].astype(jnp.float32),  # type: ignore[arg-type]
        )


class Sent:
    """Batches that are sent with each dispatch."""

    def __init__(self, batch: Callable[[int], Batch], most: int) -> None:
        self.most = most
        self._batch = batch

    def __call__(self, index: int, count: int) -> Batch:
        batches = [self._batch(index + n) for n in range(count)]
        unused = [batches[0]] * (self.most - count)
        return jax.tree.map(lambda *rows: np.stack(rows), *batches, *unused)

    def batch_at(self, given: Batch, step: Int[Array, ""]) -> Batch:
        return jax.tree.map(lambda rows: rows[step], given)
