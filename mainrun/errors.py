"""How a command can end other than well.

Three ways, and the command line knows no other: the user asked for something impossible, the user
asked to stop, or the run failed. Everything else that is raised is a defect of ours and keeps its
traceback.
"""

import contextlib
import errno
import os
import sys
from typing import NoReturn

_OF_THE_MACHINE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.EACCES,
    errno.EPERM, errno.EMFILE, errno.ENFILE,
)  # fmt: skip
"""What a disk or a right is to blame for."""


def one_line(error: BaseException) -> str:
    """What the error says, without line breaks, for a message of ours; its type if it is mute."""
    return " ".join(str(error).split()) or type(error).__name__


def named(error: BaseException) -> str:
    """`ValueError: what it says`, of an error not ours; its type alone if it is mute."""
    text = one_line(error)
    return text if text == type(error).__name__ else f"{type(error).__name__}: {text}"


def reason_of(error: "RunFailed | OSError") -> str | None:
    """Why a command failed. None for what the machine cannot be blamed for, a defect of ours."""
    if not isinstance(error, OSError):
        return str(error)
    if error.errno not in _OF_THE_MACHINE:
        return None
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror


def leave(code: int, last_line: str = "") -> NoReturn:
    """Ends this process at once; nothing is said behind the last line.

    Where a disk is full Orbax's writers go on to tell of it, from threads of C++, or wait for each
    other for ever, and an ordinary end of Python waits for them.
    """
    with contextlib.suppress(OSError):  # nobody listens any more
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        screen = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.write(screen, last_line.encode(errors="backslashreplace"))
    os._exit(code)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device's memory, or the machine's, has run out. XLA says it in words alone."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


class UserError(ValueError):
    """The user's mistake, found before any work: value, place, remedy in one line. Exit code 2."""


class RunFailed(RuntimeError):
    """The run cannot go on; the reason is the message and the last line printed. Exit code 1."""


class Stopped(Exception):
    """SIGINT or SIGTERM was obeyed: a complete checkpoint is saved. Exit code 75 (EX_TEMPFAIL)."""
