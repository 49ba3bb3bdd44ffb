"""Somebody who may write where the host reads: a planted key, and swaps at the worst moment."""

import contextlib
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

KEY = "-----BEGIN OPENSSH PRIVATE KEY----- planted-canary"


def planted_key(folder: Path) -> Path:
    """A file of the host's that must come to be nowhere else."""
    path = folder / "home" / ".ssh" / "id_ed25519"
    path.parent.mkdir(parents=True)
    path.write_text(KEY)
    return path


_swaps: list[tuple[str, Callable[[], None]]] = []


def _at_open(event: str, arguments: tuple) -> None:
    """Python calls it before each `open` and `flock` of the process: there swaps are made."""
    if _swaps and _swaps[0][0] == (arguments[0] if event == "open" else event):
        _, swap = _swaps.pop(0)
        swap()


@functools.cache
def watch_every_open() -> None:
    sys.addaudithook(_at_open)  # there is no way to take one out again


@contextlib.contextmanager
def swapping(name: str, swap: Callable[[], None], *, time: int = 1) -> Iterator[None]:
    """Inside, just before a path of this name is opened for the n-th time, something is done.

    With the name `fcntl.flock`, before any file is locked, which is open by then.
    """
    watch_every_open()
    _swaps.extend([(name, lambda: None)] * (time - 1) + [(name, swap)])
    try:
        yield
    finally:
        _swaps.clear()


def exchange(path: Path, other: Path) -> None:
    """`path` is what `other` was."""
    path.rename(path.with_name("moved away"))
    other.rename(path)


SWAPS = """
import os, sys
file, folder, key, link, away = sys.argv[1:]
print("ready", flush=True)
while True:
    os.symlink(key, link)
    os.replace(link, file)
    open(link, "w").write("{}\\n")
    os.replace(link, file)
    os.symlink(os.path.dirname(key), link)
    os.rename(folder, away)
    os.rename(link, folder)
    os.unlink(folder)
    os.rename(away, folder)
"""


@contextlib.contextmanager
def swapped_without_end(file: Path, folder: Path, key: Path) -> Iterator[None]:
    """Inside, a process makes them links to the key and its folder, and back, as fast as it can.

    A thread of ours would be too polite: measured with a copy that follows links, it won none of
    300 races, and a process 9.
    """
    places = [file, folder, key, file.parent.with_name("link"), file.parent.with_name("away")]
    command = [sys.executable, "-c", SWAPS, *map(str, places)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            process.kill()
