"""Who takes part: each a command, an environment and a precision. Equal work, said once."""

import dataclasses
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mainrun import config
from tests.bench import pytorch

Device = Literal["cpu", "gpu"]

# What a user's shell may have set and what would make a stock contestant other than stock.
_CLEARED = ("MALLOC_", "XLA_", "JAX_", "GLIBC_TUNABLES", "PYTORCH_", "LD_PRELOAD", "MAINRUN_")

# glibc keeps what is freed instead of giving it back to the kernel and faulting it in again:
# no mmap for large blocks, no trimming, one arena (SPEED 3.2). Stock PyTorch pays for it, ours
# asks for the same itself; this row tells how much of the difference that is.
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


def field(device: Device, *, bfloat16: bool, torch: Path | None) -> list[Contestant]:
    """Everyone who can run on that device. The first is the reference."""
    names: dict[Literal["float32", "bfloat16"], str] = {"float32": "f32"}
    if bfloat16:
        names["bfloat16"] = "bf16"
    contestants = []
    for precision, name in names.items():
        if torch is not None:
            contestants.append(Contestant(f"torch {name} stock", "torch", device, precision))
            if device == "cpu":
                tuned = Contestant(
                    f"torch {name} tuned malloc", "torch", device, precision, _TUNED_MALLOC
                )
                contestants.append(tuned)
        contestants.append(Contestant(f"mainrun {name}", "mainrun", device, precision))
    return contestants


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
        return [sys.executable, "-m", "tests.bench.ours", str(path)]
    torch = pytorch.interpreter()
    assert torch is not None
    device = {"cpu": "cpu", "gpu": "cuda"}[contestant.device]
    path.write_text(json.dumps({**settings, "precision": contestant.precision, "device": device}))
    return [str(torch), str(pytorch.SCRIPT), "bench", str(path)]


def environment(contestant: Contestant, cache: Path) -> dict[str, str]:
    """The variables it runs with; `cache` is the folder of its compilation cache."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_CLEARED)}
    if contestant.device == "cpu":
        kept |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    else:
        # Two of them keep their memory on one card, and what is preallocated is not what is used.
        kept |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    return kept | {"MAINRUN_CACHE_DIR": str(cache)} | dict(contestant.variables)
