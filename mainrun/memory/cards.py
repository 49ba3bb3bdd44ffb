"""Graphics cards that a step can be compiled for without having one, and what XLA asks about them.

The figures are the makers' data sheets' and what the driver says of the card; XLA ships
descriptions of the same cards and decides by such figures what to fuse. A card that is not here
needs a line.
"""

from typing import NamedTuple

from mainrun.errors import UserError


class Card(NamedTuple):
    title: str
    memory_bytes: int
    compute_capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    clock_ghz: float
    bandwidth: float  # of the memory, bytes a second
    l2_bytes: int


CARDS = {
    "a100-40gb": Card("NVIDIA A100-SXM4-40GB", 42_331_013_120, (8, 0), 108, 1.41, 1555e9, 40 << 20),
    "a100-80gb": Card("NVIDIA A100-SXM4-80GB", 85_100_068_864, (8, 0), 108, 1.41, 2039e9, 40 << 20),
    "a6000": Card("NVIDIA RTX A6000", 51_041_271_808, (8, 6), 84, 1.8, 768e9, 6 << 20),
    "b200": Card("NVIDIA B200", 191_514_411_008, (10, 0), 148, 1.965, 7672e9, 126 << 20),
    "h100": Card("NVIDIA H100 80GB HBM3", 84_942_979_072, (9, 0), 132, 1.98, 3352e9, 50 << 20),
    "h100-pcie": Card("NVIDIA H100 PCIe", 84_942_979_072, (9, 0), 114, 1.755, 2039e9, 50 << 20),
    "h200": Card("NVIDIA H200", 151_397_597_184, (9, 0), 132, 1.98, 4800e9, 50 << 20),
}

_KIBIBYTES = {8: 164, 9: 228, 10: 228}  # of shared memory a multiprocessor, by generation
_SMALLER_AMPERE = (8, 6)  # 100 KiB, threads for 48 warps, twice the float32 units
_BLOCK_RESERVE = 1024  # of shared memory, that a block cannot have


def named(name: str) -> Card:
    """Raises UserError, with the names that there are, for one that is unknown."""
    if name.lower() not in CARDS:
        raise UserError(f"--device {name} is none of {', '.join(CARDS)}")
    return CARDS[name.lower()]


def description(card: Card) -> str:
    """The card as XLA's `GpuTargetConfigProto`, in text.

    Limits of a generation are those of the CUDA C++ Programming Guide, table of technical
    specifications per compute capability.
    """
    major, minor = card.compute_capability
    is_smaller = card.compute_capability == _SMALLER_AMPERE
    shared = (100 if is_smaller else _KIBIBYTES[major]) << 10
    numbers = {
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 1536 if is_smaller else 2048,
        "registers_per_block_limit": 65536,
        "registers_per_core_limit": 65536,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_block_optin": shared - _BLOCK_RESERVE,
        "shared_memory_per_core": shared,
        "core_count": card.cores,
        "fpus_per_core": 64 if (major, minor) == (8, 0) else 128,
        "clock_rate_ghz": card.clock_ghz,
        "memory_bandwidth": int(card.bandwidth),
        "l2_cache_size": card.l2_bytes,
        "device_memory_size": card.memory_bytes,
    }
    # From Hopper on, instructions that are a generation's alone (sm_90a) are what XLA compiles for.
    own = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return "\n".join(
        [
            "gpu_device_info {",
            *(f"  {name}: {number}" for name, number in numbers.items()),
            "  cuda_compute_capability {",
            f"    major: {major} minor: {minor} feature_extension: {own}",
            "  }",
            f'  name: "{card.title}"',
            "}",
            'platform_name: "CUDA"',
            f'device_description_str: "{card.title}"',
        ]
    )
