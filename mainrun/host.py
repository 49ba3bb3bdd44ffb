"""The settings of a machine that runs jobs, apart from those of a run.

`config/host.yaml` states all of them with their units; a machine's own file states differences.
They say what a container may take and where things lie; none of them moves a number of a run.
"""

import contextlib
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from mainrun import config, user, yaml12
from mainrun.errors import UserError

_STRICT = ConfigDict(extra="forbid", strict=True)
SYSTEM_FILE = Path("/etc/mainrun/host.yaml")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def checked_size(text: str) -> str:
    """The text itself, where it is a size: `512m`, `60g`."""
    num_bytes(text)
    return text


def checked_gpus(text: str) -> str:
    """The text itself, where it names GPUs: auto, all, none or indices. Else ValueError."""
    if text not in ("auto", "all", "none") and not re.fullmatch(r"\d{1,3}(,\d{1,3})*", text):
        raise ValueError(f"{text!r} names no GPUs: write auto, all, none, or indices such as 0,1")
    return text


Size = Annotated[str, AfterValidator(checked_size)]
Gpus = Annotated[str, AfterValidator(checked_gpus)]
Seconds = Annotated[int, Field(ge=0)]


@dataclass(frozen=True, config=_STRICT)
class Host:
    image: str = "mainrun:current"
    target: Literal["auto", "cpu", "cuda"] = "auto"
    base_image: str | None = None
    gpus: Gpus = "auto"
    runs: str | None = None
    data: str | None = None
    cache: str | None = None
    locks: str = "/run/lock/mainrun"
    memory: Size | None = None
    cpus: Annotated[float, Field(gt=0)] | None = None
    shm_size: Size = "1g"
    tmp_size: Size = "4g"
    pids: Annotated[int, Field(ge=64)] = 4096
    memlock: bool = False
    network: str = "bridge"
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.92
    environment: tuple[str, ...] = ("WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "HF_TOKEN")
    grace: Annotated[int, Field(ge=0, le=150)] = 150
    wait: Seconds = 0
    free_disk: Size = "20g"
    keep_images: Annotated[int, Field(ge=0)] = 7

    @property
    def runs_dir(self) -> Path:
        """Where run folders lie; a job's checkout is swept, so its runs lie outside of it.

        Raises UserError, as `cache_dir` does, where that is in a home that this user does not have.
        """
        if self.runs is not None:
            return user.expanded(self.runs)
        if os.environ.get("GITHUB_ACTIONS") == "true":
            data_home = user.expanded(os.environ.get("XDG_DATA_HOME") or "~/.local/share")
            return data_home / "mainrun" / "runs"
        return Path("runs")

    @property
    def cache_dir(self) -> Path:
        if self.cache is not None:
            return user.expanded(self.cache)
        return user.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mainrun"

    def folders(self) -> dict[str, Path]:
        """Where runs and caches lie, without what has no place."""
        found = {}
        for name in ("runs", "cache"):
            with contextlib.suppress(UserError):
                found[name] = self.runs_dir if name == "runs" else self.cache_dir
        return found

    @property
    def memory_bytes(self) -> int:
        """The limit of a job: without one the container could starve what watches over it."""
        if self.memory is not None:
            return num_bytes(self.memory)
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * 9 // 10


def load() -> Host:
    """This machine's settings. Raises UserError for a file that does not fit."""
    named = os.environ.get("MAINRUN_HOST_CONFIG")
    path = user.expanded(named) if named else SYSTEM_FILE
    if named is None and not path.exists():
        return Host()
    tree, origins = yaml12.read(path)
    return config.checked(Host, tree, origins)


def num_bytes(size: str) -> int:
    """`60g` in bytes. Raises ValueError for what is no size."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)b?", size.lower())
    if not found:
        raise ValueError(f"{size!r} is no size: write a number with k, m, g or t, such as 60g")
    return int(float(found[1]) * _UNITS[found[2]])
