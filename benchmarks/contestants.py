"""Who takes part: each a command, an environment and a precision. Equal work, said once."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from benchmarks import pytorch
from mainrun import config, huge_pages

Device = Literal["cpu", "gpu"]

# What a user's shell may have set and what would make a stock contestant other than stock.
_CLEARED = (
    "MALLOC_",
    "XLA_",
    "JAX_",
    "GLIBC_TUNABLES",
    "PYTORCH_",
    "LD_PRELOAD",
    "MAINRUN_",
    "TORCHINDUCTOR_",
    "TRITON_",
)

# glibc keeps what is freed instead of giving it back to the kernel and faulting it in again:
# no mmap for large blocks, no trimming, one arena (SPEED 3.2). Stock PyTorch pays for it, ours
# takes large pages instead (`mainrun.huge_pages`); this row tells how much of the difference it is.
_TUNED_MALLOC = (
    ("MALLOC_MMAP_MAX_", "0"),
    ("MALLOC_TRIM_THRESHOLD_", str(2**62)),
    ("MALLOC_ARENA_MAX", "1"),
)


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One way to do the same steps."""

    name: str
    side: Literal["mainrun", "torch"]
    device: Device
    precision: Literal["float32", "bfloat16"]
    variables: tuple[tuple[str, str], ...] = ()
    is_compiled: bool = False  # PyTorch's: torch.compile, and attention as one fused kernel


def field(device: Device, *, bfloat16: bool, torch: Path | None) -> list[Contestant]:
    """Everyone who can run on that device. The first is the reference."""
    names: dict[Literal["float32", "bfloat16"], str] = {"float32": "f32"}
    if bfloat16:
        names["bfloat16"] = "bf16"
    contestants = []
    for precision, name in names.items():
        if torch is not None:
            contestants.append(Contestant(f"torch {name} stock", "torch", device, precision))
            contestants.append(
                Contestant(f"torch {name} tuned malloc", "torch", device, precision, _TUNED_MALLOC)
                if device == "cpu"
                else Contestant(
                    f"torch {name} compiled", "torch", device, precision, is_compiled=True
                )
            )
        contestants.append(Contestant(f"mainrun {name}", "mainrun", device, precision))
    return contestants


def rivals(field: Sequence[Contestant]) -> dict[str, str]:
    """For each of ours, PyTorch at its best in the same precision."""
    best = {c.precision: c.name for c in field if c.is_compiled or c.variables}
    return {c.name: best[c.precision] for c in field if c.side == "mainrun" and best}


def command(
    contestant: Contestant, settings: Mapping[str, Any], run: config.Config, folder: Path
) -> list[str]:
    """The command line that starts it; writes the settings it reads into `folder`."""
    path = folder / f"{contestant.name.replace(' ', '-')}-{contestant.device}.json"
    if contestant.side == "mainrun":
        # JSON is YAML: the config is read as any config file is.
        plain = config.as_dict(run)
        plain["training"]["precision"] = contestant.precision
        file = path.with_suffix(".yaml")
        file.write_text(json.dumps(plain))
        given = {key: settings[key] for key in ("windows", "weights")}
        path.write_text(json.dumps({"config": str(file), **given}))
        return [sys.executable, "-m", "benchmarks.ours", str(path)]
    torch = pytorch.interpreter()
    assert torch is not None
    device = {"cpu": "cpu", "gpu": "cuda"}[contestant.device]
    own = {
        "precision": contestant.precision,
        "device": device,
        "is_compiled": contestant.is_compiled,
    }
    path.write_text(json.dumps({**settings, **own}))
    return [str(torch), str(pytorch.SCRIPT), "bench", str(path)]


def environment(contestant: Contestant, cache: Path) -> dict[str, str]:
    """The variables it runs with; `cache` is the folder of its compilation cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_CLEARED)}
    if contestant.device == "cpu":
        kept |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # Two of them keep their memory on one card, and what is preallocated is not what is used.
        kept |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    caches = {
        "MAINRUN_CACHE_DIR": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    own: dict[str, str] = {}
    if contestant.side == "mainrun" and contestant.device == "cpu":
        own = huge_pages.requested({})  # as the command does by itself
    return kept | caches | own | dict(contestant.variables)
