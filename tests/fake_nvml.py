"""A stand-in NVIDIA driver: a shared library in C, which pynvml finds as it finds the real one.

What it plays is said by environment variables; see fake_nvml.c.
"""

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")


def build(folder: Path, *flags: str) -> Path:
    """The folder that holds libnvidia-ml.so.1, for LD_LIBRARY_PATH. Skips without a C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler to make the stand-in driver with")
    library = folder / "libnvidia-ml.so.1"
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, *flags], check=True)
    return folder


def environment(folder: Path, plays: str, **more: object) -> Mapping[str, str]:
    """This process's environment with that driver in it."""
    settings = {"LD_LIBRARY_PATH": str(folder), "FAKE_NVML": plays}
    return {**os.environ, **settings, **{name: str(value) for name, value in more.items()}}
