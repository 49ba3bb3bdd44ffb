"""The most floating-point operations a second that a device can do, by its data sheet or measured.

Figures are NVIDIA's for dense products (half of what a sheet gives "with sparsity") that sum up in
float32, at the sheet's clocks; a card whose power is limited does less. A float32 product is
computed as XLA chooses: in TF32 on cards that have it. Names are the driver's, which JAX passes on.
"""

import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

_TERA = 1e12


class Peaks(NamedTuple):
    """Tera-operations a second; None: not in hardware."""

    bfloat16: float | None
    float16: float
    float32: float


_PEAKS = {
    # Data centre: data sheets of each card; H100 also its architecture white paper, table 2.
    "B200": Peaks(2250.0, 2250.0, 1125.0),
    "GB200": Peaks(2500.0, 2500.0, 1250.0),
    "H200": Peaks(989.4, 989.4, 494.7),
    "H200 NVL": Peaks(835.5, 835.5, 417.5),
    "GH200": Peaks(989.4, 989.4, 494.7),
    "H100": Peaks(989.4, 989.4, 494.7),
    "H100 NVL": Peaks(835.5, 835.5, 417.5),
    "H100 PCIe": Peaks(756.0, 756.0, 378.0),
    "H20": Peaks(148.0, 148.0, 74.0),
    "A100": Peaks(312.0, 312.0, 156.0),
    "A40": Peaks(149.7, 149.7, 74.8),
    "A30": Peaks(165.0, 165.0, 82.0),
    "A10": Peaks(125.0, 125.0, 62.5),
    "A10G": Peaks(70.0, 70.0, 35.0),
    "L40S": Peaks(362.05, 362.05, 183.0),
    "L40": Peaks(181.05, 181.05, 90.5),
    "L4": Peaks(121.0, 121.0, 60.0),
    "T4": Peaks(None, 65.0, 8.1),
    "V100 SXM2": Peaks(None, 125.0, 15.7),
    "V100 SXM3": Peaks(None, 125.0, 15.7),
    "V100 PCIe": Peaks(None, 112.0, 14.0),
    "V100S": Peaks(None, 130.0, 16.4),
    # Workstation and GeForce: appendices of the Ampere GA102, Ada and RTX Blackwell white papers.
    "RTX A6000": Peaks(154.8, 154.8, 77.4),
    "RTX 6000 Ada": Peaks(364.2, 364.2, 182.1),
    "RTX 5090": Peaks(209.5, 209.5, 104.8),
    "RTX 4090": Peaks(165.2, 165.2, 82.6),
    "RTX 4080": Peaks(97.5, 97.5, 48.7),
    "RTX 3090": Peaks(71.0, 71.0, 35.6),
    "RTX 3090 Ti": Peaks(80.0, 80.0, 40.0),
    "RTX 3080": Peaks(59.5, 59.5, 29.8),
}

_OTHER_CARDS = {"laptop", "max", "q", "mig", "ti", "super", "d"}
"""Words that make another card of a name, or a part of one, unless the table has them."""

_CPU_SIDE, _GPU_SIDE = 2048, 8192
_TRIES = 5


def of_device(device_kind: str, precision: str) -> float | None:
    """Operations a second by the data sheet, for a name such as `NVIDIA A100-SXM4-40GB`.

    None for a device that is not in the table, or has no products in this precision.
    """
    words = _words(device_kind)
    rows = [name for name in _PEAKS if _words(name) <= words]
    if not rows:
        return None
    name = max(rows, key=len)
    if (words - _words(name)) & _OTHER_CARDS:
        return None
    peak = _PEAKS[name]._asdict()[precision]
    return None if peak is None else _TERA * peak


def side() -> int:
    """Rows and columns of the matrices that `measured` multiplies on this machine's device."""
    return _CPU_SIDE if jax.default_backend() == "cpu" else _GPU_SIDE


def measured(precision: str) -> float:
    """Operations a second of a product of two square matrices, the best of a few."""
    size = side()
    keys = jax.random.split(jax.random.key(0))
    # Random: of zeros, a card draws less power and clocks higher.
    a, b = (jax.random.normal(key, (size, size), jnp.dtype(precision)) for key in keys)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(a, b))
    seconds = []
    for _ in range(_TRIES):
        started = time.perf_counter()
        jax.block_until_ready(product(a, b))
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / min(seconds)


def _words(name: str) -> set[str]:
    return set(re.split(r"[\s-]+", name.lower()))
