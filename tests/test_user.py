"""A user without a name or a home is served, or told so in one line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mainrun import user
from mainrun.errors import UserError

NOBODY = 54321  # no line of /etc/passwd


def as_nobody(imports: str, program: str) -> list[str]:
    """What the program says, run by a user without a name and without an environment.

    Imported first: the interpreter may lie in somebody's home.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    become = f"os.setgid({NOBODY}); os.setuid({NOBODY}); os.environ.clear()"
    command = [sys.executable, "-c", "\n".join(["import os", imports, become, program])]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_path_begins_at_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert user.expanded("~/runs/x") == Path("/home/me/runs/x")
    assert user.expanded("runs/~x") == Path("runs/~x")
    with pytest.raises(UserError, match=r"there is no such user: \./~no-such-user/x is"):
        user.expanded("~no-such-user/x")


def test_a_user_without_a_line_in_passwd_is_a_number_and_has_no_home() -> None:
    program = """
print(user.name())
try:
    user.expanded("~/x")
except user.UserError as error:
    print(error)
"""
    assert as_nobody("from mainrun import user", program) == [
        str(NOBODY),
        "~/x: this user has no home: set HOME, or write the whole path",
    ]


def test_doctor_says_what_a_user_without_a_home_lacks() -> None:
    examine = "doctor.table(doctor.examine(host.load()))"
    told = as_nobody(f"from mainrun import doctor, host\n{examine}", f"print({examine})")
    (line,) = [line for line in told if line.split()[:2] == ["problem", "home"]]
    assert "this user has none, for cache" in line


def test_a_job_is_by_the_number_of_a_user_without_a_name() -> None:
    program = "print(request.request_here('config', [], Host(gpus='none')).by)"
    imports = "from mainrun import request\nfrom mainrun.host import Host"
    assert as_nobody(imports, program) == [str(NOBODY)]


def test_a_user_without_a_home_is_told_how_to_have_a_cache() -> None:
    program = """
try:
    cache.folder()
except UserError as error:
    print(error)
"""
    imports = "from mainrun.data import cache\nfrom mainrun.errors import UserError"
    assert as_nobody(imports, program) == [
        "this user has no home: MAINRUN_CACHE_DIR names a folder for caches"
    ]
