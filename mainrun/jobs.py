"""The steps of a workflow's job, each a call of `mainrun job STEP`, and the record they keep.

`out/job.json` says what the job is and how it ended, from its first step on: the summary, which
always runs, reads it also where nothing else ran. `out/` is all that is uploaded.
"""

import contextlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mainrun import artifact, dispatch, host, images, job_summary, launch, machine, machine_report
from mainrun.containers import connect
from mainrun.ending import Ending
from mainrun.environment import secret_values, without_secrets
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.host import Host, num_bytes
from mainrun.markdown import message
from mainrun.request import Request
from mainrun.stop import listening

_TAIL_BYTES = 2**20


def check() -> None:
    """Looks at the inputs and at the machine, before anything is built. Raises UserError."""
    with _step("check") as record:
        machine_settings = host.load()
        record.update(_told(dispatch.request_from(os.environ, machine_settings)))
        _check_disk(machine_settings)
        for stray in launch.reap(machine_settings, say=_say):
            _say(f"removed {stray.name}, whose job is gone")


def image() -> None:
    """Builds the job's image from the checkout. Raises UserError, RunFailed or Stopped."""
    with _step("image") as record:
        record["image"] = images.build(host.load(), context=Path.cwd(), say=_say)


def run() -> int:
    """Runs the job in its container; what comes back is the task's exit code."""
    with _step("run") as record:
        machine_settings = host.load()
        request = _with_artifact(dispatch.request_from(os.environ, machine_settings), record)
        record.update(_told(request))
        with listening(with_parent=True) as stopping, _log() as output:
            ending = launch.launch(request, machine_settings, stopping=stopping, output=output)
        record["ending"] = asdict(ending)
        if ending.kind != "finished":
            _annotate(f"{ending.sentence}; {ending.remedy}")
        return ending.exit_code


def stop() -> None:
    """Stops what the job has left running, and waits until it has saved."""
    with _step("stop", required=False) as record:
        for found, ending in launch.stop(host.load(), dispatch.label_from(os.environ), say=_say):
            if ending is not None:
                record["run"] = f"runs/{found.run}" if found.run else None
                record["ending"] = asdict(ending)


def summary() -> None:
    """Tells how the job ended, on its page, and puts its run folder beside `job.json`."""
    with _step("summary", required=False) as record:
        if record.get("ending") is None:
            record["ending"] = asdict(_without_a_last_word(record))
        record["ended"] = _now()
        missing = artifact.collect(host.load().runs_dir, record["run"], _folder())
        # From the copy alone: where the run lies, the next container may write already.
        runs, log = _folder() / "runs", _tail(_folder() / "job.log")
        _to_page(job_summary.markdown(record, runs, log, missing))


def status(*, reap: bool) -> bool:
    """The machine on the page and in `out/gpu-status.json`; whether it is healthy."""
    settings = host.load()
    if reap:
        launch.reap(settings, say=_say)
    found = machine.read(settings)
    _write(_folder() / "gpu-status.json", machine_report.as_dict(found))
    _to_page(machine_report.markdown(found))
    sys.stdout.write(machine_report.table(found) + "\n")
    return not found.problems


def update(*, rollback: bool) -> None:
    """Moves `mainrun:current`: to an image of this checkout, or back to the one before it.

    Raises UserError, RunFailed or Stopped, and then every name is where it was.
    """
    try:
        if rollback:
            lines = [images.rollback(connect())]
        else:
            with listening() as stopping:
                lines = images.update(host.load(), context=Path.cwd(), stopping=stopping, say=_say)
    except (UserError, RunFailed, Stopped) as error:
        sentence = _ending_of(error, "image").sentence
        _to_page(f"# Nothing was changed\n\n{message(sentence)}\n")
        _annotate(sentence)
        raise
    _to_page("# Image\n\n" + "".join(f"- {message(line)}\n" for line in lines))


# ---------------------------------------------------------------------------------------------
# The record


def _folder() -> Path:
    folder = Path(os.environ.get("MAINRUN_JOB_DIR") or "out")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def _step(name: str, *, required: bool = True) -> Iterator[dict[str, Any]]:
    """The job's record, written back however the step ends; a required one ends the job."""
    path = _folder() / "job.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else _new_record()
    if required:
        record["step"] = name
        _write(path, record)
    try:
        yield record
    except (UserError, RunFailed, Stopped) as error:
        ending = _ending_of(error, name)
        if required:
            record["ending"] = asdict(ending)
        _annotate(ending.sentence)
        raise
    finally:
        _write(path, record)


def _new_record() -> dict[str, Any]:
    return {
        "label": None, "task": os.environ.get("INPUT_TASK"), "words": [], "run": None,
        "image": None, "commit": os.environ.get("GITHUB_SHA"), "gpus": None, "url": "",
        "by": os.environ.get("GITHUB_ACTOR", ""), "inputs": _inputs(), "started": _now(),
        "ended": None, "step": None, "ending": None,
    }  # fmt: skip


def _inputs() -> dict[str, str]:
    """As they were typed, also those that are refused."""
    return {
        name.removeprefix("INPUT_").lower(): value
        for name, value in os.environ.items()
        if name.startswith("INPUT_") and value
    }


def _told(request: Request) -> dict[str, Any]:
    return {
        "label": request.label,
        "task": request.task,
        "words": list(request.words),
        "run": f"runs/{request.run}" if request.run else None,
        "image": request.image,
        "gpus": ",".join(map(str, request.gpus)) or "none",
        "url": request.url,
        "by": request.by,
    }


def _ending_of(error: UserError | RunFailed | Stopped, step: str) -> Ending:
    match error:
        case Stopped():
            during = "while the image was built" if step == "image" else "before it began"
            return Ending("stopped", 75, f"it was stopped {during}", "dispatch it again")
        case UserError():
            return Ending("refused", 2, str(error))
        case _:
            return Ending("failed", 1, str(error))


def _without_a_last_word(record: Mapping[str, Any]) -> Ending:
    """For a job whose steps were all ended from outside, or did not come to run."""
    match record["step"]:
        case None | "check":
            return Ending(
                "lost", 1, "it ended before its inputs were checked", "see the steps' log"
            )
        case "image":
            return Ending("lost", 1, "it ended while the image was built", "dispatch it again")
        case _:
            return Ending(
                "lost", 137, "it was ended from outside, and its container was gone",
                "resume it: at most the steps since its last checkpoint are lost",
            )  # fmt: skip


def _check_disk(settings: Host) -> None:
    wanted = num_bytes(settings.free_disk)
    folder = settings.runs_dir.resolve()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder}: {free / 2**30:.1f} GiB free, and a job wants {wanted / 2**30:.1f} "
            "(`free_disk` in the host's settings): remove old runs, or `mainrun image prune`"
        )


def _with_artifact(request: Request, record: Mapping[str, Any]) -> Request:
    """The request with the run that the step before it has fetched, if it was to fetch one."""
    inputs = dispatch.inputs_from(os.environ)
    if not inputs.artifact:
        return request
    name = artifact.bring_in(Path("in"), host.load().runs_dir, say=_say)
    return dispatch.named(request, inputs, name)


# ---------------------------------------------------------------------------------------------
# What people see


@contextlib.contextmanager
def _log() -> Iterator[Callable[[str], None]]:
    """Takes lines: to the step's log and to `out/job.log`.

    A line of a model's text may look like a command to the runner (`::add-mask::`): while the job
    speaks, the runner is told not to listen.
    """
    token = secrets.token_hex(16)
    _say(f"::stop-commands::{token}")
    try:
        with (_folder() / "job.log").open("a", encoding="utf-8") as file:

            def output(line: str) -> None:
                _say(line)
                file.write(f"{line}\n")
                file.flush()

            yield output
    finally:
        _say(f"::{token}::")


def _annotate(sentence: str) -> None:
    """The sentence on the job's page; an annotation is one line, with three characters escaped."""
    text = str(without_secrets(sentence, secret_values()))
    for character, escape in (("%", "%25"), ("\r", "%0D"), ("\n", "%0A")):
        text = text.replace(character, escape)
    _say(f"::error::{text}")


def _tail(log: Path) -> list[str]:
    """The last lines of the log, of which one may be endless."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            return file.read(_TAIL_BYTES).decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []


def _to_page(markdown: str) -> None:
    named = os.environ.get("GITHUB_STEP_SUMMARY")
    path = Path(named) if named else _folder() / "summary.md"
    with path.open("a", encoding="utf-8") as file:
        file.write(markdown)


def _write(path: Path, record: Mapping[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    plain = without_secrets(record, secret_values())
    partial.write_text(json.dumps(plain, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the runner is gone, and the job has to end well
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
