"""A copy of a folder that somebody else may be changing, made without following a link.

Run folders lie where containers write. Whatever a container can write it can replace, between two
looks of ours, by a link to a file of this machine; read or published by its path, that file would
be the host's. So the way down goes by handles: each folder is opened from the one above it, each
file from its folder, never through a link, and only what is a regular file once it is open is read.
The copy is made of files of its own, which nobody else can write; whatever the host reads of a run,
it reads there.

A hard link is copied as the file that it is: a container makes one only within one mount, of what
it may read and write anyway. For the same reason there is none between the original and the copy.
"""

import contextlib
import itertools
import math
import os
import secrets
import shutil
import stat
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mainrun.errors import UserError

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# A fifo that has taken a file's place is not waited for.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE = 2**20
_NAMED = 5  # of what is left out
_LONGEST_PATH = 1000  # bytes below the folder: programs that go by paths end at 4096
_REFUSED_BY_UPLOADS = set('"*:<>?|\\')  # a single one of them fails GitHub's upload of everything


@dataclass(frozen=True)
class Bounds:
    """What a copy takes at most; a sparse file counts as long as it says it is."""

    file_bytes: int = 2**33  # the files of a checkpoint end near 2 GiB
    all_bytes: int = 2**36
    entries: int = 200_000
    depth: int = 24
    seconds: float = math.inf


@dataclass
class Copy:
    num_left_out: int = 0
    left_out: list[str] = field(default_factory=list)
    """The first of them as `path (reason)`: data, with whatever a name may hold."""

    def leave(self, path: str, reason: str) -> None:
        self.num_left_out += 1
        if len(self.left_out) < _NAMED:
            self.left_out.append(f"{path} ({reason})")

    def missing(self) -> str:
        """What is left out, as a sentence; empty where nothing is."""
        if not self.num_left_out:
            return ""
        noun = "file is" if self.num_left_out == 1 else "files are"
        more = ", …" if self.num_left_out > len(self.left_out) else ""
        return f"{self.num_left_out:,} {noun} left out: {', '.join(self.left_out)}{more}"


class _LeftOut(Exception):
    """The reason why one file or folder is not copied."""


def is_folder(path: Path) -> bool:
    """Whether it is a folder, and no link to one; the path above it is the caller's to trust."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Whether it is a regular file, and no link to one."""
    return stat.S_ISREG(_mode(path))


def copy(root: Path, below: str, target: Path, bounds: Bounds | None = None) -> Copy:
    """Makes the folder `below` of `root` anew as `target`; what comes back says what is missing.

    Folders nearer the top come first, so a bound leaves out what lies deep. Others may write below
    `root` and beside `target`. Raises FileNotFoundError where there is no such folder, UserError
    where it is a link, OSError where the copy cannot be written; then there is none.
    """
    bounds = bounds or Bounds()
    parts = PurePosixPath(below).parts
    if not parts or not set(parts).isdisjoint(("/", "..")):
        raise UserError(f"{below!r} is no name of a folder")
    partial = f".{target.name}.{secrets.token_hex(8)}"
    with _closed(_reached(root)) as top, _closed(_reached(target.parent)) as beside:
        try:
            source = _reached(top, parts)
        except FileNotFoundError:
            raise
        except OSError:
            raise UserError(f"{below} is a link, or no folder: nothing of it is read") from None
        with _closed(source):
            os.mkdir(partial, dir_fd=beside)
            try:
                with _closed(_reached(beside, [partial])) as into:
                    result = _copied(source, into, bounds)
                os.rename(partial, target.name, src_dir_fd=beside, dst_dir_fd=beside)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True, dir_fd=beside)
                raise
    return result


def _copied(source: int, into: int, bounds: Bounds) -> Copy:
    result = Copy()
    until = time.monotonic() + bounds.seconds
    room_bytes = min(bounds.all_bytes, shutil.disk_usage(into).free // 2)
    entries = bounds.entries
    waiting: deque[tuple[str, ...]] = deque([()])
    while waiting:
        place = waiting.popleft()
        try:
            with _reading():
                here = _reached(source, place)
        except _LeftOut as reason:
            result.leave("/".join(place), str(reason))
            continue
        with _closed(here), _closed(_reached(into, place)) as there:
            with os.scandir(here) as found:
                names = [entry.name for entry in itertools.islice(found, entries + 1)]
            if len(names) > entries:
                names.pop()
                result.leave("/".join([*place, "…"]), "too many files")
            entries -= len(names)
            for name in sorted(names):
                path = "/".join([*place, name])
                try:
                    if _is_folder(here, name, path, bounds):
                        os.mkdir(name, dir_fd=there)
                        waiting.append((*place, name))
                    else:
                        most = min(bounds.file_bytes, room_bytes)
                        room_bytes -= _copy_file(here, there, name, most, until)
                except _LeftOut as reason:
                    result.leave(path, str(reason))
    return result


def _is_folder(here: int, name: str, path: str, bounds: Bounds) -> bool:
    """Whether to go down into it; False for a regular file, and nothing else is copied."""
    if not name.isprintable() or not _REFUSED_BY_UPLOADS.isdisjoint(name):
        raise _LeftOut("its name")
    if len(os.fsencode(path)) > _LONGEST_PATH or path.count("/") > bounds.depth:
        raise _LeftOut("too deep")
    with _reading():
        mode = os.stat(name, dir_fd=here, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        raise _LeftOut("a link")
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):  # to open a device may do something
        raise _LeftOut("neither a file nor a folder")
    return stat.S_ISDIR(mode)


def _copy_file(here: int, there: int, name: str, most_bytes: int, until: float) -> int:
    """Bytes copied: as many as it had when it was opened, or fewer if it has become shorter."""
    with _reading():
        handle = os.open(name, _FILE, dir_fd=here)
    with _closed(handle):
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):  # it was, a moment ago
            raise _LeftOut("neither a file nor a folder")
        if status.st_size > most_bytes:
            raise _LeftOut(f"{status.st_size / 2**30:.1f} GiB, and there is no room for it")
        with open(os.open(name, _NEW, 0o644, dir_fd=there), "wb") as new:
            try:
                new.writelines(_pieces(handle, status.st_size, until))
            except _LeftOut:
                os.unlink(name, dir_fd=there)
                raise
    return status.st_size


def _pieces(handle: int, size: int, until: float) -> Iterator[bytes]:
    while size > 0:
        if time.monotonic() > until:
            raise _LeftOut("no time was left")
        with _reading():
            data = os.read(handle, min(size, _PIECE))
        if not data:
            return
        yield data
        size -= len(data)


def _reached(start: Path | int, parts: Sequence[str] = ()) -> int:
    """A new handle of the folder at that place below another, reached through no link.

    `start` alone may be one, where whoever keeps the machine has made it.
    """
    if isinstance(start, Path):
        handle = os.open(start, _FOLDER & ~os.O_NOFOLLOW)
    else:
        handle = os.open(".", _FOLDER, dir_fd=start)
    for name in parts:
        with _closed(handle):
            handle = os.open(name, _FOLDER, dir_fd=handle)
    return handle


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """The original's errors, and not those of the copy."""
    try:
        yield
    except OSError as error:
        raise _LeftOut(error.strerror or "cannot be read") from None


@contextlib.contextmanager
def _closed(handle: int) -> Iterator[int]:
    try:
        yield handle
    finally:
        os.close(handle)


def _mode(path: Path) -> int:
    try:
        return path.lstat().st_mode
    except (OSError, ValueError):  # a name with a null character
        return 0
