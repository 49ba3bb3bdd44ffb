"""Makes `.venv` from the lock files, and does nothing when it already is what they say.

    python3 requirements/install.py train     cpu.txt, or cuda12.txt where nvidia-smi answers
    python3 requirements/install.py wheels    the same without mainrun itself: an image's big layer
    python3 requirements/install.py dev       as train, and dev.txt
    python3 requirements/install.py host      host.txt, in .venv-host: what starts containers needs
    python3 requirements/install.py oracle    oracle.txt, in .venv-torch

Any Python >= 3.8 starts it, with nothing installed; it finds the newest suitable one itself.
MAINRUN_DEVICE=cpu or cuda12 overrides what nvidia-smi says.

What is installed stands in a stamp inside the environment: its place, its Python, and the digest of
every file it was installed from. The stamp is removed before pip starts and written when all is
done, so an environment without one was interrupted, and is made anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent

# Python 3.x, newest first: those for which every package in the lock has a wheel.
MINORS = [14, 13, 12, 11]
# PyTorch's plain build for 3.11 was at hand where this was written; elsewhere any will do.
ORACLE_MINORS = [11, 14, 13, 12]

PROBE = """
import json, sys, sysconfig, venv, ensurepip
assert sys.implementation.name == "cpython" and sys.version_info.releaselevel == "final"
assert not sysconfig.get_config_var("Py_GIL_DISABLED")  # another ABI, with few wheels
print(json.dumps([list(sys.version_info[:3]), getattr(sys, "_base_executable", sys.executable)]))
"""


def main() -> None:
    what = sys.argv[1] if len(sys.argv) == 2 else ""
    if what not in ("train", "wheels", "dev", "host", "oracle"):
        stop("say what to install: train, wheels, dev, host or oracle")
    with open(__file__) as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two tasks at once: the second finds the work done
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
        version, interpreter = suitable_python(minors)
        say(f"making {venv.name} with Python {version} ({interpreter}): the first that runs of "
            + ", ".join(f"3.{minor}" for minor in minors))  # fmt: skip
        run([interpreter, "-m", "venv", "--clear", str(venv)], venv.name)
        base["python"] = version_of(python)
        found = {}
    for name in stale:
        run([str(python), "-m", "pip", "--disable-pip-version-check", "--no-input", "install",
             *what_of(name)], name)  # fmt: skip
    unfinished = stamp.with_suffix(".tmp")
    unfinished.write_text(json.dumps({**found, **base, **wanted}, indent=1))
    unfinished.replace(stamp)


def what_of(name: str) -> list[str]:
    """pip's arguments for one of our files."""
    if name == "pyproject.toml":
        return ["--no-deps", "--no-build-isolation", "-e", str(ROOT)]
    hashes = [] if name == "oracle.txt" else ["--require-hashes", "--only-binary=:all:"]
    return [*hashes, "-r", str(ROOT / "requirements" / name)]


def suitable_python(minors: list[int]) -> tuple[str, str]:
    """Version and path of an interpreter of the first of 3.`minors` that has one which runs.

    A file of the right name proves nothing: pyenv's shims stand on PATH for versions that are not
    selected, and Debian's Python may lack ensurepip. So each is asked.
    """
    for minor in minors:
        answers = [probe(path) for path in candidates(minor)]
        fit = [answer for answer in answers if answer is not None and answer[0][:2] == [3, minor]]
        if fit:
            version, path = max(fit)
            return ".".join(map(str, version)), path
    stop(
        f"no Python 3.{min(minors)} to 3.{max(minors)} with venv and ensurepip on this machine "
        f"(this is {sys.version.split()[0]}); install one, on Debian: apt-get install python3-venv"
    )


def candidates(minor: int) -> list[str]:
    """Files that may be Python 3.`minor`: on PATH, pyenv's, uv's, and whatever runs this script."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    paths = [Path(folder) / f"python3.{minor}" for folder in os.get_exec_path()]
    paths += sorted(pyenv.glob(f"versions/3.{minor}.*/bin/python"))
    paths += sorted(data.glob(f"uv/python/cpython-3.{minor}.*/bin/python3.{minor}"))
    paths += [Path(sys.executable)]
    return [str(path) for path in paths if os.access(path, os.X_OK)]


def probe(path: str) -> tuple[list[int], str] | None:
    """Version, and path outside any environment, of an interpreter that can make one; else None."""
    answer = output_of([path, "-I", "-c", PROBE])
    if answer is None:
        return None
    version, interpreter = json.loads(answer)
    return version, interpreter


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


def run(command: list[str], what: str) -> None:
    """Runs it behind one progress line; when it fails, shows its last lines and stops."""
    began = time.monotonic()
    live = sys.stderr.isatty()
    if not live:
        say(f"installing {what} ...")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    lines = []
    for raw in process.stdout:
        line = raw.decode(errors="replace").strip()
        if line and not line.startswith(("WARNING", "Ignoring")):
            lines.append(line)
        if live and lines:
            progress = f"setup: {what}: {time.monotonic() - began:.0f} s, {lines[-1]}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{progress[:width]}", end="", file=sys.stderr, flush=True)
    failed = process.wait()
    if live:
        print("\r\033[K", end="", file=sys.stderr)
    if failed:
        print(*(f"    {line}" for line in lines[-15:]), sep="\n", file=sys.stderr)
        stop(f"{what} could not be installed: `{' '.join(command)}` ended with {failed}", code=1)
    say(f"installed {what} in {time.monotonic() - began:.0f} s")


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
