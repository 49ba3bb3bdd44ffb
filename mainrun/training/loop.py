"""The loop: steps, evaluations and checkpoints in an order that a resumed run repeats exactly.

At every step number the order is: evaluate if due, save if due, stop if asked, take the step. The
loop knows no file, signal or tracker; it is handed what to call. Nothing in it waits for the
device but reading metrics, and step n's are read after step n + 1 was dispatched.
"""

import dataclasses
import math
import time
from typing import Protocol, runtime_checkable

import jax

from mainrun.data.batches import Batch
from mainrun.errors import RunFailed, Stopped
from mainrun.training.backend import peak_memory_bytes
from mainrun.training.checkpoint import Progress
from mainrun.training.step import Metrics, TrainState, TrainStep


@dataclasses.dataclass(frozen=True)
class Plan:
    """When things happen, in optimizer steps."""

    total_steps: int
    eval_every: int | None  # None: before the first and after the last step only
    checkpoint_every: int
    log_every: int
    tokens_per_step: int

    def evaluates(self, step: int) -> bool:
        regular = self.eval_every is not None and step % self.eval_every == 0
        return regular or step in (0, self.total_steps)

    def saves(self, step: int) -> bool:
        return step > 0 and (step % self.checkpoint_every == 0 or step == self.total_steps)


@runtime_checkable
class Surroundings(Protocol):
    """What a run lends the loop."""

    def batch(self, index: int) -> Batch: ...

    def evaluate(self, state: TrainState) -> float:
        """Log the metrics of these parameters; their `val/loss`. Raises Stopped to give up."""

    def save(self, state: TrainState, progress: Progress, *, best: bool) -> None: ...

    def log_step(self, step: int, metrics: dict[str, float]) -> None: ...

    def stop_requested(self) -> bool: ...


def fit(
    state: TrainState, progress: Progress, train_step: TrainStep, plan: Plan, run: Surroundings
) -> tuple[TrainState, Progress]:
    """The state after the last step. Raises Stopped once a requested stop is saved."""
    pipeline = _Pipeline(plan, run, progress.train_seconds)
    first_step = step = int(state.step)
    while True:
        due = plan.saves(step) and step > first_step
        if plan.evaluates(step) and progress.evaluated_step < step:
            progress = pipeline.drain(progress)
            try:
                loss = run.evaluate(state)
            except Stopped:
                run.save(state, progress, best=False)
                raise
            progress = dataclasses.replace(progress, evaluated_step=step)
            if loss < progress.best_loss:
                progress = dataclasses.replace(progress, best_step=step, best_loss=loss)
                due = due or step > 0
        if due:
            progress = pipeline.drain(progress)
            run.save(state, progress, best=progress.best_step == step)
        if step >= plan.total_steps:
            return state, progress
        if run.stop_requested():
            progress = pipeline.drain(progress)
            if not due:
                run.save(state, progress, best=progress.best_step == step)
            raise Stopped
        state = pipeline.dispatch(step, state, train_step)
        step += 1


class _Pipeline:
    """Dispatches steps and reads each one's metrics one step late, timing them as they finish."""

    def __init__(self, plan: Plan, run: Surroundings, train_seconds: float) -> None:
        self._plan, self._run = plan, run
        self._train_seconds = train_seconds
        self._waiting: tuple[int, Metrics] | None = None
        self._since = 0.0  # when the device began with the step that is waited for
        self._unlogged_steps, self._unlogged_seconds = 0, 0.0

    def dispatch(self, step: int, state: TrainState, train_step: TrainStep) -> TrainState:
        started = time.perf_counter()
        state, metrics = train_step(state, self._run.batch(step))
        if self._waiting is None:
            self._since = started
        else:
            self._read()
        self._waiting = step + 1, metrics
        return state

    def drain(self, progress: Progress) -> Progress:
        """Read what is still on the device, so that it is logged before what comes next."""
        if self._waiting is not None:
            self._read()
            self._waiting = None
        return dataclasses.replace(progress, train_seconds=self._train_seconds)

    def _read(self) -> None:
        assert self._waiting is not None
        step, on_device = self._waiting
        metrics = jax.device_get(on_device)
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        self._train_seconds += seconds
        self._unlogged_steps += 1
        self._unlogged_seconds += seconds
        loss = float(metrics.loss)
        if not math.isfinite(loss) or not math.isfinite(float(metrics.grad_norm)):
            raise RunFailed(
                f"the loss of step {step} is {loss} and its gradient norm {metrics.grad_norm}: "
                "training diverged; lower optimizer.learning_rate or lengthen schedule.warmup"
            )
        if step % self._plan.log_every == 0 or step == self._plan.total_steps:
            mean_seconds = self._unlogged_seconds / self._unlogged_steps
            self._unlogged_steps, self._unlogged_seconds = 0, 0.0
            balance = float(metrics.balance_loss)
            self._run.log_step(
                step,
                {
                    "train/loss": loss,
                    **({"train/balance_loss": balance} if balance else {}),
                    "optimizer/learning_rate": float(metrics.learning_rate),
                    "optimizer/grad_norm": float(metrics.grad_norm),
                    "perf/step_ms": 1e3 * mean_seconds,
                    "perf/tokens_per_second": self._plan.tokens_per_step / mean_seconds,
                    "perf/peak_memory_bytes": peak_memory_bytes(),
                    "elapsed_seconds": self._train_seconds,
                },
            )
