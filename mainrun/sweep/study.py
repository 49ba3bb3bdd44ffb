"""The trials of a sweep: which comes next, and what each came to, in a journal on disk.

The next trial is a pure function of the space, the seed, its number and the trials that have
finished: a sampler is made anew for each, so a sweep that was killed goes on with the trials that
it would have had. A trial is in the journal, whole, before anything of it runs. The journal is
Optuna's own format (`study.journal`), which its tools read.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, assert_never

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.storages import JournalStorage
from optuna.storages.journal import BaseJournalBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from mainrun.errors import RunFailed, UserError
from mainrun.sweep.search_space import (
    Choices,
    Distribution,
    Fixed,
    Integers,
    Interval,
    Multiples,
    SearchSpace,
    grid_point,
    grid_size,
)

Status = Literal["running", "finished", "failed", "refused"]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    `value` is the metric's best, at `step`, with its standard error where it has one. A refused
    trial never ran: its settings fit each for itself and not together.
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
    """The journal of a sweep, open in this process alone."""

    def __init__(self, path: Path, space: SearchSpace, seed: int) -> None:
        """Raises UserError where another process has it, RunFailed where it is damaged."""
        self._space, self._seed = space, seed
        self._journal = _Journal(path)
        try:
            optuna.logging.set_verbosity(optuna.logging.WARNING)
            self._storage = JournalStorage(self._journal)
            self._id = self._open(space)
        except Exception as error:
            self._journal.close()
            raise RunFailed(f"{path}: damaged: Optuna cannot read it ({error!r})") from error

    def close(self) -> None:
        self._journal.close()

    def trials(self) -> list[Trial]:
        """All that began, in their order."""
        return [_trial(stored) for stored in self._storage.get_all_trials(self._id)]

    def begin(self) -> Trial:
        """The next trial, from now on in the journal."""
        stored = self._storage.get_all_trials(self._id)
        values = next_values(self._space, self._seed, stored)
        spaces = {p: _for_optuna(d) for p, d in self._space.varied().items()}
        params = {p: _encoded(d, values[p]) for p, d in self._space.varied().items()}
        self._storage.create_new_trial(
            self._id,
            create_trial(
                state=TrialState.RUNNING,
                params=params,
                distributions=spaces,
                user_attrs={"values": values},
            ),
        )
        return Trial(len(stored) + 1, values)

    def finish(self, trial: Trial, outcome: Outcome) -> None:
        """Writes down what became of a trial that began."""
        at = self._storage.get_trial_id_from_study_id_trial_number(self._id, trial.number - 1)
        said = {name: value for name, value in vars(outcome).items() if value is not None}
        self._storage.set_trial_user_attr(at, "outcome", said)
        if outcome.status == "finished":
            assert outcome.value is not None
            self._storage.set_trial_state_values(at, TrialState.COMPLETE, [outcome.value])
        else:
            self._storage.set_trial_state_values(at, TrialState.FAIL)

    def wanted(self) -> int | None:
        """How many trials were asked for last; None where nobody has."""
        return self._storage.get_study_user_attrs(self._id).get("wanted")

    def want(self, trials: int) -> None:
        self._storage.set_study_user_attr(self._id, "wanted", trials)

    def _open(self, space: SearchSpace) -> int:
        known = self._storage.get_all_studies()
        if known:
            return self._storage.get_study_id_from_name(known[0].study_name)
        return self._storage.create_new_study([_direction(space)], space.name)


def next_values(
    space: SearchSpace, seed: int, before: Sequence[FrozenTrial]
) -> dict[str, int | float | str | bool | list | dict | None]:
    """The values of the trial that follows these, of every parameter."""
    number = len(before)
    match space.method:
        case "grid":
            return grid_point(space, number % grid_size(space))
        case "random":
            sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(
                seed=_seed(seed, number)
            )
            before = []
        case "bayes":
            # Multivariate: learning rate and batch size, say, are best chosen together.
            sampler = optuna.samplers.TPESampler(seed=_seed(seed, number), multivariate=True)
        case _:
            assert_never(space.method)
    # A study of this moment only: asking the stored one would write half a trial at a time.
    scratch = optuna.create_study(sampler=sampler, direction=_direction(space))
    scratch.add_trials([trial for trial in before if trial.state == TrialState.COMPLETE])
    asked = scratch.ask({p: _for_optuna(d) for p, d in space.varied().items()})
    return {
        setting: d.value if isinstance(d, Fixed) else _decoded(d, asked.params[setting])
        for setting, d in space.parameters.items()
    }


class _Journal(BaseJournalBackend):
    """The file: one JSON object a line, locked as long as it is open.

    Optuna's own backend locks by a second file, which a killed process leaves behind, and appends
    to the half line of a killed one, which spoils the file; else the two read alike.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            data = path.read_bytes()
            self._logs = list(_lines(path, data))
            os.ftruncate(self._fd, data.rfind(b"\n") + 1)
        except BlockingIOError:
            os.close(self._fd)
            raise UserError(
                f"{path.parent} is being worked on by another process: "
                "wait until it ends, or stop it"
            ) from None
        except BaseException:
            os.close(self._fd)
            raise

    def read_logs(self, log_number_from: int) -> Iterator[dict[str, Any]]:
        return iter(self._logs[log_number_from:])

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        data = "".join(f"{json.dumps(log)}\n" for log in logs).encode()
        end = os.fstat(self._fd).st_size
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, end)
            raise RunFailed(f"{self._path}: cannot write: {error.strerror}") from error
        self._logs += json.loads(json.dumps(logs))

    def close(self) -> None:
        os.close(self._fd)


def _lines(path: Path, data: bytes) -> Iterable[dict[str, Any]]:
    """What is whole; the half line that a killed process left is not."""
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            log = json.loads(line)
        except ValueError:
            log = None
        if not isinstance(log, dict) or "op_code" not in log:
            raise RunFailed(f"{path}:{number}: damaged: not a line of Optuna's journal")
        yield log


def _trial(stored: FrozenTrial) -> Trial:
    outcome = UNFINISHED
    if stored.state.is_finished():
        outcome = Outcome(**stored.user_attrs["outcome"])
    return Trial(stored.number + 1, stored.user_attrs["values"], outcome)


def _direction(space: SearchSpace) -> StudyDirection:
    return StudyDirection.MINIMIZE if space.metric.goal == "minimize" else StudyDirection.MAXIMIZE


def _seed(seed: int, number: int) -> int:
    """A seed for each trial, unlike those of its neighbours."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:4])


def _for_optuna(distribution: Distribution) -> BaseDistribution:
    match distribution:
        case Choices(values=values):
            return CategoricalDistribution([json.dumps(value) for value in values])
        case Integers(low=low, high=high):
            return IntDistribution(low, high)
        case Interval(low=low, high=high, log=log):
            return FloatDistribution(low, high, log=log)
        case Multiples(first=first, last=last, log=log):
            return IntDistribution(first, last, log=log)
        case Fixed():
            raise AssertionError("nothing is chosen of one value")
        case _:
            assert_never(distribution)


def _encoded(distribution: Distribution, value: Any) -> Any:
    """The value as Optuna has it: lists and mappings as JSON, multiples as their count."""
    match distribution:
        case Choices():
            return json.dumps(value)
        case Multiples(quantum=quantum):
            return round(value / quantum)
        case _:
            return value


def _decoded(distribution: Distribution, stored: Any) -> Any:
    match distribution:
        case Choices():
            return json.loads(stored)
        case Multiples():
            return distribution.at(stored)
        case Interval(low=low, high=high):
            # What a person reads and types again; six digits are more than any setting needs.
            return min(max(float(f"{stored:.6g}"), low), high)
        case _:
            return stored
