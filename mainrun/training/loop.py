"""The loop: steps, evaluations and checkpoints in an order that a resumed run repeats exactly.

At every step number the order is: evaluate if due, save if due, stop if asked, take the step. The
loop knows no file, signal or tracker; it is handed what to call. Nothing in it waits for the
device but reading metrics, and those of some steps are read after the next ones were dispatched.

A run is a course that asks for steps, as many as may follow one another before something else is
due, and never takes one itself: `drive` takes them for one run, a population those of many runs.
"""

import dataclasses
import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, NoReturn, Protocol, runtime_checkable

import jax
import numpy as np

from mainrun import config
from mainrun.errors import RunFailed, Stopped
from mainrun.training import divergence
from mainrun.training.backend import peak_memory_bytes
from mainrun.training.checkpoint import Progress
from mainrun.training.step import Metrics, TrainState
from mainrun.training.trainee import Asked, Dispatched, Trainee


@dataclasses.dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps; and when enough is enough."""

    total_steps: int
    eval_every: int | None  # None: before the first and after the last step only
    checkpoint_every: int
    log_every: int
    tokens_per_step: int
    patience: int | None = None  # evaluations without improvement
    divergence: config.Divergence = dataclasses.field(default_factory=config.Divergence)
    limit_at_min_scale: int = config.LossScale().limit_at_min
    scales_loss: bool = False
    peak_tokens_per_second: float | None = None  # of all devices at their peak; None: not known

    def evaluates(self, step: int) -> bool:
        regular = self.eval_every is not None and step % self.eval_every == 0
        return regular or step in (0, self.total_steps)

    def saves(self, step: int) -> bool:
        if step == 0:
            return self.divergence.action == "go_back"  # there must be something to go back to
        return step % self.checkpoint_every == 0 or step == self.total_steps

    def steps_until_due(self, step: int) -> int:
        """How many steps may follow this one before there is something else to do; at least 1."""
        regular = [self.checkpoint_every] + ([self.eval_every] if self.eval_every else [])
        return min(self.total_steps - step, *(every - step % every for every in regular))

    def is_over(self, step: int, progress: Progress) -> bool:
        is_patient = self.patience is None or progress.evaluations_since_best < self.patience
        return step >= self.total_steps or not is_patient


@runtime_checkable
class Surroundings(Protocol):
    """What a run lends the loop."""

    def evaluate(self, state: TrainState) -> float:
        """Log the metrics of these parameters; their `val/loss`. Raises Stopped to give up."""

    def save(self, state: TrainState, progress: Progress, *, best: bool) -> None: ...

    def saved(self, step: int, like: TrainState) -> TrainState:
        """The state of that step's checkpoint, with the frozen part of `like`."""

    def log(self, event: str, step: int, fields: Mapping[str, float | str]) -> None: ...

    def stop_requested(self) -> bool: ...


Course = Generator[Asked, Dispatched, Progress]
"""Asks for steps, and is told how many of them were dispatched."""


def drive(going: Course, take: Callable[[Asked], Dispatched]) -> Progress:
    """Takes the steps of one course to its end. Raises what the course raises."""
    try:
        asked = next(going)
        while True:
            asked = going.send(take(asked))
    except StopIteration as end:
        progress: Progress = end.value
        return progress


def course(trainee: Trainee, progress: Progress, plan: Plan, run: Surroundings) -> Course:
    """The run from here to its end, in steps that somebody takes.

    Raises Stopped once a requested stop is saved, RunFailed where training diverges more often than
    the plan allows.
    """
    pipeline = _Pipeline(plan, run, progress.train_seconds)
    returns, saved_step = int(trainee.state.guard.returns), int(trainee.state.step)
    while True:
        try:
            return (yield from _steps(trainee, progress, plan, run, pipeline, saved_step))
        except _Diverged as diverged:
            returns += 1
            if returns > plan.divergence.limit:
                _fail(f"{diverged.reason}, after {returns - 1} returns to a checkpoint")
            trainee.state = _behind(diverged, trainee.state, run, returns)
            progress = diverged.progress
            saved_step = -1  # of the step that it goes on at there is no checkpoint


def _steps(
    trainee: Trainee,
    progress: Progress,
    plan: Plan,
    run: Surroundings,
    pipeline: "_Pipeline",
    saved_step: int,
) -> Course:
    """`course`, up to a step that is to be gone back from."""
    step = int(trainee.state.step)
    while True:
        due = plan.saves(step) and (step > saved_step or step == 0)
        if plan.evaluates(step) and progress.evaluated_step < step:
            progress = pipeline.drain(progress)
            try:
                loss = run.evaluate(trainee.state)
            except Stopped:
                run.save(trainee.state, progress, best=False)
                raise
            progress = evaluated(progress, step, loss)
            due = due or (progress.best_step == step > 0)
            if step < plan.total_steps and plan.is_over(step, progress):
                run.log("stopped_early", step, {"best_step": progress.best_step})
        is_over = plan.is_over(step, progress)
        if plan.saves(step) or progress.best_step == step > 0:
            progress = pipeline.drain(progress)
            progress = dataclasses.replace(progress, planned_step=step)
        if due or (is_over and step > saved_step):
            progress = pipeline.drain(progress)
            run.save(trainee.state, progress, best=progress.best_step == step)
        if is_over:
            return progress
        if run.stop_requested():
            progress = pipeline.drain(progress)
            if not due:
                run.save(trainee.state, progress, best=progress.best_step == step)
            raise Stopped
        dispatched = yield Asked(step, plan.steps_until_due(step))
        pipeline.push(step, dispatched, progress)
        step += dispatched.steps


def evaluated(progress: Progress, step: int, loss: float) -> Progress:
    """The progress behind an evaluation that came to this `val/loss`."""
    since_best = progress.evaluations_since_best + 1
    progress = dataclasses.replace(progress, evaluated_step=step, evaluations_since_best=since_best)
    if loss < progress.best_loss:
        return dataclasses.replace(
            progress, best_step=step, best_loss=loss, evaluations_since_best=0
        )
    return progress


class _Diverged(Exception):
    """A step is to be gone back from. Never leaves this module."""

    def __init__(self, step: int, reason: str, progress: Progress) -> None:
        self.step, self.reason, self.progress = step, reason, progress


def _behind(diverged: _Diverged, state: TrainState, run: Surroundings, returns: int) -> TrainState:
    """The newest planned checkpoint's state, to go on with behind the batches that diverged.

    Chowdhery et al. 2022 (arXiv:2204.02311), section 5.1.
    """
    saved = run.saved(diverged.progress.planned_step, state)
    fields: dict[str, float | str] = {"reason": diverged.reason, "to_step": int(saved.step)}
    run.log("went_back", diverged.step, fields)
    guard = saved.guard._replace(returns=_as(saved.guard.returns, returns))
    return saved._replace(step=_as(saved.step, diverged.step), guard=guard)


def _as(counter: Any, value: int) -> jax.Array:
    """A counter of another value, where the state has it."""
    return jax.device_put(np.asarray(value, np.int32), getattr(counter, "sharding", None))


def _fail(reason: str) -> NoReturn:
    raise RunFailed(
        f"{reason}: training diverged; lower optimizer.learning_rate or lengthen schedule.warmup"
    )


class _Pipeline:
    """Reads the metrics of what was dispatched while the device works on what comes next."""

    def __init__(self, plan: Plan, run: Surroundings, train_seconds: float) -> None:
        self._plan, self._run = plan, run
        self._train_seconds = train_seconds
        self._waiting: tuple[int, Dispatched] | None = None
        self._unlogged_steps, self._unlogged_seconds = 0, 0.0

    def push(self, step: int, dispatched: Dispatched, progress: Progress) -> None:
        """The device has the steps after this one; what it had before is read."""
        if self._waiting is not None:
            self._read(progress)
        self._waiting = step, dispatched

    def drain(self, progress: Progress) -> Progress:
        """Read what is still on the device, so that it is logged before what comes next."""
        if self._waiting is not None:
            self._read(progress)
            self._waiting = None
        return dataclasses.replace(progress, train_seconds=self._train_seconds)

    def _read(self, progress: Progress) -> None:
        """Raises _Diverged for a step to go back from, RunFailed where there were too many."""
        assert self._waiting is not None
        before, dispatched = self._waiting
        found = dispatched.wait()
        seconds = found.seconds / dispatched.steps
        for step, metrics in enumerate(found.metrics, before + 1):
            self._train_seconds += seconds
            self._unlogged_steps += 1
            self._unlogged_seconds += seconds
            if metrics.outcome != divergence.APPLIED:
                self._skipped(step, metrics, progress)
            if step % self._plan.log_every == 0 or step == self._plan.total_steps:
                self._log(step, metrics)

    def _skipped(self, step: int, metrics: Metrics, progress: Progress) -> None:
        """Tells of a step that changed nothing, and does what the settings say."""
        if metrics.outcome == divergence.OVERFLOWED:
            self._overflowed(step, metrics)
            return
        plan = self._plan
        reason = (
            f"the loss of step {step} is {metrics.loss:.6g} and its gradient norm "
            f"{metrics.grad_norm:.6g}"
        )
        if metrics.outcome == divergence.SPIKED:
            reason += f", more than {plan.divergence.spike_deviations:g} deviations above the mean"
        match plan.divergence.action:
            case "stop":
                _fail(reason)
            case "go_back":
                self._waiting = None  # the steps after it are of no use
                progress = dataclasses.replace(progress, train_seconds=self._train_seconds)
                raise _Diverged(step, reason, progress)
            case "skip":
                self._run.log("step_skipped", step, {"reason": reason})
                if metrics.in_a_row >= plan.divergence.limit:
                    _fail(f"{reason}, the last of {metrics.in_a_row} such steps in a row")

    def _overflowed(self, step: int, metrics: Metrics) -> None:
        scale, times = float(metrics.loss_scale.scale), int(metrics.loss_scale.at_min)
        reason = f"float16 gradients overflowed, the loss scale is now {scale:g}"
        self._run.log("step_skipped", step, {"reason": reason})
        if times >= self._plan.limit_at_min_scale:
            raise RunFailed(
                f"float16 gradients of step {step} overflow although the loss scale is at its "
                f"least, {scale:g}, the last of {times} such steps in a row: set "
                "training.precision=bfloat16, or lower training.loss_scale.min"
            )

    def _log(self, step: int, metrics: Metrics) -> None:
        mean_seconds = self._unlogged_seconds / self._unlogged_steps
        self._unlogged_steps, self._unlogged_seconds = 0, 0.0
        loss, objective = float(metrics.loss), float(metrics.objective)
        told = {
            "train/loss": loss,
            "optimizer/learning_rate": float(metrics.learning_rate),
            "optimizer/grad_norm": float(metrics.grad_norm),
            "perf/step_ms": 1e3 * mean_seconds,
            "perf/tokens_per_second": self._plan.tokens_per_step / mean_seconds,
            "perf/peak_memory_bytes": peak_memory_bytes(),
            "elapsed_seconds": self._train_seconds,
        }
        if self._plan.peak_tokens_per_second is not None:  # Chowdhery et al. 2022, appendix B
            mfu = told["perf/tokens_per_second"] / self._plan.peak_tokens_per_second
            told["perf/mfu"] = mfu
        if objective != loss:
            told["train/objective"] = objective
        if metrics.balance_loss:
            told["train/balance_loss"] = float(metrics.balance_loss)
        if not math.isnan(metrics.noise_tokens):
            told["noise/scale_tokens"] = float(metrics.noise_tokens)
        if self._plan.scales_loss:
            told["precision/loss_scale"] = float(metrics.loss_scale.scale)
            told["precision/skipped_steps"] = int(metrics.loss_scale.overflows)
        self._run.log("train_step", step, told)
