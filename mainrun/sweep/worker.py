"""The process that trains the trials of a sweep: one after another, or many side by side.

It draws trials from the study and trains them as `mainrun train` does, each in a run folder of its
own, but in one process: what trials have alike is read and compiled once. Those that can share a
step go side by side where that is asked for or pays. What a trial came to is written down before
the next begins; a trial that goes wrong ends, and the others go on.
"""

import argparse
import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from mainrun import config, errors, folder
from mainrun.child import say
from mainrun.config import Config
from mainrun.errors import RunFailed, Stopped, UserError, named, one_line
from mainrun.opening import Prepared, prepare, prepare_to_resume, read_texts
from mainrun.parts import Texts
from mainrun.population import Choice, Group, Running
from mainrun.stop import StopSignal, listening
from mainrun.sweep import search_space, sweep_folder, sweep_summary
from mainrun.sweep.study import Outcome, Study, Trial
from mainrun.sweep.sweep_folder import Sweep, load
from mainrun.tracking import write_views
from mainrun.training.mesh import ONE

_KEPT_GROUPS = 8  # compiled steps that no trial uses just now
_KEPT_TEXTS = 4
_POLL_SECONDS = 1.0


def main(arguments: Sequence[str]) -> int:
    """Trains until there are as many trials as are wanted; an exit code of `mainrun`'s."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", required=True)
    parser.add_argument("--since", type=datetime.fromisoformat, required=True)
    parser.add_argument("--population", type=int)
    asked = parser.parse_args(arguments)
    made = load(asked.folder)
    study = Study(made.folder, made.space, made.base.seed, asked.name)
    with contextlib.closing(study), listening() as stopping:
        try:
            _Worker(made, study, stopping, asked.since, asked.population).work()
        except Stopped:
            return 75
        except (RunFailed, OSError) as error:
            if (reason := errors.reason_of(error)) is None:
                raise
            say(f"mainrun: failed: {reason}")
            return 1
    return 0


class _TrialStop:
    """Whether a trial shall stop: because all shall, or because others do better."""

    def __init__(self, signal: StopSignal) -> None:
        self._signal = signal
        self.reason: str | None = None

    def requested(self) -> bool:
        return self.reason is not None or self._signal.requested()

    def check(self) -> None:
        self._signal.check()


class _Worker:
    def __init__(
        self,
        made: Sweep,
        study: Study,
        stopping: StopSignal,
        since: datetime,
        population: int | None,
    ) -> None:
        self._made, self._study, self._stopping = made, study, stopping
        self._base = config.read(made.base_path())
        self._since, self._population = since, population
        self._paths = frozenset(made.space.varied())
        self._texts = _Texts()
        self._groups: list[Group] = []
        self._group: Group | None = None
        self._trials: dict[Running, tuple[Trial, _TrialStop]] = {}
        self._waiting: list[tuple[Trial, Prepared]] = []  # ours, of another structure
        self._again: list[Trial] = []  # ours, to go on from a checkpoint

    def work(self) -> None:
        """Raises RunFailed when several trials in a row have failed, Stopped when asked to."""
        try:
            self._work()
        except RunFailed:
            if self._group is not None:
                self._group.close(Stopped())  # the others can go on from their checkpoints
            raise

    def _work(self) -> None:
        while self._fill():
            assert self._group is not None
            broken = None
            try:
                self._group.advance()
            except Exception as error:  # XLA's: of memory, most likely
                broken = error
            for running in [running for running in self._trials if running.has_ended]:
                self._settle(running)
            if broken is not None:
                self._lose(self._group, broken)

    def _fill(self) -> bool:
        """Trials into free places, as many as there are; whether any is training."""
        while not self._stopping.requested() and (drawn := self._draw()):
            trial, prepared = drawn
            group = self._group
            if group is None or (len(group) == 0 and not group.fits(prepared)):
                group = self._group = self._group_for(trial, prepared)
            if group is not None and not group.fits(prepared):
                self._waiting.append(drawn)
            elif group is not None:
                self._admit(group, trial, prepared)
        if self._group is not None and len(self._group):
            return True
        self._stopping.check()
        return self._others_work()

    def _draw(self) -> tuple[Trial, Prepared] | None:
        """The next trial that could be trained now; None where there is no place or no trial."""
        group = self._group
        if group is not None and len(group) == group.places:
            return None
        is_idle = group is None or len(group) == 0
        for drawn in self._waiting:
            if is_idle or (group is not None and group.fits(drawn[1])):
                self._waiting.remove(drawn)
                return drawn
        if group is not None and not is_idle and len(self._waiting) >= group.places:
            return None
        while trial := self._next():
            if (prepared := self._prepared(trial)) is not None:
                return trial, prepared
        return None

    def _next(self) -> Trial | None:
        if self._again:
            return self._again.pop(0)
        return self._study.claim_interrupted() or self._study.begin(self._refusal)

    def _refusal(self, values: Mapping[str, Any]) -> str | None:
        try:
            self._base.load(search_space.as_overrides(values))
        except UserError as error:
            return str(error).removesuffix(" (command line)")
        return None

    def _prepared(self, trial: Trial) -> Prepared | None:
        """The trial's run, new or to go on with; None where it has ended already, or cannot be."""
        run_dir = self._made.run_dir(trial)
        run_dir.parent.mkdir(exist_ok=True)
        for partial in run_dir.parent.glob(f".{run_dir.name}.*"):
            shutil.rmtree(partial, ignore_errors=True)  # of a process killed while making it
        words = search_space.as_overrides(trial.values)
        said = f"trial {trial.number}: {self._varied(trial)}"
        try:
            if not run_dir.exists():
                say(said)
                command = ["mainrun", "train", str(self._made.base_path()), *words]
                return prepare(
                    self._base.load(words),
                    run_dir,
                    run_dir.name,
                    command=command,
                    read=self._texts.read,
                    layout=ONE,
                )
            if folder.is_finished(run_dir):
                write_views(run_dir)
                self._finish(trial, sweep_folder.outcome_of(run_dir, self._made.space.metric))
                return None
            say(f"{said} (goes on)")
            command = ["mainrun", "resume", str(run_dir)]
            return prepare_to_resume(
                run_dir, (), command=command, read=self._texts.read, layout=ONE
            )
        except (UserError, RunFailed) as error:
            self._finish(trial, Outcome("failed", reason=_reason(error)))
            return None

    def _group_for(self, trial: Trial, prepared: Prepared) -> Group | None:
        """The group of this structure, which nobody is in; None where it cannot be."""
        for group in self._groups:
            if group.fits(prepared):
                return group
        ended = [t for t in self._study.trials() if t.outcome.status not in ("running", "refused")]
        wanted = Choice(self._population, max(1, (self._study.wanted() or 1) - len(ended)))
        try:
            say("compiling the training step")
            group = Group(prepared, self._paths, wanted)
        except Exception as error:  # what XLA raises has many names
            self._finish(trial, Outcome("failed", reason=_reason(error)))
            return None
        self._groups = [*self._groups[1 - _KEPT_GROUPS :], group]
        if group.places > 1:
            say(f"{group.places} trials train side by side")
        return group

    def _admit(self, group: Group, trial: Trial, prepared: Prepared) -> None:
        stop = _TrialStop(self._stopping)
        label = f"trial {trial.number}"
        try:
            running = group.admit(prepared, stop, self._watch(trial, stop), label)
        except (UserError, RunFailed) as error:
            self._finish(trial, Outcome("failed", reason=_reason(error)))
            return
        self._trials[running] = trial, stop
        if running.has_ended:
            self._settle(running)

    def _watch(self, trial: Trial, stop: _TrialStop) -> Callable[[int, Mapping[str, float]], None]:
        def watch(step: int, found: Mapping[str, float]) -> None:
            if (value := found.get(self._made.space.metric.name)) is not None:
                stop.reason = self._study.report(trial, step, value)

        return watch

    def _settle(self, running: Running) -> None:
        """Writes down how a trial has ended."""
        trial, stop = self._trials.pop(running)
        run_dir, metric = self._made.run_dir(trial), self._made.space.metric
        match running.error:
            case None:
                outcome = sweep_folder.outcome_of(run_dir, metric)
            case Stopped() if stop.reason is not None:
                outcome = sweep_folder.pruned(run_dir, metric, stop.reason)
            case Stopped():
                return
            case error:
                outcome = Outcome("failed", reason=_reason(error))
        self._finish(trial, outcome)

    def _lose(self, group: Group, error: Exception) -> None:
        """What trained side by side ran out of memory together, or broke: fewer at once go on."""
        reason = _reason(error)
        lost = [self._trials.pop(running) for running in group.close(RunFailed(reason))]
        self._group = None
        self._groups.remove(group)
        if len(lost) > 1:
            self._population = group.places // 2
            say(f"{reason}: its {len(lost)} trials go on {self._population} at a time")
            self._again += [trial for trial, _ in lost]
            return
        for trial, _ in lost:
            self._finish(trial, Outcome("failed", reason=reason))

    def _finish(self, trial: Trial, outcome: Outcome) -> None:
        """Raises RunFailed after several failures in a row."""
        run_dir = self._made.run_dir(trial)
        if outcome.seconds is None and (run_dir / "events.jsonl").is_file():
            with contextlib.suppress(UserError, RunFailed):
                outcome = sweep_folder.timed(outcome, run_dir)
        self._study.finish(trial, outcome)
        say(sweep_summary.told(self._made.space, self._study.trials(), trial.number,
                               self._study.wanted(), outcome))  # fmt: skip
        sweep_folder.report(self._made, self._study, "running", None)
        self._study.check_failures(self._since)

    def _others_work(self) -> bool:
        """Waits while other processes have trials of this sweep; whether one became free."""
        told = False
        while any(t.outcome.status == "running" for t in self._study.trials()):
            self._stopping.check()
            if trial := self._study.claim_interrupted():
                self._again.append(trial)
                return self._fill()
            if not told:
                say("waiting for trials that other processes work on")
                told = True
            time.sleep(_POLL_SECONDS)
        return False

    def _varied(self, trial: Trial) -> str:
        return sweep_summary.varied_text(trial, self._made.space)


class _Texts:
    """The texts of the last few corpora that were read, for trials that have the same."""

    def __init__(self) -> None:
        self._read: dict[str, Texts] = {}

    def read(self, config: Config, tokenizer: Tokenizer | None) -> Texts:
        fitted = "" if tokenizer is None else tokenizer.to_str()
        key = repr((config.data, config.tokenizer, config.seed, fitted))
        if key not in self._read:
            self._read = dict(list(self._read.items())[1 - _KEPT_TEXTS :])
            self._read[key] = read_texts(config, tokenizer)
        return self._read[key]


def _reason(error: BaseException) -> str:
    if isinstance(error, (RunFailed, UserError)):
        return one_line(error)
    if errors.is_out_of_memory(error):
        return f"out of memory: {one_line(error)}"
    return named(error)
