"""A run folder on its way out to an artifact, and back from one to this machine's runs.

Both ways by a copy that follows no link (`snapshot`): what lies in a run folder was written in a
container, and so was what came in an artifact.
"""

import os
import re
import shutil
from pathlib import Path

from mainrun import dispatch, snapshot
from mainrun.errors import UserError, one_line
from mainrun.snapshot import Bounds

_COPY_SECONDS = "30"  # after a cancel the workflow's step has a minute


def collect(runs: Path, run: str | None, out: Path) -> str:
    """Puts a copy of the run folder into `out/`, and says what it lacks; empty where that is none.

    `run` is `runs/NAME`, as the job knows it; None where it has made none.
    """
    if not run:
        return ""
    name = Path(run).name
    if not dispatch.is_run_name(name):
        return f"no run has such a name: {name!r}"
    target = out / "runs" / name
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    seconds = float(os.environ.get("MAINRUN_COPY_SECONDS") or _COPY_SECONDS)
    try:
        return snapshot.copy(runs, name, target, Bounds(seconds=seconds)).missing()
    except FileNotFoundError:  # the job came to none
        return ""
    except (UserError, OSError) as error:
        return f"the run folder could not be copied: {one_line(error)}"


def bring_in(fetched: Path, runs: Path) -> str:
    """Name of the run or sweep that was fetched, now among the machine's runs.

    Attempts of one workflow run lie side by side; the last one knows the most.
    """
    found = [path for path in fetched.glob("**/runs/*") if _is_run(path)]
    if not found:
        raise UserError("there is no artifact with a run folder: has it expired? (30 days)")
    newest = max(found, key=_attempt)
    name = newest.name
    if not dispatch.is_run_name(name):
        raise UserError(f"the artifact's run folder has a name that no run has: {name!r}")
    if (runs / name).exists():
        raise UserError(f"{name} is on this machine's disk already: dispatch it with resume={name}")
    runs.mkdir(parents=True, exist_ok=True)
    partial = runs / f".{name}.{os.getpid()}"
    try:
        shutil.copytree(newest, partial, ignore=_links)
        partial.rename(runs / name)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{runs / name}: cannot be written ({error.strerror})") from error
    return name


def _links(folder: str, names: list[str]) -> list[str]:
    """Symbolic links, which may point anywhere."""
    return [name for name in names if Path(folder, name).is_symlink()]


def _is_run(path: Path) -> bool:
    """Whether it is the folder of a run, or of a sweep."""
    files = (("config.yaml", "tokenizer.json"), ("sweep.yaml", "base.yaml"))
    return any(all((path / file).is_file() for file in needed) for needed in files)


def _attempt(path: Path) -> int:
    """Of the job that its artifact is of: `train-<id>-<attempt>/runs/<name>`; a lone one has 0."""
    found = re.search(r"-(\d+)$", path.parent.parent.name)
    return int(found[1]) if found else 0
