"""What a device can do at most: `python -m benchmarks.peaks`, one line of JSON.

The fastest of some products of square matrices and of some copies; beside it the datasheet's
bfloat16, where it is known, which no program reaches.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mainrun.training import backend, peaks


def measure(numbers: int) -> dict[str, Any]:
    """Of JAX's first device: products of matrices, copies of so many numbers."""
    is_cpu = jax.default_backend() == "cpu"
    precisions = ("float32",) if is_cpu else ("float32", "bfloat16")
    kind = jax.devices()[0].device_kind
    vector = jnp.ones(numbers, jnp.float32)
    return {
        "flops_per_second": {precision: peaks.measured(precision) for precision in precisions},
        "bytes_per_second": 2 * vector.nbytes / _seconds(lambda x: x + 1, vector),
        "datasheet": peaks.of_device(kind, "bfloat16"),
    }


def _seconds(function: Callable[[jax.Array], jax.Array], given: jax.Array) -> float:
    """The shortest of ten."""
    compiled = jax.jit(function).lower(given).compile()
    seconds = []
    for _ in range(10):
        started = time.perf_counter()
        compiled(given).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


if __name__ == "__main__":
    backend.prepare()
    is_gpu = jax.default_backend() == "gpu"
    print(json.dumps(measure(2**30 if is_gpu else 2**26)))
