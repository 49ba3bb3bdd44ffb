"""The order of steps, evaluations and checkpoints, whatever interrupts it and however they go."""

import dataclasses
import itertools
import math
from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np
import pytest

from mainrun import config
from mainrun.errors import RunFailed, Stopped
from mainrun.training import divergence, loop, noise, precision
from mainrun.training.checkpoint import Progress
from mainrun.training.divergence import APPLIED, NOT_FINITE, OVERFLOWED, SPIKED
from mainrun.training.loop import Plan, drive
from mainrun.training.step import Metrics, TrainState
from mainrun.training.trainee import Asked, Dispatched, Measured

PLAN = Plan(total_steps=10, eval_every=4, checkpoint_every=3, log_every=1, tokens_per_step=64)
LIMIT = 3

OVERFLOW, SPIKE = "overflow", "spike"


class Batch(NamedTuple):
    """Its loss decides what becomes of the step, so that a test decides it."""

    index: int
    loss: float | str


def state(step: int = 0) -> TrainState:
    return TrainState(
        step=np.int32(step),
        updates=np.int32(step),
        params={"applied": np.int64(0)},  # bit n: batch n is in these parameters
        opt_state=(),
        key=np.zeros(2, np.uint32),
        frozen={},
        average={},
        loss_scale=precision.initial(config.LossScale(initial=1.0)),
        guard=divergence.initial(),
        noise=noise.none(),
    )


def applied(state: TrainState) -> list[int]:
    return [index for index in range(63) if int(state.params["applied"]) >> index & 1]


def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    outcome = {OVERFLOW: OVERFLOWED, SPIKE: SPIKED}.get(batch.loss, APPLIED)
    loss = 2.0 if isinstance(batch.loss, str) else batch.loss
    if not math.isfinite(loss):
        outcome = NOT_FINITE
    scale = state.loss_scale  # the least there is
    after = state._replace(step=state.step + 1)
    match outcome:
        case divergence.APPLIED:
            after = after._replace(
                params={"applied": state.params["applied"] | 1 << batch.index},
                guard=state.guard._replace(in_a_row=0),
                loss_scale=scale._replace(at_min=0),
            )
        case divergence.OVERFLOWED:
            after = after._replace(loss_scale=scale._replace(at_min=scale.at_min + 1))
        case _:
            more = int(state.guard.in_a_row) + 1
            after = after._replace(guard=state.guard._replace(in_a_row=more))
    return after, Metrics(
        loss=loss,
        objective=loss,
        grad_norm=1.0,
        learning_rate=0.1,
        balance_loss=0.0,
        outcome=outcome,
        in_a_row=after.guard.in_a_row,
        loss_scale=after.loss_scale,
        noise_tokens=math.nan,
    )


class Trainee:
    """Takes as many steps at once as it may, up to `at_once`."""

    def __init__(self, state: TrainState, run: "Surroundings", at_once: int = 1) -> None:
        self.state, self._run, self._at_once = state, run, at_once

    def take(self, asked: Asked) -> Dispatched:
        steps, metrics = min(asked.most, self._at_once), []
        for index in range(asked.first, asked.first + steps):
            self.state, found = train_step(self.state, self._run.batch(index))
            metrics.append(found)
        return Dispatched(steps, lambda: Measured(metrics, 0.5 * steps))


def fit(
    state: TrainState, progress: Progress, plan: Plan, run: "Surroundings", at_once: int = 1
) -> tuple[TrainState, Progress]:
    trainee = Trainee(state, run, at_once)
    progress = drive(loop.course(trainee, progress, plan, run), trainee.take)
    return trainee.state, progress


class Killed(BaseException):
    """The process is gone, and what was saved stays."""


class Surroundings:
    """Writes down what the loop asks for; stops or dies when told to."""

    def __init__(
        self,
        losses: Mapping[int, float | str] | None = None,
        *,
        stop_at: str = "",
        kill_at: str = "",
        checkpoints: Mapping[int, tuple[TrainState, Progress]] | None = None,
    ) -> None:
        self.told: list[str] = []
        self.reasons: list[str] = []
        self.checkpoints = dict(checkpoints or {})
        self._losses = losses or {}
        self._stop_at, self._kill_at = stop_at, kill_at

    @property
    def newest(self) -> tuple[TrainState, Progress]:
        return self.checkpoints[max(self.checkpoints)]

    def batch(self, index: int) -> Batch:
        return Batch(index, self._losses.get(index, 1.0))

    def evaluate(self, state: TrainState) -> float:
        step = int(state.step)
        if self._stop_at == f"evaluation {step}":
            raise Stopped
        self._tell(f"evaluation {step}")
        return abs(step - 6.0)  # the best is at 6; where that is not evaluated, at 4

    def save(self, state: TrainState, progress: Progress, *, best: bool) -> None:
        step = int(state.step)
        timeless = dataclasses.replace(progress, train_seconds=0.0)
        self.checkpoints.setdefault(step, (state, timeless))
        self._tell(f"save {step}" + (" best" if best else ""))

    def saved(self, step: int, like: TrainState) -> TrainState:
        return self.checkpoints[step][0]

    def log(self, event: str, step: int, fields: Mapping[str, float | str]) -> None:
        if "reason" in fields:
            self.reasons.append(str(fields["reason"]))
        name = "step" if event == "train_step" else event
        self._tell(f"{name} {step}" + (f" to {fields['to_step']}" if "to_step" in fields else ""))

    def stop_requested(self) -> bool:
        return self._stop_at in self.told

    def _tell(self, what: str) -> None:
        self.told.append(what)
        if what == self._kill_at:
            raise Killed


class Course(NamedTuple):
    """A run and the order in which all of it happens."""

    plan: Plan
    losses: Mapping[int, float | str]
    told: list[str]
    applied: list[int]
    progress: Progress

    def fit(self, run: Surroundings, at_once: int = 1) -> tuple[TrainState, Progress]:
        begin = run.newest if run.checkpoints else (state(), Progress())
        final, progress = fit(*begin, self.plan, run, at_once)
        return final, dataclasses.replace(progress, train_seconds=0.0)


def planned(action: str = "skip", **changes: object) -> Plan:
    settings = config.Divergence(action=action, limit=LIMIT, spike_deviations=4.5)
    return dataclasses.replace(PLAN, divergence=settings, **changes)


COURSES = {
    "all goes well": Course(
        PLAN,
        {},
        ["evaluation 0", "step 1", "step 2", "step 3", "save 3", "step 4", "evaluation 4",
         "save 4 best", "step 5", "step 6", "save 6", "step 7", "step 8", "evaluation 8", "step 9",
         "save 9", "step 10", "evaluation 10", "save 10"],
        list(range(10)),
        Progress(evaluated_step=10, best_step=4, best_loss=2.0, evaluations_since_best=2,
                 planned_step=10),
    ),
    "patience ends": Course(
        dataclasses.replace(PLAN, total_steps=14, eval_every=2, patience=2),
        {},
        ["evaluation 0", "step 1", "step 2", "evaluation 2", "save 2 best", "step 3", "save 3",
         "step 4", "evaluation 4", "save 4 best", "step 5", "step 6", "evaluation 6",
         "save 6 best", "step 7", "step 8", "evaluation 8", "step 9", "save 9", "step 10",
         "evaluation 10", "stopped_early 10", "save 10"],
        list(range(10)),
        Progress(evaluated_step=10, best_step=6, best_loss=0.0, evaluations_since_best=2,
                 planned_step=9),
    ),
    "bad steps are skipped": Course(
        planned("skip"),
        {2: math.nan, 6: SPIKE, 7: math.inf},
        ["evaluation 0", "step 1", "step 2", "step_skipped 3", "step 3", "save 3", "step 4",
         "evaluation 4", "save 4 best", "step 5", "step 6", "save 6", "step_skipped 7", "step 7",
         "step_skipped 8", "step 8", "evaluation 8", "step 9", "save 9", "step 10",
         "evaluation 10", "save 10"],
        [0, 1, 3, 4, 5, 8, 9],
        Progress(evaluated_step=10, best_step=4, best_loss=2.0, evaluations_since_best=2,
                 planned_step=10),
    ),
    "bad steps are gone back from": Course(
        planned("go_back"),
        {4: math.nan, 8: SPIKE},
        ["evaluation 0", "save 0 best", "step 1", "step 2", "step 3", "save 3", "step 4",
         "evaluation 4", "save 4 best", "went_back 5 to 4", "step 6", "save 6", "step 7", "step 8",
         "evaluation 8", "went_back 9 to 6", "save 9", "step 10", "evaluation 10", "save 10"],
        [0, 1, 2, 3, 5, 9],
        Progress(evaluated_step=10, best_step=4, best_loss=2.0, evaluations_since_best=2,
                 planned_step=10),
    ),
}  # fmt: skip


def places(but: Collection[str] = ()) -> list[tuple[str, Course, str]]:
    """A course, its name, and each thing that is told in it."""
    return [
        (name, course, told)
        for name, course in COURSES.items()
        for told in course.told
        if told not in but
    ]


# A stop during the last step changes nothing any more: the run is then finished.
ENDS = ("step 10", "stopped_early 10", "save 10")


def test_everything_happens_in_its_order(subtests: pytest.Subtests) -> None:
    """However many steps are dispatched at once, where nothing else is due between them."""
    for at_once, (name, course) in itertools.product([1, 2, 32], COURSES.items()):
        with subtests.test(name, at_once=at_once):
            run = Surroundings(course.losses)
            final, progress = course.fit(run, at_once)
            assert run.told == course.told
            assert int(final.step) == 10
            assert applied(final) == course.applied
            assert progress == course.progress


def facts(told: list[str]) -> list[str]:
    return [t for t in told if not t.startswith("save")]


def test_a_stop_at_any_place_is_saved_and_resuming_does_the_rest(subtests: pytest.Subtests) -> None:
    for name, course, stop_at in places(but=ENDS):
        with subtests.test(name, stop_at=stop_at):
            first = Surroundings(course.losses, stop_at=stop_at)
            with pytest.raises(Stopped):
                course.fit(first)
            assert first.told[-1].startswith(f"save {max(first.checkpoints)}")
            second = Surroundings(course.losses, checkpoints=first.checkpoints)
            final, progress = course.fit(second)
            assert facts([*first.told, *second.told]) == facts(course.told)
            assert applied(final) == course.applied
            assert progress == course.progress


def test_a_run_killed_at_any_place_repeats_what_came_after_its_checkpoint(
    subtests: pytest.Subtests,
) -> None:
    for at_once, (name, course, kill_at) in itertools.product([1, 32], places()):
        with subtests.test(name, at_once=at_once, kill_at=kill_at):
            first = Surroundings(course.losses, kill_at=kill_at)
            with pytest.raises(Killed):
                course.fit(first, at_once)
            second = Surroundings(course.losses, checkpoints=first.checkpoints)
            final, progress = course.fit(second)
            at = max(first.checkpoints, default=-1)
            # What is told once more at a checkpoint of step 0 is that it is there.
            saves = [i for i, t in enumerate(course.told) if t.startswith(f"save {at}")]
            place = max(saves, default=-1)
            assert second.told == course.told[place + (at != 0) :]
            assert applied(final) == course.applied
            assert progress == course.progress


def test_a_run_that_came_to_its_end_has_nothing_to_do(subtests: pytest.Subtests) -> None:
    for name, course in COURSES.items():
        with subtests.test(name):
            whole = Surroundings(course.losses)
            course.fit(whole)
            again = Surroundings(course.losses, checkpoints=whole.checkpoints)
            final, progress = course.fit(again)
            assert again.told == []
            assert applied(final) == course.applied
            assert progress == course.progress


def test_more_patience_goes_on_where_less_has_ended() -> None:
    course = COURSES["patience ends"]
    whole = Surroundings()
    course.fit(whole)
    patient = course._replace(plan=dataclasses.replace(course.plan, patience=3))
    more = Surroundings(checkpoints=whole.checkpoints)
    patient.fit(more)
    assert more.told == ["step 11", "step 12", "evaluation 12", "stopped_early 12", "save 12"]


def test_a_skipped_step_is_told_with_its_loss(subtests: pytest.Subtests) -> None:
    for bad in [math.nan, math.inf]:
        with subtests.test(bad=bad):
            run = Surroundings({2: bad})
            fit(state(), Progress(), planned("skip"), run)
            assert run.reasons == [f"the loss of step 3 is {bad:g} and its gradient norm 1"]


def test_too_many_skipped_steps_in_a_row_end_the_run_with_the_reason() -> None:
    run = Surroundings({4: math.nan, 5: SPIKE, 6: math.nan})
    with pytest.raises(RunFailed) as failed:
        fit(state(), Progress(), planned("skip"), run)
    said = str(failed.value)
    assert said.startswith("the loss of step 7 is nan and its gradient norm 1, the last of 3 such")
    assert "lower optimizer.learning_rate or lengthen schedule.warmup" in said
    assert "\n" not in said
    assert [t for t in run.told if "skipped" in t] == [f"step_skipped {n}" for n in (5, 6, 7)]
    assert run.told[-1] == "step_skipped 7"


def test_skipped_steps_that_are_not_in_a_row_end_nothing(subtests: pytest.Subtests) -> None:
    cases = {
        "a good one between": dict.fromkeys((0, 1, 3, 4, 6, 7, 9), math.nan),
        "two at a time": {0: SPIKE, 1: math.nan, 9: SPIKE},
    }
    for name, losses in cases.items():
        with subtests.test(name):
            run = Surroundings(losses)
            final, _ = fit(state(), Progress(), planned("skip"), run)
            assert applied(final) == [n for n in range(10) if n not in losses]


def test_to_stop_at_a_bad_step_fails_at_once_and_saves_nothing_of_it(
    subtests: pytest.Subtests,
) -> None:
    well = COURSES["all goes well"].told
    for bad, index in itertools.product([math.nan, math.inf, SPIKE], range(10)):
        with subtests.test(bad=bad, index=index):
            run = Surroundings({index: bad})
            said = rf"the loss of step {index + 1} is .*: training diverged"
            with pytest.raises(RunFailed, match=said):
                fit(state(), Progress(), planned("stop"), run)
            assert run.told == well[: well.index(f"step {index + 1}")]


def test_a_spike_is_told_with_what_it_was_measured_by() -> None:
    with pytest.raises(RunFailed, match=r"norm 1, more than 4.5 deviations above the mean: train"):
        fit(state(), Progress(), planned("stop"), Surroundings({3: SPIKE}))


def test_going_back_is_to_the_newest_checkpoint_and_on_behind_the_bad_batch(
    subtests: pytest.Subtests,
) -> None:
    for bad in range(10):
        with subtests.test(bad=bad):
            run = Surroundings({bad: math.nan})
            final, _ = fit(state(), Progress(), planned("go_back"), run)
            newest = max(step for step in (0, 3, 4, 6, 9) if step <= bad)
            assert f"went_back {bad + 1} to {newest}" in run.told
            assert applied(final) == [n for n in range(10) if not newest <= n <= bad]
            assert run.reasons == [f"the loss of step {bad + 1} is nan and its gradient norm 1"]
            assert run.told[-1] == "save 10"


def test_the_limit_of_returns_is_that_of_the_whole_run() -> None:
    course = COURSES["all goes well"]._replace(plan=planned("go_back"))
    enough = {1: math.nan, 4: math.nan, 7: SPIKE}
    final, _ = course.fit(Surroundings(enough))
    assert int(final.guard.returns) == LIMIT
    first = Surroundings(enough | {9: math.nan}, stop_at="save 9")
    with pytest.raises(Stopped):
        course.fit(first)
    second = Surroundings({9: math.nan}, checkpoints=first.checkpoints)
    with pytest.raises(
        RunFailed, match=r"the loss of step 10 is nan .*, after 3 returns to a check"
    ):
        course.fit(second)
    assert second.told == []


def test_overflows_at_the_least_scale_end_the_run_with_the_remedy() -> None:
    plan = planned("stop", limit_at_min_scale=4, scales_loss=True)
    run = Surroundings(dict.fromkeys((1, 2, 4, 5, 6, 7), OVERFLOW))
    with pytest.raises(RunFailed) as failed:
        fit(state(), Progress(), plan, run)
    said = str(failed.value)
    assert "gradients of step 8 overflow" in said
    assert "the last of 4 such steps in a row: set training.precision=bfloat16" in said
    assert [t for t in run.told if "skipped" in t] == [
        f"step_skipped {n + 1}" for n in (1, 2, 4, 5, 6, 7)
    ]
    assert "the loss scale is now 1" in run.reasons[0]


def test_steps_follow_one_another_up_to_what_is_due(subtests: pytest.Subtests) -> None:
    for step in range(10):
        with subtests.test(step=step):
            end = step + PLAN.steps_until_due(step)
            due = [n for n in range(step + 1, 11) if n % 4 == 0 or n % 3 == 0 or n == 10]
            assert end == due[0]


def test_seldom_records_average_the_time_between_them() -> None:
    told: dict[int, Mapping[str, float | str]] = {}

    class Timed(Surroundings):
        def log(self, event: str, step: int, fields: Mapping[str, float | str]) -> None:
            told[step] = fields

    plan = dataclasses.replace(PLAN, log_every=4)
    _, progress = fit(state(), Progress(), plan, Timed())
    assert list(told) == [4, 8, 10]
    total = sum(told[n]["perf/step_ms"] * k for n, k in ((4, 4), (8, 4), (10, 2)))
    assert total == pytest.approx(1e3 * progress.train_seconds)
    assert told[8]["perf/tokens_per_second"] == pytest.approx(64e3 / told[8]["perf/step_ms"])


def test_utilisation_is_told_where_the_peak_is_known(subtests: pytest.Subtests):
    """The trainee here takes 64 tokens in half a second."""
    told: list[Mapping[str, float | str]] = []

    class Told(Surroundings):
        def log(self, event: str, step: int, fields: Mapping[str, float | str]) -> None:
            told.append(fields)

    for peak, expected in [(256.0, 0.5), (None, None)]:
        with subtests.test(peak=peak):
            told.clear()
            fit(state(), Progress(), dataclasses.replace(PLAN, peak_tokens_per_second=peak), Told())
            assert len(told) == PLAN.total_steps
            assert {fields.get("perf/mfu") for fields in told} == {expected}
