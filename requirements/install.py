"""Makes `.venv` from the lock files, and does nothing when it already is what they say.

    python3 requirements/install.py train     cpu.txt, or cuda12.txt where nvidia-smi answers
    python3 requirements/install.py wheels    the same without mainrun itself: an image's big layer
    python3 requirements/install.py dev       as train, and dev.txt
    python3 requirements/install.py host      host.txt, in .venv-host: what starts containers needs
    python3 requirements/install.py oracle    oracle.txt, in .venv-torch

Any Python >= 3.8 starts it, with nothing installed; it finds the newest suitable one itself.
MAINRUN_DEVICE=cpu or cuda12 overrides what nvidia-smi says. uv installs where it is on PATH: the 97
packages of cpu.txt in 13 seconds, where pip takes 40 (two cores). Else pip does: one of the
environment's own, or, where Debian keeps ensurepip from Python, the one that stands beside it.

What is installed stands in a stamp inside the environment: its place, its Python, and the digest of
every file it was installed from. The stamp is removed before pip starts and written when all is
done, so an environment without one was interrupted, and is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, NoReturn

ROOT = Path(__file__).resolve().parent.parent

# Python 3.x, newest first: those for which every package in the lock has a wheel.
MINORS = [14, 13, 12, 11]
# PyTorch's plain build for 3.11 was at hand where this was written; elsewhere any will do.
ORACLE_MINORS = [11, 14, 13, 12]

PROBE = """
import json, sys, sysconfig, venv
from importlib.util import find_spec
assert sys.implementation.name == "cpython" and sys.version_info.releaselevel == "final"
assert not sysconfig.get_config_var("Py_GIL_DISABLED")  # another ABI, with few wheels
# Not that of an environment. The runner, since pip 22.3, is what installs into others.
pip = sys.prefix == sys.base_prefix and find_spec("pip") and find_spec("pip.__pip-runner__")
print(json.dumps([list(sys.version_info[:3]), getattr(sys, "_base_executable", sys.executable),
                  bool(find_spec("ensurepip")), bool(pip)]))
"""
PIP = ["-m", "pip", "--disable-pip-version-check", "--no-input"]
REPORT_SECONDS = 10  # between lines, where no terminal shows one that changes


def main() -> None:
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what not in ("train", "wheels", "dev", "host", "oracle"):
        stop("say what to install: train, wheels, dev, host or oracle")
    with open(__file__) as held:
        try:  # two tasks at once: the second finds the work done
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another task is at it; waiting for that")
            fcntl.flock(held, fcntl.LOCK_EX)
        if what == "oracle":
            install(ROOT / ".venv-torch", ["oracle.txt"], ORACLE_MINORS)
        elif what == "host":  # no JAX: seconds instead of minutes on a runner's fresh checkout
            install(ROOT / ".venv-host", ["host.txt", "pyproject.toml"], MINORS)
        else:
            locks = [f"{device()}.txt"] + ["dev.txt"] * (what == "dev")
            install(ROOT / ".venv", locks + ["pyproject.toml"] * (what != "wheels"), MINORS)


def device() -> str:
    """`cuda12` where an NVIDIA driver answers, else `cpu`."""
    asked = os.environ.get("MAINRUN_DEVICE", "")
    if asked not in ("", "cpu", "cuda12"):
        stop(f"MAINRUN_DEVICE={asked}: it is cpu or cuda12")
    return asked or ("cuda12" if output_of(["nvidia-smi", "-L"]) else "cpu")


def install(venv: Path, files: list[str], minors: list[int]) -> None:
    """Brings `venv` to what `files` say; returns at once when it is there."""
    wanted = {name: digest(name) for name in files}
    python = venv / "bin" / "python"
    base = {"place": str(venv), "python": version_of(python), "lock": files[0]}

    stamp = venv / "installed.json"
    found = json.loads(stamp.read_text()) if stamp.exists() else {}
    anew = any(found.get(key) != value for key, value in base.items())
    stale = [name for name in files if anew or found.get(name) != wanted[name]]
    if not stale:
        return

    stamp.unlink(missing_ok=True)
    if anew:
        version, interpreter, options = suitable_python(minors)
        say(f"making {venv.name} with Python {version} ({interpreter}): the first that runs of "
            + ", ".join(f"3.{minor}" for minor in minors))  # fmt: skip
        run([interpreter, "-m", "venv", "--clear", *options, str(venv)], venv.name, venv)
        base["python"] = version_of(python)
        found = {}
    command = installer(python)
    for name in stale:
        run([*command, *what_of(name)], name, venv)
    unfinished = stamp.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**found, **base, **wanted}, indent=1))
    unfinished.replace(stamp)


def installer(python: Path) -> list[str]:
    """What installs into the environment of `python`: a command that wants words like `what_of`'s.

    An environment's own pip comes before the one beside its Python, which may be years older.
    """
    uv = shutil.which("uv")
    if uv is not None:
        # Compiled, as pip does: else whoever may not write here compiles it at every start. 8 s.
        install = ["pip", "install", "--compile-bytecode", "--python", str(python)]
        return [uv, *without_cache(uv), *install]
    if python.with_name("pip").exists():
        return [str(python), *PIP, "install"]
    inside = probe(str(python))
    outside = inside and probe(inside[1])
    if not outside or not outside[3]:
        stop(f"neither uv nor a pip that installs into {python.parent.parent}: install one of them")
    return [outside[1], *PIP, "--python", str(python), "install"]


def without_cache(uv: str) -> list[str]:
    """An option for a machine without a home that can be written, where uv would stop."""
    cache = Path(output_of([uv, "cache", "dir"]) or "")
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return ["--no-cache"]
    return [] if os.access(cache, os.W_OK) else ["--no-cache"]


def what_of(name: str) -> list[str]:
    """pip's arguments for one of our files."""
    if name == "pyproject.toml":
        return ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    hashes = [] if name == "oracle.txt" else ["--require-hashes", "--only-binary=:all:"]
    return [*hashes, "-r", str(ROOT / "requirements" / name)]


def suitable_python(minors: list[int]) -> tuple[str, str, list[str]]:
    """Version and path of an interpreter of the first of 3.`minors` that has one which is fit, and
    what `venv` is to be asked for: no pip, where Debian's Python has no ensurepip, or uv installs.

    A file of the right name proves nothing: pyenv's shims stand on PATH for versions that are not
    selected. So each is asked.
    """
    uv = shutil.which("uv") is not None
    for minor in minors:
        answers = [probe(path) for path in candidates(minor)]
        fit = [
            (version, path, ensurepip)
            for version, path, ensurepip, pip in filter(None, answers)
            if version[:2] == [3, minor] and (uv or ensurepip or pip)
        ]
        if fit:
            version, path, ensurepip = max(fit)
            options = ["--without-pip"] if uv or not ensurepip else []
            return ".".join(map(str, version)), path, options
    stop(
        f"no Python 3.{min(minors)} to 3.{max(minors)} with venv, and pip or uv, on this machine "
        f"(this is {sys.version.split()[0]}); install one, on Debian: apt-get install python3-pip"
    )


def candidates(minor: int) -> list[str]:
    """Files that may be Python 3.`minor`: on PATH, pyenv's, uv's, and whatever runs this script."""
    home = Path(os.path.expanduser("~"))  # Path.home() raises where there is none
    pyenv = Path(os.environ.get("PYENV_ROOT") or home / ".pyenv")
    data = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    paths = [Path(folder) / f"python3.{minor}" for folder in os.get_exec_path()]
    paths += sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python"))
    paths += sorted(data.glob(f"uv/python/cpython-3.{minor}.*/bin/python3.{minor}"))
    paths += [Path(sys.executable)]
    return [str(path) for path in paths if os.access(path, os.X_OK)]


def probe(path: str) -> tuple[list[int], str, bool, bool] | None:
    """Of an interpreter that can make an environment: its version, its path outside any, whether it
    has ensurepip, and whether a pip that installs into other environments; else None."""
    answer = output_of([path, "-I", "-c", PROBE])
    if answer is None:
        return None
    version, interpreter, ensurepip, pip = json.loads(answer)
    return version, interpreter, ensurepip, pip


def version_of(python: Path) -> str | None:
    """What an environment's interpreter answers; None when it does not run."""
    return output_of([str(python), "-I", "-S", "-c", "import sys; print(sys.version.split()[0])"])


def output_of(command: list[str]) -> str | None:
    """What a command prints; None when there is no such command, it fails or it hangs."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              timeout=30, check=True)  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode().strip()


def run(command: list[str], what: str, venv: Path) -> None:
    """Runs it, saying how far it is; when it fails, shows its last lines and stops."""
    began = time.monotonic()
    live = sys.stderr.isatty()
    if not live:
        say(f"installing {what} ...")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = Output()
    reader = threading.Thread(target=output.read, args=(process.stdout,), daemon=True)
    reader.start()
    before = packages(venv)

    def progress() -> str:
        fetched = f", {output.megabytes:.0f} MB fetched" if output.megabytes else ""
        count = packages(venv) - before
        in_place = f", {count} package{'s' * (count > 1)} in place" if count > 0 else ""
        return f"{time.monotonic() - began:.0f} s{fetched}{in_place}"

    while reader.is_alive():
        reader.join(0.2 if live else REPORT_SECONDS)
        if live:
            line = f"setup: {what}: {progress()}, {output.latest}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{line[:width]}", end="", file=sys.stderr, flush=True)
        elif reader.is_alive():
            say(f"{what}: {progress()}")
    failed = process.wait()
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    if failed:
        print(*(f"    {line}" for line in output.lines[-15:]), sep="\n", file=sys.stderr)
        stop(
            f"{what} could not be installed: `{' '.join(command)}` ended with {failed}; the lines "
            "above say why; where no package index answers, HTTPS_PROXY, PIP_INDEX_URL (pip) or "
            "UV_DEFAULT_INDEX (uv) name the way to one",
            code=1,
        )
    say(f"installed {what} in {progress()}")


FETCHED = re.compile(r"(?:Downloading|Using cached) .*\((\d+(?:\.\d+)?) ?([kKMG])i?B\)")
MEGABYTES = {"k": 1e-3, "K": 1e-3, "M": 1.0, "G": 1e3}


class Output:
    """What pip or uv has said so far, and how many megabytes it spoke of."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.latest = "starting"
        self.megabytes = 0.0

    def read(self, stream: IO[bytes]) -> None:
        for raw in stream:
            line = raw.decode(errors="replace").strip()
            if line and not line.startswith("Ignoring"):
                self.lines.append(line)
                self.latest = self.latest if line.startswith("WARNING") else line
            size = FETCHED.match(line)
            if size:
                self.megabytes += float(size[1]) * MEGABYTES[size[2]]


def packages(venv: Path) -> int:
    """How many an environment holds."""
    return sum(1 for _ in venv.glob("lib/python3*/site-packages/*.dist-info"))


def digest(name: str) -> str:
    path = ROOT / name if name == "pyproject.toml" else ROOT / "requirements" / name
    return hashlib.sha256(path.read_bytes()).hexdigest()


def say(line: str) -> None:
    print(f"setup: {line}", file=sys.stderr, flush=True)


def stop(line: str, code: int = 2) -> NoReturn:
    say(line)
    page = os.environ.get("GITHUB_STEP_SUMMARY")
    if page:  # a workflow's job that is not set up has nobody else to tell why
        with open(page, "a", encoding="utf-8") as file:
            file.write(f"# Set-up failed\n\n    {line}\n\nThe log of this step says more.\n")
    sys.exit(code)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
