"""Processes that train one run together: who they are, who speaks, and what they decide as one.

Every process runs the same program on its own devices, and XLA sums up what they compute. The first
alone writes and speaks. Whatever a process sees by itself, a stop signal or how fast it is, must
not decide what it does next, or the others wait for it in vain: such things are voted on.
"""

import atexit
import contextlib
import json
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from mainrun.errors import RunFailed, Stopped, UserError, leave, one_line

_ADDRESS, _COUNT, _NUMBER = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
_LAUNCHERS = {  # what says how many there are, and what only their processes have
    "SLURM_NTASKS": "SLURM_STEP_NODELIST",
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
}
_HEARTBEAT_SECONDS = 30
"""Without a sign of life from a process, after which the others are ended."""


def join() -> None:
    """Meet the other processes of this run, where a launcher or the environment names some.

    Slurm and Open MPI are known to JAX; elsewhere (Kubernetes, by hand) three variables say it.
    Before JAX looks for devices. Twice is harmless. Raises UserError where they cannot meet.
    """
    if jax.distributed.is_initialized() or not (_is_named() or _is_launched()):
        return
    # It would take SIGTERM over, which is ours to answer.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if _is_named():
            jax.distributed.initialize(
                os.environ[_ADDRESS],
                int(os.environ[_COUNT]),
                int(os.environ[_NUMBER]),
                cluster_detection_method="deactivate",
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
        else:
            jax.distributed.initialize(heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the processes of this run cannot meet ({one_line(error)}): each needs "
            f"{_ADDRESS} (host:port of the first), {_COUNT} and {_NUMBER}, or Slurm's or Open "
            "MPI's launcher (docs/cluster.md)"
        ) from error


def is_first() -> bool:
    """Whether this process writes and speaks for all."""
    return jax.process_index() == 0


def from_first(tell: Callable[[], str]) -> str:
    """What the first process has to tell, for all; UserError for all where it raises one."""
    if jax.process_count() == 1:
        return tell()
    said = {"told": "", "error": ""}
    if is_first():
        try:
            said["told"] = tell()
        except UserError as error:
            said["error"] = str(error)
    heard = json.loads(_broadcast(json.dumps(said)))
    if heard["error"]:
        raise UserError(heard["error"])
    return str(heard["told"])


def wait_for_all() -> None:
    """Return when every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("mainrun")


class Vote:
    """What any process said, for all: the largest number that was said a call ago.

    A call ago, because the devices add it up behind all that they already have to do. By oneself
    one is heard at once.
    """

    def __init__(self, first: int) -> None:
        """Until something was said, `first` was."""
        self._last: int | jax.Array = first
        count = jax.process_count()
        if count > 1:
            # One device of each.
            devices = {d.process_index: d for d in reversed(jax.devices())}
            mesh = Mesh(np.array([devices[n] for n in range(count)]), "process")
            self._each = NamedSharding(mesh, Spec("process"))
            self._largest = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, Spec()))

    def __call__(self, said: int) -> int:
        if jax.process_count() == 1:
            return said
        said_here = np.array([said], np.int32)
        votes = jax.make_array_from_process_local_data(self._each, said_here)
        heard, self._last = int(self._last), self._largest(votes)
        return heard


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work that all processes do. Raises RunFailed where one of them is gone in the middle of it.

    Where this process fails alone, it ends without a farewell that the others do not expect.
    """
    try:
        yield
    except Stopped:
        raise
    except Exception as error:
        if not jax.distributed.is_initialized():
            raise
        # JAX's own end waits five minutes for the others, who wait for what is summed up with us.
        atexit.register(leave, 2 if isinstance(error, UserError) else 1)
        if isinstance(error, (UserError, RunFailed)) or not _is_loss(error):
            raise
        raise RunFailed(
            "another process of this run has ended or cannot be reached; its output says why, and "
            f"`mainrun resume` goes on from the newest checkpoint ({one_line(error)[:200]})"
        ) from error


def _is_named() -> bool:
    return _ADDRESS in os.environ


def _is_launched() -> bool:
    return any(
        int(os.environ.get(count, "1")) > 1 and process in os.environ
        for count, process in _LAUNCHERS.items()
    )


def _broadcast(text: str) -> str:
    data = np.frombuffer(text.encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    sent = data if is_first() else np.zeros(size, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(sent))).decode()


def _is_loss(error: Exception) -> bool:
    """Whether it tells of a process that cannot be reached: JAX has no type for it."""
    said = str(error).lower()
    return any(word in said for word in ("gloo", "nccl", "connection", "unavailable"))
