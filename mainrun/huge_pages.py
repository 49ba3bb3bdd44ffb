"""Large blocks of memory in pages of 2 MiB, on a CPU: glibc asks for them if told before it starts.

XLA:CPU takes a step's temporaries anew for each dispatch. The kernel hands them out page by page,
which in pages of 4 KiB costs up to as much as a small step itself (`training.backend`); what asks
for large ones is a tunable of glibc (2.35 and later) that only a process's first moment reads.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

_TUNABLES, _WANTED = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def ask() -> None:
    """Start this process anew, with the same words, where that brings large pages; else return."""
    if Path("/dev/nvidiactl").exists():
        return
    if (environment := requested(os.environ)) != os.environ:
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def requested(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment, asking for large pages where it says nothing of them and there are some."""
    before = environment.get(_TUNABLES, "")
    if _WANTED in before or not are_given():
        return dict(environment)
    return dict(environment) | {_TUNABLES: ":".join(filter(None, (before, f"{_WANTED}=1")))}


def are_given() -> bool:
    """Whether the kernel gives large pages to whoever asks."""
    try:
        return "[never]" not in _KERNEL.read_text()
    except OSError:
        return False
