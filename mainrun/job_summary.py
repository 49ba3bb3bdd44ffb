"""The page that a job leaves on GitHub: whether it worked, why not, what came of it, what to do.

Made from three things, any of which may be missing: the job's record (`out/job.json`), the run
folder as it lies on the machine, and the last lines of the log. All three are data, which nobody
has looked at before: whatever stands in them is shown and never read as markup.
"""

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from mainrun import summary
from mainrun.console import printable
from mainrun.environment import secret_values, without_secrets
from mainrun.errors import UserError, one_line
from mainrun.markdown import code, embedded, escaped, fenced, link, message, table
from mainrun.record import read_events
from mainrun.result import read_result, resume_command

# GitHub refuses a page of more than 1 MiB: with the bounds of markdown.py and summary.py these keep
# it below, whatever stands in the data.
_LOG_LINES = 20
_LINE_CHARACTERS = 500
_SWEEP_BYTES = 400_000
_MOST_INPUTS = 20

_WORDS = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "was stopped",
    "refused": "was not started",
    "out_of_memory": "ran out of memory",
    "killed": "was killed",
    "lost": "broke off",
}
_TASKS = {
    "train": "Training",
    "resume": "Training",
    "sweep": "Sweep",
    "evaluate": "Evaluation",
    "generate": "Generation",
}
_UNREADABLE = (UserError, OSError, AttributeError, KeyError, TypeError, ValueError)
"""What a damaged record may raise: the rest of the page is wanted all the more then."""

_ESCAPE_CODES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # colours, movements
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?"  # titles and links
    r"|\x1b[ -/]*[0-~]"
)
_RUN_PAGE = re.compile(r"(https?://[^/]+/[^/]+/[^/]+)/actions/runs/(\d+)")


@dataclass(frozen=True)
class _Run:
    """The run folder of a job, as far as it can be read."""

    called: str
    """`runs/NAME`, as the job knows it."""
    shown: Sequence[str]
    """Paragraphs of Markdown, with headings of the second order and below."""
    result: Mapping[str, Any] | None = None
    """Of a training; None also where the record is damaged."""
    checkpoint: int | None = None
    """Step of the newest complete checkpoint of a training."""

    @property
    def name(self) -> str:
        return PurePosixPath(self.called).name


def markdown(job: Mapping[str, Any], runs: Path | None, log_tail: Sequence[str]) -> str:
    """The page for a job, of less than 1 MiB.

    `runs` is the folder of run folders on this machine. Secrets of this process's environment are
    taken out.
    """
    secrets = secret_values()
    told: Mapping[str, Any] = without_secrets(job, secrets)
    run = _run(told, runs, secrets) if _began(told) else None
    facts = [fact for fact in _facts(told) if fact[1]]
    parts = [
        *_headline(told, run),
        table(facts[0], facts[1:]),
        *(run.shown if run else []),
        *_how_to_go_on(told, run),
        *_log(told, log_tail, secrets),
    ]
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------
# The run folder


def _run(job: Mapping[str, Any], runs: Path | None, secrets: Mapping[str, str]) -> _Run | None:
    """None where the job has made no folder."""
    if runs is None or not job.get("run"):
        return None
    folder = runs / PurePosixPath(job["run"]).name
    if not folder.is_dir():
        return None
    if job.get("task") == "sweep":
        return _Run(job["run"], _sweep_text(folder, secrets))
    heading, checkpoint = f"## {escaped(folder.name)}", _newest_checkpoint(folder)
    try:
        events = without_secrets(read_events(folder / "events.jsonl"), secrets)
        result = read_result(folder, events) | {"run_dir": job["run"]}
        if result["resume_command"] == resume_command(folder):
            result["resume_command"] = resume_command(Path(job["run"]))
        shown = [heading, *map(embedded, summary.details(result, events))]
        return _Run(job["run"], shown, result, checkpoint)
    except _UNREADABLE as error:
        # Where folders lie on the machine is nobody's concern.
        reason = one_line(error).replace(f"{folder}/", "")
        trouble = f"Its record cannot be read: {message(reason)}."
        return _Run(job["run"], [heading, trouble], checkpoint=checkpoint)


def _newest_checkpoint(folder: Path) -> int | None:
    """From the disk: a save is in the record before it is complete, and here only after."""
    try:
        names = [path.name for path in (folder / "checkpoints").iterdir()]
    except OSError:
        return None
    return max((int(name) for name in names if name.isdecimal()), default=None)


def _sweep_text(folder: Path, secrets: Mapping[str, str]) -> list[str]:
    """What the sweep has written of itself, heading and all."""
    try:
        data = (folder / "summary.md").read_bytes()
    except OSError:
        return [f"## {escaped(folder.name)}", "It came to no summary of its own."]
    text = str(without_secrets(data.decode("utf-8", "replace"), secrets))
    shown = text.encode()[:_SWEEP_BYTES].decode("utf-8", "ignore")
    cut = [] if shown == text else ["The rest is in `summary.md` of the artifact."]
    return [embedded(shown), *cut]


# ---------------------------------------------------------------------------------------------
# The parts of the page


def _headline(job: Mapping[str, Any], run: _Run | None) -> list[str]:
    ending = _ending(job)
    words = _WORDS.get(ending["kind"], "ended")
    if ending["kind"] == "failed" and not _began(job):
        words = _WORDS["refused"]
    title = f"# {_TASKS.get(job.get('task') or '', 'The job')} {words}"
    result = run.result if run else None
    loss = summary.loss_line(result) if result else []
    if ending["kind"] == "finished" and result:
        told = f"{summary.steps_done(result)} in {summary.duration(result['total_seconds'])}"
        return [title, f"**Done:** {told}.", *loss]
    parts = [title, f"**{message(_sentence(ending['sentence']))}**", *_progress(job, run)]
    in_vain = _began(job) and not _resumable(job, run) and "resume" in ending["remedy"]
    if ending["remedy"] and not in_vain:
        parts.append(f"**What to do:** {message(_sentence(ending['remedy']))}")
    return [*parts, *loss]


def _began(job: Mapping[str, Any]) -> bool:
    """Whether the task came to run: else a folder that it was to resume says nothing of the job."""
    return _ending(job)["kind"] != "refused" and job.get("step") not in (None, "check", "image")


def _resumable(job: Mapping[str, Any], run: _Run | None) -> bool:
    return run is not None and (run.checkpoint is not None or job.get("task") == "sweep")


def _progress(job: Mapping[str, Any], run: _Run | None) -> list[str]:
    """How far a training came, and how much of that is saved."""
    training = job.get("task") in ("train", "resume")
    if not training or not _began(job) or _ending(job)["kind"] == "finished":
        return []
    steps, came = 0, ""
    if run and run.result:
        steps = run.result["steps"]
        came = f"It came to step {summary.steps_done(run.result).removesuffix(' steps')}. "
    if run is None or run.checkpoint is None:
        return [f"{came}No checkpoint was saved yet: it begins anew when it is dispatched again."]
    if run.checkpoint >= steps > 0:
        return [f"{came}All of it is saved."]
    again = steps - run.checkpoint
    rest = f", so {_count(again, 'step')} will be done again" if again > 0 else ""
    return [f"{came}The newest complete checkpoint is that of step {run.checkpoint:,}{rest}."]


def _facts(job: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """The job; what was asked for, as it was typed; where and with what it ran."""
    inputs = {str(name): str(value) for name, value in (job.get("inputs") or {}).items()}
    gpus = job.get("gpus") or inputs.get("gpus")
    by = f"by {job['by']}" if job.get("by") else ""
    yield "job", escaped(", ".join(filter(None, (job.get("label"), by)))) or "not named yet"
    inputs = {
        name: value
        for name, value in inputs.items()
        if name not in ("task", "gpus") and value not in ("", "auto")
    }
    if not inputs:
        yield "command", escaped(shlex.join(_command(job)))
    for name, value in list(inputs.items())[:_MOST_INPUTS]:
        yield escaped(name.replace("_", " ")), escaped(value)
    yield "GPUs", escaped("none: on the CPU" if gpus == "none" else gpus)
    yield "commit", escaped(job.get("commit"))
    yield "image", escaped(job.get("image"))
    yield "time", _time(job)
    if job.get("run") and job.get("label"):
        yield "artifact", escaped(f"{_workflow(job)}-{job['label']}")


def _time(job: Mapping[str, Any]) -> str:
    try:
        started, ended = (
            datetime.fromisoformat(job[name]).astimezone(UTC) for name in ("started", "ended")
        )
    except (KeyError, TypeError, ValueError):
        return ""
    return (
        f"{summary.duration((ended - started).total_seconds())}, from {started:%Y-%m-%d %H:%M} UTC"
    )


def _how_to_go_on(job: Mapping[str, Any], run: _Run | None) -> list[str]:
    finished = _ending(job)["kind"] == "finished"
    if run is None or not (finished or _resumable(job, run)):
        return []
    if job.get("task") == "sweep":  # its own summary has the commands
        return [] if finished else [f"To go on, on GitHub: {_dispatch(job, run)}."]
    folder = shlex.quote(run.called)
    if finished:
        commands = [f"mainrun evaluate {folder}", f"mainrun generate {folder}"]
        return [
            "## To use it",
            _AT_A_TERMINAL,
            fenced("\n".join(map(printable, commands)), "sh"),
            f"To train it further, on GitHub: {_dispatch(job, run, longer=True)}.",
        ]
    command = (run.result or {}).get("resume_command") or f"mainrun resume {folder}"
    return [
        "## To go on",
        f"On GitHub: {_dispatch(job, run)}.",
        _AT_A_TERMINAL,
        fenced(printable(command), "sh"),
    ]


def _dispatch(job: Mapping[str, Any], run: _Run, *, longer: bool = False) -> str:
    """What to fill in on the GitHub page."""
    workflow = _workflow(job)
    page = _RUN_PAGE.fullmatch(job.get("url") or "")
    name = workflow.capitalize()
    where = link(f"{page[1]}/actions/workflows/{workflow}.yml", name) if page else f"**{name}**"
    fields = f"`resume` = {code(run.name)}"
    if longer:
        fields += " and more `training.epochs` or `training.max_steps` in `overrides`"
    other = ""
    if page:
        what = "run" if workflow == "train" else "sweep"
        other = (
            f"; when the {what} is no longer on the GPU machine, with "
            f"`resume_artifact` = `{page[2]}` in place of `resume`"
        )
    return f"dispatch {where} with {fields}{other}"


def _log(job: Mapping[str, Any], tail: Sequence[str], secrets: Mapping[str, str]) -> list[str]:
    lines = [_plain(line, secrets) for line in tail[-_LOG_LINES:]]
    if not lines:
        return []
    opened = "" if _ending(job)["kind"] in ("finished", "stopped") else " open"
    return [
        f"<details{opened}><summary>The last {_count(len(lines), 'line')} of the log</summary>",
        fenced("\n".join(lines)),
        "</details>",
    ]


# ---------------------------------------------------------------------------------------------
# Words


_AT_A_TERMINAL = (
    "At a terminal, in the folder that holds `runs` (on the GPU machine, or the unpacked artifact):"
)


def _ending(job: Mapping[str, Any]) -> dict[str, str]:
    ending = job.get("ending") or {}
    return {
        "kind": ending.get("kind") or "lost",
        "sentence": ending.get("sentence") or "it left no word of how it ended",
        "remedy": ending.get("remedy") or "",
    }


def _sentence(text: str) -> str:
    """With a capital, unless it begins with a setting or a path, and a full stop."""
    first = text.split(" ", 1)[0]
    start = text[:1].upper() + text[1:] if first.isalpha() else text
    return start if start.endswith((".", "!", "?")) else f"{start}."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _command(job: Mapping[str, Any]) -> list[str]:
    return ["mainrun", str(job.get("task")), *(job.get("words") or [])]


def _workflow(job: Mapping[str, Any]) -> str:
    return "sweep" if job.get("task") == "sweep" else "train"


def _plain(line: str, secrets: Mapping[str, str]) -> str:
    """A line of the log as a terminal would leave it standing, without colours and secrets."""
    text = _ESCAPE_CODES.sub("", line).rstrip("\r\n").rpartition("\r")[2].expandtabs()
    # Cut last: what is left of a secret could not be found any more.
    told = str(without_secrets(text, secrets))
    missing = len(told) - _LINE_CHARACTERS
    shown = printable(told[:_LINE_CHARACTERS])
    return shown if missing <= 0 else f"{shown}… ({missing:,} characters more)"
