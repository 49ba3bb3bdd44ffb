"""The sweep engine that needs no account: one trial after another, as the study says.

Each trial is trained as `mainrun train` does it, in a process of its own, and written down with
what it came to. A sweep that was stopped or killed goes on where it was: what finished is kept, and
the interrupted trial goes on from its newest checkpoint. This process never touches the GPU.
"""

import contextlib
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path

from mainrun import config
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.record import read_events
from mainrun.result import read_result
from mainrun.stop import StopSignal, listening
from mainrun.sweep import child, search_space, sweep_summary
from mainrun.sweep.child import MAINRUN, say
from mainrun.sweep.search_space import Metric, SearchSpace
from mainrun.sweep.study import Outcome, Study, Trial
from mainrun.sweep.sweep_folder import Sweep, go_on_command, outcome_of, tell
from mainrun.sweep.sweep_summary import Ending, Report

_FAILURES_IN_A_ROW = 3
_STOPPED_CODES = (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)


def work(sweep: Sweep, count: int | None) -> None:
    """Runs trials until there are `count`, or as many as were wanted before.

    Raises UserError, RunFailed or Stopped, each after the summary.
    """
    study = Study(sweep.folder / "study.journal", sweep.space, sweep.base.seed)
    with contextlib.closing(study), listening() as stopping:
        wanted = num_trials(sweep.space, count, study.wanted())
        study.want(wanted)
        say(_heading(sweep, wanted))
        try:
            _work(sweep, study, wanted, stopping)
        except Stopped:
            _report(sweep, study, "stopped", None)
            raise
        except RunFailed as error:
            _report(sweep, study, "failed", str(error))
            raise
        _report(sweep, study, "finished", None)


def num_trials(space: SearchSpace, count: int | None, before: int | None) -> int:
    """How many trials the sweep shall have. UserError where nobody says, or none can be had."""
    if "early_terminate" in space.others:
        raise UserError(
            "`early_terminate` is not supported yet without Weights & Biases: remove it"
        )
    if count is None and before is not None:
        return before
    limits = [count, space.run_cap]
    if space.method == "grid":
        limits.append(search_space.grid_size(space))
    known = [limit for limit in limits if limit is not None]
    if not known:
        raise UserError(
            f"how many trials? say --count N, or run_cap: N in the file; method {space.method} "
            "has no end"
        )
    return min(known)


def _work(sweep: Sweep, study: Study, wanted: int, stopping: StopSignal) -> None:
    """Trial after trial, the interrupted first. Raises Stopped, or RunFailed after failures."""
    failures = 0
    while _interrupted(trials := study.trials()) or len(trials) < wanted:
        stopping.check()
        trial = _interrupted(trials) or study.begin()
        outcome = _carry_out(sweep, trial, wanted, stopping)
        study.finish(trial, outcome)
        say(_told(sweep.space, study.trials(), trial.number, wanted, outcome))
        _report(sweep, study, "running", None)
        if outcome.status != "refused":  # which took no time, and says nothing about the next
            failures = failures + 1 if outcome.status == "failed" else 0
        if failures == _FAILURES_IN_A_ROW:
            raise RunFailed(f"{failures} trials in a row failed, the last: {outcome.reason}")
    last = study.trials()[-1]
    if sweep_summary.best(study.trials(), sweep.space.metric) is None:
        raise RunFailed(f"no trial came to an end, the last: {last.outcome.reason}")


def _interrupted(trials: Sequence[Trial]) -> Trial | None:
    return next((trial for trial in trials if trial.outcome.status == "running"), None)


def _carry_out(sweep: Sweep, trial: Trial, wanted: int, stopping: StopSignal) -> Outcome:
    """Trains, or goes on with, the trial in a process of its own. Raises Stopped."""
    values = search_space.as_overrides(trial.values)
    try:
        config.load(sweep.base_path(), values)
    except UserError as error:
        return Outcome("refused", reason=str(error).removesuffix(" (command line)"))
    run_dir = sweep.run_dir(trial)
    run_dir.parent.mkdir(exist_ok=True)
    log = run_dir.with_suffix(".log")
    with child.log(log, stopping) as output:
        for partial in run_dir.parent.glob(f".{run_dir.name}.*"):
            shutil.rmtree(partial, ignore_errors=True)  # of a process killed while making it
        resumed = run_dir.exists()
        if resumed and _is_finished(run_dir):
            return outcome_of(run_dir, sweep.space.metric)
        words = ["resume", str(run_dir)] if resumed else [
            "train", str(sweep.base_path()), *values, "--run-dir", str(run_dir)
        ]  # fmt: skip
        again = " (goes on)" if resumed else ""
        shown = sweep_summary.varied_text(trial, sweep.space)
        say(f"trial {trial.number}/{wanted}: {shown}{again}")
        code = child.follow([*MAINRUN, *words], output, stopping)
    return _outcome(code, run_dir, log, sweep.space.metric, stopping)


def _outcome(code: int, run_dir: Path, log: Path, metric: Metric, stopping: StopSignal) -> Outcome:
    """What the process came to. Raises Stopped where it ended because we asked it to."""
    if code == 0:
        return outcome_of(run_dir, metric)
    if stopping.requested() and code in _STOPPED_CODES:
        raise Stopped
    seconds = None
    with contextlib.suppress(UserError, RunFailed):
        seconds = outcome_of(run_dir, metric).seconds
    if code < 0:
        name = signal.Signals(-code).name
        hint = ": the machine may be out of memory" if name == "SIGKILL" else ""
        return Outcome("failed", seconds=seconds, reason=f"killed by {name}{hint}")
    if code == 75:
        return Outcome("failed", seconds=seconds, reason="somebody stopped this trial")
    return Outcome("failed", seconds=seconds, reason=_last_words(log) or f"exit code {code}")


def _is_finished(run_dir: Path) -> bool:
    path = run_dir / "events.jsonl"
    return path.is_file() and read_result(run_dir, read_events(path))["status"] == "finished"


def _last_words(log: Path) -> str:
    """The last line of the log, as `mainrun` ends with the reason."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    ours = [line for line in said if line.startswith("mainrun: ")]
    last = (ours or said or [""])[-1]
    return last.removeprefix("mainrun: ").removeprefix("failed: ")


def _report(sweep: Sweep, study: Study, status: Ending, reason: str | None) -> None:
    trials = study.trials()
    run_dirs = {t.number: sweep.run_dir(t) for t in trials}
    report = Report(
        folder=sweep.folder,
        space=sweep.space,
        status=status,
        reason=reason,
        trials=trials,
        wanted=study.wanted(),
        run_dirs={number: path for number, path in run_dirs.items() if path.is_dir()},
        resume_command=None if status == "finished" else go_on_command(sweep.folder),
    )
    tell(report, result=status != "running")


def _heading(sweep: Sweep, wanted: int) -> str:
    space = sweep.space
    size = f" of {search_space.grid_size(space)} points" if space.method == "grid" else ""
    return (
        f"{space.name}: {space.method}{size} over {len(space.varied())} settings, {wanted} trials, "
        f"{space.metric.goal} {space.metric.name}, in {sweep.folder}"
    )


def _told(
    space: SearchSpace, trials: Sequence[Trial], number: int, wanted: int, outcome: Outcome
) -> str:
    """`trial 3/10: model.dropout=0.1 → val/loss 1.23 ± 0.02 (best 1.2, trial 1)`."""
    trial = trials[number - 1]
    line = f"trial {number}/{wanted}: {sweep_summary.varied_text(trial, space)} → "
    if outcome.value is None:
        return f"{line}{outcome.status}: {outcome.reason}"
    winner = sweep_summary.best(trials, space.metric)
    assert winner is not None
    best = "the best so far" if winner is trial else (
        f"best {winner.outcome.value:.4g}, trial {winner.number}"
    )  # fmt: skip
    return f"{line}{space.metric.name} {sweep_summary.value_text(trial)} ({best})"
