"""Whose process this is: a name and a home folder, neither of which it need have.

A container's or a service's user may have no line in /etc/passwd, and HOME may be unset.
"""

import getpass
import os
from pathlib import Path

from mainrun.errors import UserError


def name() -> str:
    """Of the user; the number where it has none."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def expanded(path: str) -> Path:
    """The path with the home folder that `~` stands for. UserError where there is none."""
    if (whole := os.path.expanduser(path)).startswith("~"):
        if path.partition("/")[0] == "~":
            raise UserError(f"{path}: this user has no home: set HOME, or write the whole path")
        raise UserError(f"{path}: there is no such user: ./{path} is a folder of that name here")
    return Path(whole)
