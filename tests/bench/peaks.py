"""What a device can do at most, measured: `python -m tests.bench.peaks`, one line of JSON.

The largest of some products of square matrices and of some copies. A datasheet's number is beside
it where one is known, for no program reaches that.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from mainrun.training import backend

DATASHEET = {
    # NVIDIA's, dense bfloat16 FLOP/s and bytes/s.
    "H100": {"flops_per_second": 989e12, "bytes_per_second": 3.35e12},
    "H200": {"flops_per_second": 989e12, "bytes_per_second": 4.8e12},
}


def measure(size: int, numbers: int) -> dict[str, Any]:
    """Of JAX's first device: products of matrices of this size, copies of so many numbers."""
    is_cpu = jax.default_backend() == "cpu"
    precisions = ("float32",) if is_cpu else ("float32", "bfloat16")
    kind = jax.devices()[0].device_kind
    found: dict[str, float] = {}
    for precision in precisions:
        matrix = jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(precision))
        found[precision] = 2 * size**3 / _seconds(lambda x: x @ x, matrix)
    vector = jnp.ones(numbers, jnp.float32)
    return {
        "flops_per_second": found,
        "bytes_per_second": 2 * vector.nbytes / _seconds(lambda x: x + 1, vector),
        "datasheet": next((v for name, v in DATASHEET.items() if name in kind), None),
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
    print(json.dumps(measure(8192, 2**30) if is_gpu else measure(2048, 2**26)))
