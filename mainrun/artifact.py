"""A run folder on its way out to an artifact, and back from one to this machine's runs.

Both ways by a copy that follows no link (`snapshot`): what lies in a run folder was written in a
container, and so was what came in an artifact.
"""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from mainrun import dispatch, snapshot
from mainrun.console import printable
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


def bring_in(fetched: Path, runs: Path, *, say: Callable[[str], None]) -> str:
    """Name of the run or sweep that was fetched, now among the machine's runs.

    Attempts of one workflow run lie side by side; the last one knows the most. Raises UserError.
    """
    found = _fetched_runs(fetched)
    if not found:
        raise UserError("there is no artifact with a run folder: has it expired? (30 days)")
    newest = max(found, key=_attempt)
    name = newest.name
    if not dispatch.is_run_name(name):
        raise UserError(f"the artifact's run folder has a name that no run has: {name!r}")
    if os.path.lexists(runs / name):
        raise UserError(f"{name} is on this machine's disk already: dispatch it with resume={name}")
    try:
        runs.mkdir(parents=True, exist_ok=True)
        copy = snapshot.copy(fetched, str(newest.relative_to(fetched)), runs / name)
    except OSError as error:
        raise UserError(f"{runs / name}: cannot be written ({error.strerror})") from error
    if copy.num_left_out:
        say(f"of the artifact's {name}: {printable(copy.missing())}")
    return name


def _fetched_runs(fetched: Path) -> list[Path]:
    """`runs/NAME` of a lone artifact, `train-<id>-<attempt>/runs/NAME` of several.

    Links are not looked through; the step before has unpacked it all, and nobody writes here now.
    """
    artifacts = [fetched, *_folders(fetched)]
    return [run for artifact in artifacts for run in _folders(artifact / "runs") if _is_run(run)]


def _folders(place: Path) -> list[Path]:
    there = place.iterdir() if snapshot.is_folder(place) else ()
    return [path for path in there if snapshot.is_folder(path)]


def _is_run(path: Path) -> bool:
    """Whether it is the folder of a run, or of a sweep."""
    files = (("config.yaml", "tokenizer.json"), ("sweep.yaml", "base.yaml"))
    return any(all(snapshot.is_file(path / file) for file in needed) for needed in files)


def _attempt(path: Path) -> int:
    """Of the job that its artifact is of: `train-<id>-<attempt>/runs/<name>`; a lone one has 0."""
    found = re.search(r"-(\d+)$", path.parent.parent.name)
    return int(found[1]) if found else 0
