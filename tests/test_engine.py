"""`tests/engine.sh` takes Debian's image from Debian, whatever the machine is, and fails aloud.

apt-get itself reads the lists of a made machine; what it would install, debootstrap and docker are
stand-ins.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("engine.sh")
CI = SCRIPT.parent.parent / ".ci" / "run"

pytestmark = pytest.mark.medium

DEBIAN = [("http://mirror.example/debian", "Debian", "Debian"),
          ("http://mirror.example/debian-security", "Debian", "Debian-Security")]  # fmt: skip
UBUNTU = [("http://archive.example/ubuntu", "Ubuntu", "Ubuntu")]
DOCKER = [("http://third.example/linux/debian", "Docker", "Docker CE")]

STAND_INS = {
    "apt-get": '[ "$1" = indextargets ] && exec {apt_get} "$@"; echo "apt-get $*" >>{called}',
    "debootstrap": 'echo "debootstrap $*" >>{called}\n'
                   'for root; do case $root in /tmp*) mkdir -p "$root/etc/ssl/certs";; esac; done',
    "docker": 'case $1 in image) exit 1;; import) cat >{image};; esac',
    "sudo": 'shift; exec "$@"',
}  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path):
    """Runs the script where these are the repositories: what it called, and its exit code."""
    apt_get = shutil.which("apt-get")
    if apt_get is None:
        pytest.skip("this is neither Debian nor Ubuntu")
    called = tmp_path / "called"

    def run(repositories: list[tuple[str, str, str]], **stand_ins: str) -> tuple[str, int]:
        lists = tmp_path / "lists"
        (lists / "partial").mkdir(parents=True)
        for address, origin, label in repositories:
            name = address.removeprefix("http://").replace("/", "_") + "_dists_stable_"
            release = f"Origin: {origin}\nLabel: {label}\nCodename: stable\nComponents: main\n"
            (lists / f"{name}Release").write_text(release)
            (lists / f"{name}main_binary-amd64_Packages").touch()
        sources = "".join(f"deb [arch=amd64] {a} stable main\n" for a, _, _ in repositories)
        (tmp_path / "sources.list").write_text(sources)
        (tmp_path / "apt.conf").write_text(
            f'Dir::State::lists "{lists}";\nDir::Etc::sourcelist "{tmp_path}/sources.list";\n'
            f'Dir::Etc::sourceparts "/dev/null";\nDir::Cache "{tmp_path}/cache";\n'
        )
        for name, text in {**STAND_INS, **stand_ins}.items():
            path = tmp_path / "bin" / name
            path.parent.mkdir(exist_ok=True)
            text = text.replace("{apt_get}", apt_get).replace("{called}", str(called))
            path.write_text("#!/bin/sh\n" + text.replace("{image}", str(tmp_path / "image")))
            path.chmod(0o755)
        done = subprocess.run(
            [SCRIPT], capture_output=True, text=True,
            env={**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "TMPDIR": "/tmp",
                 "APT_CONFIG": str(tmp_path / "apt.conf")},
        )  # fmt: skip
        return called.read_text(), done.returncode

    return run


def test_scripts_are_clean():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    scripts = [SCRIPT, CI]
    done = subprocess.run(
        [shellcheck, "--severity=style", *scripts], capture_output=True, text=True
    )
    assert done.stdout == ""
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("repositories", "mirror"),
    [
        ([*DOCKER, *reversed(DEBIAN)], "http://mirror.example/debian/"),
        ([*DOCKER, *UBUNTU], "http://deb.debian.org/debian"),
        ([], "http://deb.debian.org/debian"),
    ],
    ids=["Debian", "Ubuntu", "no lists"],
)
def test_the_image_is_made_of_what_debian_signed(machine, tmp_path, repositories, mirror):
    called, code = machine(repositories)
    assert code == 0
    *_, install, made = called.splitlines()
    assert install == "apt-get install -y -qq debootstrap debian-archive-keyring"
    assert "--force-check-gpg --keyring=/usr/share/keyrings/debian-archive-keyring.gpg " in made
    assert " trixie /tmp/" in made
    assert made.endswith(f" {mirror}")
    assert (tmp_path / "image").stat().st_size > 0


@pytest.mark.parametrize(
    "stand_in",
    [
        {"debootstrap": "echo 404 >>{called}; exit 1"},
        {"docker": 'case $1 in image) exit 1;; import) cat >/dev/null; exit 1;; esac'},
        {"apt-get": "echo none >>{called}; exit 100"},
    ],
    ids=lambda stand_in: next(iter(stand_in)),
)  # fmt: skip
def test_what_fails_is_no_success(machine, stand_in):
    _, code = machine(DEBIAN, **stand_in)
    assert code != 0
