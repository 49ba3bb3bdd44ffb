"""The sweep engine that needs no account: a study in the folder, and a worker that trains.

This process asks for the trials and looks after the worker, which has JAX and the GPU; it never
touches them itself, so a worker that is killed takes one trial with it and not the sweep. A sweep
that was stopped or killed goes on where it was: what finished is kept, and what was interrupted
goes on from its newest checkpoint. The same command, given again elsewhere, works on the same
trials at the same time.
"""

import contextlib
import secrets
import signal
import sys
from datetime import datetime
from pathlib import Path

from mainrun import child
from mainrun.child import say
from mainrun.errors import RunFailed, Stopped, UserError
from mainrun.folder import is_finished
from mainrun.stop import StopSignal, listening
from mainrun.sweep import search_space, sweep_folder, sweep_summary
from mainrun.sweep.search_space import SearchSpace
from mainrun.sweep.study import Outcome, Study, Trial
from mainrun.sweep.sweep_folder import Sweep
from mainrun.tracking import write_views

WORKER = (
    sys.executable, "-P", "-c",
    "import sys; from mainrun.errors import leave; from mainrun.sweep.worker import main; "
    "leave(main(sys.argv[1:]))",
)  # fmt: skip

_STOPPED_CODES = (75, 130, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)


def work(sweep: Sweep, count: int | None, population: int | None = None) -> None:
    """Trains until there are `count` trials, or as many as were wanted before.

    `population` of them side by side; None: as many as gain by it. Raises UserError, RunFailed or
    Stopped, each after the summary.
    """
    study = Study(sweep.folder, sweep.space, sweep.base.seed)
    with contextlib.closing(study), listening() as stopping:
        wanted = num_trials(sweep.space, count, study.wanted())
        study.want(wanted)
        say(_heading(sweep, wanted))
        try:
            _supervise(sweep, study, population, stopping)
        except Stopped:
            sweep_folder.report(sweep, study, "stopped", None, result=True)
            raise
        except RunFailed as error:
            sweep_folder.report(sweep, study, "failed", str(error), result=True)
            raise
        sweep_folder.report(sweep, study, "finished", None, result=True)


def num_trials(space: SearchSpace, count: int | None, before: int | None) -> int:
    """How many trials the sweep shall have. UserError where nobody says, or none can be had."""
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


def _supervise(sweep: Sweep, study: Study, population: int | None, stopping: StopSignal) -> None:
    """A worker after the other, until one has done what was wanted. Raises Stopped or RunFailed."""
    since = datetime.now()
    with child.log(_log(sweep, study), stopping) as output:
        while True:
            stopping.check()
            name = secrets.token_hex(4)
            words = [str(sweep.folder), "--name", name, "--since", since.isoformat()]
            words += [] if population is None else ["--population", str(population)]
            code = child.follow([*WORKER, *words], output, stopping)
            if code == 0:
                break
            if code == 75 or (stopping.requested() and code in _STOPPED_CODES):
                raise Stopped
            left = study.left_by(name)
            if code == 1 or not left:
                raise RunFailed(_last_words(Path(output.name)) or f"the worker: exit code {code}")
            reason = _death(code)
            if len(left) > 1:
                say(f"{reason}: its {len(left)} trials go on one at a time")
                population = 1
            else:
                _bury(sweep, study, left[0], reason)
            study.check_failures(since)
    trials = study.trials()
    if sweep_summary.best(trials, sweep.space.metric) is None:
        raise RunFailed(f"no trial came to an end, the last: {trials[-1].outcome.reason}")


def _log(sweep: Sweep, study: Study) -> Path:
    """The file of our worker's words: one that nobody alive looks after.

    It may still be held by a worker whose supervisor was killed; that one is waited for.
    """
    number = next(n for n in range(1, 1000) if study.claims.take_supervision(n))
    return sweep.folder / ("worker.log" if number == 1 else f"worker-{number}.log")


def _bury(sweep: Sweep, study: Study, trial: Trial, reason: str) -> None:
    """Writes down that the worker died of this trial, unless the trial had come to its end."""
    run_dir = sweep.run_dir(trial)
    if is_finished(run_dir):
        write_views(run_dir)
        study.finish(trial, sweep_folder.outcome_of(run_dir, sweep.space.metric))
        return
    outcome = Outcome("failed", reason=reason)
    if (run_dir / "events.jsonl").is_file():
        outcome = sweep_folder.timed(outcome, run_dir)
    study.finish(trial, outcome)
    say(sweep_summary.told(sweep.space, study.trials(), trial.number, study.wanted(), outcome))


def _death(code: int) -> str:
    """How the worker ended, in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    hint = ": the machine may be out of memory" if name == "SIGKILL" else ""
    return f"killed by {name}{hint}"


def _last_words(log: Path) -> str:
    """The last line of the log, as `mainrun` ends with the reason."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    ours = [line for line in said if line.startswith("mainrun: ")]
    last = (ours or said or [""])[-1]
    return last.removeprefix("mainrun: ").removeprefix("failed: ")


def _heading(sweep: Sweep, wanted: int) -> str:
    space = sweep.space
    size = f" of {_grid_text(space)}" if space.method == "grid" else ""
    return (
        f"{space.name}: {space.method}{size} over {len(space.varied())} settings, {wanted} trials, "
        f"{space.metric.goal} {space.metric.name}, in {sweep.folder}"
    )


def _grid_text(space: SearchSpace) -> str:
    """`96 points (12 of them impossible: ...)`."""
    points = search_space.grid_size(space)
    looked_at = search_space.grid(space)
    text = f"{points:,} points"
    if looked_at is None or not looked_at.impossible:
        return text
    reason, _ = looked_at.impossible.most_common(1)[0]
    return f"{text} ({looked_at.impossible.total():,} of them impossible: {reason})"
