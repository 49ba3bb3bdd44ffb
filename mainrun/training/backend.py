"""What this machine is to JAX: process settings before it starts, devices, memory, batch cuts."""

import ctypes
import hashlib
import os
import platform
import resource
from pathlib import Path

import jax

from mainrun.data import cache
from mainrun.errors import UserError, one_line
from mainrun.model.kernels import Device
from mainrun.training import cluster

_CPU_TOKENS = 1024
"""Tokens of a micro-batch on a CPU: its temporaries stay near the cache, and a step of 8,192
tokens took 6.9 s instead of 10.8 (SPEED 3.2)."""


_LOGITS = 2**25
"""Logits that are held at one time: 128 MiB."""

_GPU_HEAD_TOKENS = 2048
"""Positions of the head's product on a GPU, at least: fewer would not fill it (SPEED 1.4; not
measured here)."""


def prepare() -> None:
    """Set up this process; call before the first JAX computation. Twice is harmless.

    Raises UserError where JAX_PLATFORMS asks for a device that is not there: no silent fallback;
    and where the other processes of a run cannot be met.
    """
    if not Path("/dev/nvidiactl").exists():
        _bound_the_heap()
    cluster.join()
    folder = cache.folder() / "jax" / _cpu_features()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    # Else matplotlib makes a folder for settings in the user's home.
    os.environ.setdefault("MPLCONFIGDIR", str(cache.folder() / "matplotlib"))
    _check_platform()


def describe_device() -> str:
    """For example `cpu (AMD EPYC, 2 threads)` or `NVIDIA H200`."""
    device = jax.local_devices()[0]
    return device.device_kind if device.platform != "cpu" else f"cpu ({_cpu_model()})"


def attention_device() -> Device:
    """The device, as the choice of a kernel for attention asks of it."""
    device = jax.local_devices()[0]
    major, point, minor = str(getattr(device, "compute_capability", "")).partition(".")
    known = point and major.isdecimal() and minor.isdecimal()  # AMD's are names
    return Device(device.platform, (int(major), int(minor)) if known else None)


def micro_batches(
    batch_size: int,
    context_length: int,
    *,
    at_least: int,
    shards: int = 1,
    platform: str | None = None,
) -> int:
    """Micro-batches that a batch is cut into: what was asked for, and more on a CPU if faster.

    So many devices share the examples of each evenly. `platform` stands for this machine's, where
    a step is made for another.
    """
    if (platform or jax.default_backend()) != "cpu":
        return at_least
    best = at_least
    for count in range(at_least, batch_size + 1):
        examples = batch_size // count
        if batch_size % count or examples % shards:
            continue
        best = count
        if examples // shards * context_length <= _CPU_TOKENS:
            break
    return best


def head_tokens(vocab_size: int, platform: str | None = None) -> int:
    """Positions whose logits are held at one time, in training and in evaluation."""
    few = 1 if (platform or jax.default_backend()) == "cpu" else _GPU_HEAD_TOKENS
    return max(few, _LOGITS // vocab_size)


def peak_memory_bytes() -> int:
    """The most memory so far: the device's allocator's on a GPU, the process's on a CPU."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return int(stats["peak_bytes_in_use"])
    # Not getrusage where it can be helped: a child's maximum may start at its parent's.
    kibibytes = _kibibytes("/proc/self/status", "VmHWM:")
    return 1024 * (kibibytes or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def memory_limit_bytes() -> int | None:
    """What a step may take: the GPU's limit, or this machine's available memory; None: unknown."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    kibibytes = _kibibytes("/proc/meminfo", "MemAvailable:")
    return None if kibibytes is None else kibibytes * 1024


def _check_platform() -> None:
    asked = os.environ.get("JAX_PLATFORMS")
    if not asked:
        return
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # jax 0.10 and 0.12 assert
        why = f" ({one_line(error)})" if str(error) else ""
        raise UserError(
            f"JAX_PLATFORMS={asked}, but JAX has no such device{why}: `mainrun doctor` says what "
            "is missing; JAX_PLATFORMS=cpu trains on the CPU"
        ) from None


def _kibibytes(path: str, field: str) -> int | None:
    """A figure that Linux tells; None elsewhere."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith(field)), None)


def _bound_the_heap() -> None:
    """Let glibc map large blocks one by one and keep the small ones' heap; else do nothing.

    XLA:CPU takes the temporaries of a dispatch as one aligned block and frees it afterwards. With
    all blocks inside the heap (M_MMAP_MAX=0, as it was) freed ones often are not used again: a step
    of 254 MiB by the compiler's count took 1,208 MiB after sixty, now 317. The price is a page
    fault for every 4 KiB, about 2 µs each, in processor seconds a step: 0.13 beside 0.98 (width
    256, 2,048 tokens), 0.10 beside 0.17 (width 64, 1,024 tokens; one run each). In the latter
    `GLIBC_TUNABLES=glibc.malloc.hugetlb=1`, set before the process starts, made it 0.03, where the
    kernel gives huge pages on request.
    """
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # glibc takes no larger threshold. Set, it no longer moves with what was freed.
        for option, value in (
            (m_mmap_threshold, 32 * 2**20),
            (m_trim_threshold, -1),
            (m_arena_max, 1),
        ):
            mallopt(option, value)


def _cpu_info(field: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((x.partition(":")[2].strip() for x in lines if x.startswith(field)), "")


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_features() -> str:
    """A name for this kind of CPU: JAX's cache does not tell one from another by itself."""
    features = platform.machine() + _cpu_info("flags") + _cpu_info("Features")
    return hashlib.sha256(features.encode()).hexdigest()[:16]
