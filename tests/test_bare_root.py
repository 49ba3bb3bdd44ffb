"""The README's first commands, typed by a newcomer on a Debian 12 that has Python, pip and git.

That Debian forbids `pip install` outside an environment, and its `venv` has no ensurepip.
"""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = [pytest.mark.docker, pytest.mark.timeout(1200)]

SCRIPT = Path(__file__).with_name("bare_root.sh")
COMMANDS = ["./task train -- training.max_steps=20", "./task -x test -- tests/test_config.py"]


def test_first_commands_work_on_debian_12_and_change_nothing_outside_the_checkout():
    if not Path("/usr/sbin/debootstrap").exists():
        pytest.skip("no debootstrap: apt-get install debootstrap")
    as_root = [] if os.getuid() == 0 else ["sudo", "-n"]
    command = [*as_root, str(SCRIPT), "bookworm", "user", "pip", *COMMANDS]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout)
    assert done.returncode == 0
    assert "nothing changed, and every command ended with 0" in done.stdout
