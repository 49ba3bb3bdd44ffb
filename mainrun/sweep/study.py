"""The trials of a sweep: which comes next, and what each came to, in a journal on disk.

The next trial is a pure function of the space, the seed, its number and the trials that have
ended: a sampler is made anew for each, so a sweep that was killed goes on with the trials that it
would have had. A trial is in the journal, whole, before anything of it runs. Several processes may
work on one study: each trial is one's claim as long as that one lives.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.storages import JournalStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from mainrun.errors import RunFailed, UserError
from mainrun.sweep.claims import Claims
from mainrun.sweep.journal import Journal
from mainrun.sweep.sampler import direction, encoded, for_optuna, next_values
from mainrun.sweep.search_space import SearchSpace, grid_size

Status = Literal["running", "finished", "pruned", "failed", "refused"]

Refusal = Callable[[Mapping[str, Any]], str | None]
"""Why no run can have these values; None where one can."""

FAILURES_IN_A_ROW = 3
"""That end a sweep."""

_REFUSALS_IN_A_ROW = 100


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    `value` is the metric's best, at `step`, with its standard error where it has one. A refused
    trial never ran: its settings fit each for itself and not together. A pruned one was stopped,
    because others did better by then.
    """

    status: Status
    value: float | None = None
    stderr: float | None = None
    step: int | None = None
    seconds: float | None = None
    reason: str | None = None


UNFINISHED = Outcome("running")


@dataclass(frozen=True)
class Trial:
    number: int
    """From 1, in the order in which they began."""
    values: Mapping[str, Any]
    """Of every parameter, the fixed ones too."""
    outcome: Outcome = UNFINISHED


class Study:
    """The journal of a sweep, and the claims on its trials."""

    def __init__(self, folder: Path, space: SearchSpace, seed: int, worker: str = "") -> None:
        """`worker` is written beside the trials that this process claims.

        Raises UserError for the study of another search, RunFailed where it is damaged.
        """
        self._space, self._seed, self._worker = space, seed, worker
        path = folder / "study.journal"
        self._journal = Journal(path)
        self.claims = Claims(folder / "claims")
        try:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            with self._journal.exclusively():
                self._storage = JournalStorage(self._journal)
                self._id = self._open(path)
        except (UserError, RunFailed):
            self.close()
            raise
        except Exception as error:
            self.close()
            raise RunFailed(f"{path}: damaged: Optuna cannot read it ({error!r})") from error

    def close(self) -> None:
        """Drops all claims."""
        self._journal.close()
        self.claims.close()

    def trials(self) -> list[Trial]:
        """All that began, in their order."""
        return [_trial(stored) for stored in self._storage.get_all_trials(self._id)]

    def begin(self, refusal: Refusal = lambda values: None) -> Trial | None:
        """The next trial, from now on in the journal and ours; None where there are enough.

        What is refused is written down, and does not count. Raises RunFailed where all is refused.
        """
        with self._journal.exclusively():
            refused = 0
            while True:
                stored = self._storage.get_all_trials(self._id)
                if self._has_enough(stored):
                    return None
                values = next_values(self._space, self._seed, stored)
                trial = Trial(len(stored) + 1, values)
                reason = refusal(values)
                if reason is None:
                    self.claims.take(trial.number)
                self._store(trial)
                if reason is None:
                    return trial
                self.finish(trial, Outcome("refused", reason=reason))
                refused += 1
                if refused == _REFUSALS_IN_A_ROW:
                    raise RunFailed(f"{refused} trials in a row were refused, the last: {reason}")

    def claim_interrupted(self) -> Trial | None:
        """The first trial that nobody works on, though it has not ended; ours from now on."""
        with self._journal.exclusively():
            for trial in self.trials():
                if trial.outcome.status == "running" and self.claims.take(trial.number):
                    self._storage.set_trial_user_attr(self._at(trial), "worker", self._worker)
                    return trial
        return None

    def left_by(self, worker: str) -> list[Trial]:
        """The trials that were this worker's, and have not ended."""
        stored = self._storage.get_all_trials(self._id)
        running = (t for t in stored if not t.state.is_finished())
        return [_trial(t) for t in running if t.user_attrs.get("worker") == worker]

    def finish(self, trial: Trial, outcome: Outcome) -> None:
        """Writes down what became of a trial that began."""
        said = {name: value for name, value in vars(outcome).items() if value is not None}
        state = _STATES.get(outcome.status, TrialState.FAIL)
        values = [outcome.value] if outcome.value is not None else None
        with self._journal.exclusively():
            at = self._at(trial)
            self._storage.set_trial_user_attr(at, "outcome", said)
            self._storage.set_trial_state_values(at, state, values)
        self.claims.drop(trial.number)

    def report(self, trial: Trial, step: int, value: float) -> str | None:
        """Writes down what an evaluation gave; why the trial shall end there, if it shall."""
        hyperband = self._space.early_terminate
        if hyperband is None or not math.isfinite(value):
            return None
        with self._journal.exclusively():
            self._storage.set_trial_intermediate_value(self._at(trial), step, value)
            stored = self._storage.get_all_trials(self._id)
        reports = [[t.intermediate_values[s] for s in sorted(t.intermediate_values)]
                   for t in stored if t.number != trial.number - 1]  # fmt: skip
        ours = stored[trial.number - 1].intermediate_values
        own = [ours[s] for s in sorted(ours) if s <= step]
        return hyperband.verdict(own, reports, self._space.metric.goal)

    def failures_since(self, moment: datetime) -> list[Trial]:
        """The trials that failed one after the other up to now, none since that moment ending
        otherwise. What was refused took no time, and says nothing about the next."""
        stored = self._storage.get_all_trials(self._id)
        done = [t for t in stored if t.datetime_complete and t.datetime_complete >= moment]
        failed: list[Trial] = []
        for trial in map(_trial, sorted(done, key=_end, reverse=True)):
            if trial.outcome.status == "failed":
                failed.append(trial)
            elif trial.outcome.status != "refused":
                break
        return failed[::-1]

    def check_failures(self, since: datetime) -> None:
        """Raises RunFailed where several trials in a row have failed since that moment."""
        failed = self.failures_since(since)
        if len(failed) >= FAILURES_IN_A_ROW:
            raise RunFailed(
                f"{len(failed)} trials in a row failed, the last: {failed[-1].outcome.reason}"
            )

    def wanted(self) -> int | None:
        """How many trials were asked for last; None where nobody has."""
        return self._storage.get_study_user_attrs(self._id).get("wanted")

    def want(self, trials: int) -> None:
        self._storage.set_study_user_attr(self._id, "wanted", trials)

    def _has_enough(self, stored: Sequence[FrozenTrial]) -> bool:
        if self._space.method == "grid" and len(stored) >= grid_size(self._space):
            return True
        outcomes = [_trial(trial).outcome for trial in stored]
        if any(self._reaches_target(outcome) for outcome in outcomes):
            return True
        wanted, refused = self.wanted(), sum(o.status == "refused" for o in outcomes)
        return wanted is not None and len(stored) - refused >= wanted

    def _reaches_target(self, outcome: Outcome) -> bool:
        """As W&B's server does it: the search is over once a trial is good enough."""
        if outcome.status != "finished" or outcome.value is None:
            return False
        return self._space.metric.reaches_target(outcome.value)

    def _store(self, trial: Trial) -> None:
        varied = self._space.varied()
        self._storage.create_new_trial(
            self._id,
            create_trial(
                state=TrialState.RUNNING,
                params={p: encoded(d, trial.values[p]) for p, d in varied.items()},
                distributions={p: for_optuna(d) for p, d in varied.items()},
                user_attrs={"values": trial.values, "worker": self._worker},
            ),
        )

    def _at(self, trial: Trial) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number - 1)

    def _open(self, path: Path) -> int:
        searched = _fingerprint(self._space)
        known = self._storage.get_all_studies()
        if not known:
            at = self._storage.create_new_study([direction(self._space)], self._space.name)
            self._storage.set_study_user_attr(at, "search", searched)
            return at
        at = self._storage.get_study_id_from_name(known[0].study_name)
        if self._storage.get_study_user_attrs(at).get("search", searched) != searched:
            raise UserError(
                f"{path} is the study of another search space: move it away, or choose another "
                "--run-dir"
            )
        return at


_STATES = {"finished": TrialState.COMPLETE, "pruned": TrialState.PRUNED}


def _trial(stored: FrozenTrial) -> Trial:
    outcome = UNFINISHED
    if stored.state.is_finished():
        outcome = Outcome(**stored.user_attrs["outcome"])
    return Trial(stored.number + 1, stored.user_attrs["values"], outcome)


def _end(stored: FrozenTrial) -> datetime:
    assert stored.datetime_complete is not None
    return stored.datetime_complete


def _fingerprint(space: SearchSpace) -> str:
    """Of what decides which trials there are."""
    parts = (space.method, space.metric, list(space.parameters.items()))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
