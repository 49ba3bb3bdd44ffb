"""A task that is to run in a container: what was asked for, and what the container may do.

`container_options` is a pure function of request and host, so what a job may touch can be read, and
is tested, in one place. Starting it is launch.py's.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from docker.types import DeviceRequest, LogConfig, Mount, Ulimit

from mainrun import containers, gpu, snapshot, user
from mainrun.errors import UserError
from mainrun.host import Host, num_bytes

TASKS = (
    "train", "resume", "sweep", "evaluate", "generate", "report", "config", "memory", "find-lr",
    "profile",
)  # fmt: skip


@dataclass(frozen=True)
class Request:
    """One task to be run: what, in which image, with which GPUs, for whom."""

    task: str
    words: tuple[str, ...]
    label: str
    image: str
    gpus: tuple[int, ...] = ()
    """Indices on this machine; none: the task runs on the CPU."""
    run: str = ""
    """Name of the run folder; empty where the task writes none."""
    url: str = ""
    by: str = ""

    def who(self) -> str:
        """The job in words, for those who wait for it."""
        return f"job {self.label} ({self.task}{f' by {self.by}' if self.by else ''})"


def request_here(task: str, words: Sequence[str], host: Host) -> Request:
    """The request of somebody at a terminal: named after the time, its run in `runs/`.

    Raises UserError for a run that this machine does not have.
    """
    if task not in TASKS:
        raise UserError(f"{task!r} is no task of a container: there are {', '.join(TASKS)}")
    label = f"{datetime.now():%Y%m%d-%H%M%S}"
    words = [part for word in words for part in _option_and_value(word)]
    run = ""
    match task:
        case "sweep" if words and snapshot.is_folder(host.runs_dir / Path(words[0]).name):
            run = Path(words[0]).name  # one that is gone on with
            words[0] = f"runs/{run}"
        case "train" | "sweep":
            stem = next((Path(word).stem for word in words if "=" not in word), "quickstart")
            words, run = _with_run_dir(words, default=f"{label}-{stem.lstrip('-')}")
        case "profile":
            words = _with_output(words, f"runs/{label}-profile")
        case "find-lr":
            words = _with_output(words, f"runs/{label}-find-lr.png")
        case "resume" | "evaluate" | "generate" | "report":
            run = Path(words[0]).name if words else ""
            if not run or not snapshot.is_folder(host.runs_dir / run):
                raise UserError(f"{task}: {run or 'no run'} is not in {host.runs_dir}")
            words[0] = f"runs/{run}"
            if task == "report" and len(words) > 1:  # else it stands in the run's folder
                words = _with_output(words, f"runs/{label}-report.html")
    return Request(
        task=task,
        words=tuple(words),
        label=label,
        image=host.image,
        gpus=chosen_gpus(host.gpus),
        run=run,
        by=user.name(),
    )


def chosen_gpus(asked: str) -> tuple[int, ...]:
    """The GPUs that `auto`, `all`, `none` or `0,1` mean on this machine. UserError for others."""
    if asked == "none":
        return ()
    there = gpu.gpu_indices()
    if asked == "auto":
        return there
    if asked == "all":
        if not there:
            raise UserError(
                "gpus=all, but no NVIDIA driver answers on this machine: `mainrun doctor` says "
                "why; gpus=none runs on the CPU"
            )
        return there
    indices = tuple(sorted({int(index) for index in asked.split(",")}))
    if there and not set(indices) <= set(there):
        raise UserError(f"gpus={asked}: this machine has {', '.join(map(str, there))}")
    return indices


def check_words(words: Sequence[str]) -> None:
    """UserError for what `task` would not hand on as it is: it fills templates in arguments."""
    for word in words:
        if "{{" in word:
            raise UserError(f"{word!r}: `{{{{` cannot be handed to a task: it is a template to it")


def container_options(
    request: Request, host: Host, *, passed: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """What Docker is asked for: nothing but a user's rights, and only these folders.

    Values in `passed` are secrets and stay out of it: they go through the container's stdin, since
    its environment can be read by `docker inspect`.
    """
    environment = {
        "HOME": "/tmp",
        "MAINRUN_CACHE_DIR": "/cache",
        "HF_HOME": "/cache/huggingface",
        "MAINRUN_GRACE_SECONDS": str(host.grace),
        "MAINRUN_GPUS": str(len(request.gpus)) if request.gpus else "none",
        # Never both: a GPU that cannot be used is an error, and no silent run on the CPU.
        "JAX_PLATFORMS": "cuda" if request.gpus else "cpu",
    }
    if request.gpus:
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(host.gpu_memory_fraction)
    if passed:
        environment["MAINRUN_SECRETS"] = "stdin"
    mounts = [
        Mount("/app/runs", str(host.runs_dir.resolve()), type="bind"),
        Mount("/cache", str(host.cache_dir.resolve()), type="bind"),
    ]
    if host.data is not None:
        data = user.expanded(host.data).resolve()
        mounts.append(Mount("/app/data", str(data), type="bind", read_only=True))
    # By index and not "all": a container sees the GPUs that it holds the locks of.
    devices = DeviceRequest(
        device_ids=[str(index) for index in request.gpus], capabilities=[["gpu"]]
    )
    return {
        "image": request.image,
        "command": ["task", "-x", request.task, "--", *request.words],
        "name": f"mainrun-{request.label}",
        "labels": {
            containers.JOB: request.label,
            containers.TASK: request.task,
            containers.GPUS: ",".join(map(str, request.gpus)),
            containers.RUN: request.run,
            containers.URL: request.url,
            containers.BY: request.by,
            containers.LOCKS: str(Path(host.locks).resolve()),
        },
        "environment": environment,
        "user": f"{os.getuid()}:{os.getgid()}",
        "init": True,
        "stdin_open": bool(passed),
        "read_only": True,
        "tmpfs": {"/tmp": f"rw,nosuid,nodev,mode=1777,size={num_bytes(host.tmp_size)}"},
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "mounts": mounts,
        "device_requests": [devices] if request.gpus else [],
        "mem_limit": host.memory_bytes,
        "memswap_limit": host.memory_bytes,  # no swap on top: it would hide the limit
        "nano_cpus": round(host.cpus * 1e9) if host.cpus else None,
        "shm_size": num_bytes(host.shm_size),
        "pids_limit": host.pids,
        "ulimits": [Ulimit(name="memlock", soft=-1, hard=-1)] if host.memlock else [],
        "network_mode": host.network,
        "log_config": LogConfig(type="local", config={"max-size": "20m", "max-file": "5"}),
    }


def _option_and_value(word: str) -> list[str]:
    """`--run-dir=DIR` as the two words that it is."""
    return word.split("=", 1) if word.startswith("--run-dir=") else [word]


def _with_output(words: list[str], default: str) -> list[str]:
    """The words with a place that a container may write to, where they name none."""
    named = any(word.partition("=")[0] == "--output" for word in words)
    return words if named else [*words, "--output", default]


def _with_run_dir(words: list[str], *, default: str) -> tuple[list[str], str]:
    """The words with a run folder under `runs/`, and its name."""
    if "--run-dir" not in words:
        return [*words, "--run-dir", f"runs/{default}"], default
    at = words.index("--run-dir") + 1
    run = Path(words[at]).name if at < len(words) else default
    return [*words[:at], f"runs/{run}", *words[at + 1 :]], run
