"""Locks that everybody on the machine respects: one file per GPU and one per job, held by `flock`.

The kernel lets go of a lock when its holder ends, however that happens. So a container whose job's
lock nobody holds is a stray: what started it is gone. The text in a lock's file says who holds it;
the file is removed with the lock.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mainrun.errors import UserError

_TRIES = 3  # somebody who only looks holds a lock for a moment
_PAUSE_SECONDS = 0.05
_POLL_SECONDS = 2.0


def gpu(index: int) -> str:
    """The lock of a GPU, by its index on this machine."""
    return f"gpu-{index}"


def job(label: str) -> str:
    """The lock of a job: held as long as somebody watches over its container."""
    return f"job-{label}"


@contextlib.contextmanager
def held(
    folder: Path,
    names: Sequence[str],
    *,
    who: str,
    wait_seconds: float = 0,
    waiting: Callable[[str], None] = lambda holder: None,
) -> Iterator[None]:
    """All of these locks, or none: UserError where one stays taken for longer than may be waited.

    `waiting` is called with the holder at every look in vain; it may raise, to give up.
    """
    _make(folder)
    deadline = time.monotonic() + wait_seconds
    while True:
        taken, missing = _take_all(folder, sorted(names), who)
        if missing is None:
            break
        holder = f"{missing} is in use by {_holder(folder / missing)}"
        if time.monotonic() >= deadline:
            raise UserError(f"{holder}: wait for it (--wait SECONDS), or choose other --gpus")
        waiting(holder)
        time.sleep(min(_POLL_SECONDS, max(deadline - time.monotonic(), 0)))
    try:
        yield
    finally:
        _release(taken)


def is_held(folder: Path, name: str) -> bool:
    """Whether a living process holds the lock."""
    try:
        descriptor = os.open(folder / name, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def forget(folder: Path, name: str) -> None:
    """Removes the file of a lock whose holder was killed; one that is held stays."""
    if (folder / name).exists():
        with contextlib.suppress(UserError), held(folder, [name], who=""):
            pass


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if folder.stat().st_uid == os.getuid():
            folder.chmod(0o1777)  # the runner's user and a person at a terminal both lock here
    except OSError as error:
        raise UserError(
            f"{folder}: the folder of locks cannot be made ({error.strerror}); "
            "name another as `locks` in the host's settings"
        ) from error


def _take_all(folder: Path, names: Sequence[str], who: str) -> tuple[dict[Path, int], str | None]:
    """The locks as file descriptors, or none and the name of one that is taken."""
    taken: dict[Path, int] = {}
    for name in names:
        descriptor = _take(folder / name, who)
        if descriptor is None:
            _release(taken)
            return {}, name
        taken[folder / name] = descriptor
    return taken, None


def _take(path: Path, who: str) -> int | None:
    tries = 0
    while tries < _TRIES:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            tries += 1
            time.sleep(_PAUSE_SECONDS)
            continue
        if _is_still(path, descriptor):
            with contextlib.suppress(OSError):  # a file of another user's, who is gone
                os.ftruncate(descriptor, 0)
                os.write(descriptor, who.encode())
            return descriptor
        os.close(descriptor)  # its holder removed the file between opening and locking
    return None


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError:
        try:
            return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except OSError as error:
            raise UserError(f"{path}: the lock cannot be opened ({error.strerror})") from error


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _release(taken: dict[Path, int]) -> None:
    for path, descriptor in taken.items():
        with contextlib.suppress(OSError):
            path.unlink()  # before letting go: whoever comes next makes a new one
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip() or "another job"
    except OSError:
        return "another job"
