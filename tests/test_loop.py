"""The order of steps, evaluations and checkpoints, whatever interrupts it."""

import dataclasses

import jax.numpy as jnp
import pytest

from mainrun.errors import RunFailed, Stopped
from mainrun.training.checkpoint import Progress
from mainrun.training.loop import Plan, fit
from mainrun.training.step import Metrics, TrainState

PLAN = Plan(total_steps=10, eval_every=4, checkpoint_every=3, log_every=1, tokens_per_step=64)


def state(step: int) -> TrainState:
    return TrainState(jnp.asarray(step), {}, (), jnp.zeros(2, jnp.uint32), {})


def train_step(state: TrainState, batch: float) -> tuple[TrainState, Metrics]:
    """Its loss is the batch, so that a test decides it."""
    metrics = Metrics(jnp.asarray(batch), jnp.asarray(1.0), jnp.asarray(0.1), jnp.asarray(0.0))
    return state._replace(step=state.step + 1), metrics


class Surroundings:
    """Writes down what the loop asks for; stops when told to."""

    def __init__(self, stop_at: str = "", losses: dict[int, float] | None = None) -> None:
        self.told: list[str] = []
        self.saved: dict[int, Progress] = {}
        self._stop_at, self._losses = stop_at, losses or {}

    def batch(self, index: int) -> float:
        return self._losses.get(index, 1.0)

    def evaluate(self, state: TrainState) -> float:
        step = int(state.step)
        if self._stop_at == f"evaluation {step}":
            raise Stopped
        self.told.append(f"evaluation {step}")
        return abs(step - 6.0)  # the best is at 4 and, no better, at 8

    def save(self, state: TrainState, progress: Progress, *, best: bool) -> None:
        step = int(state.step)
        self.told.append(f"save {step}" + (" best" if best else ""))
        self.saved[step] = dataclasses.replace(progress, train_seconds=0.0)

    def log_step(self, number: int, metrics: dict[str, float]) -> None:
        self.told.append(f"step {number}")

    def stop_requested(self) -> bool:
        return self._stop_at in self.told


STRAIGHT = [
    "evaluation 0", "step 1", "step 2", "step 3", "save 3", "step 4", "evaluation 4", "save 4 best",
    "step 5", "step 6", "save 6", "step 7", "step 8", "evaluation 8", "step 9", "save 9", "step 10",
    "evaluation 10", "save 10",
]  # fmt: skip


def test_everything_happens_in_its_order() -> None:
    run = Surroundings()
    final, progress = fit(state(0), Progress(), train_step, PLAN, run)
    assert run.told == STRAIGHT
    assert int(final.step) == 10
    assert (progress.best_step, progress.best_loss, progress.evaluated_step) == (4, 2.0, 10)


# A stop during the last step changes nothing any more: the run is then finished.
@pytest.mark.parametrize("stop_at", [x for x in STRAIGHT[:-1] if x != "step 10"])
def test_a_stop_at_any_place_is_saved_and_resuming_does_the_rest(stop_at: str) -> None:
    first = Surroundings(stop_at)
    with pytest.raises(Stopped):
        fit(state(0), Progress(), train_step, PLAN, first)
    newest = max(first.saved)
    assert first.told[-1].startswith(f"save {newest}")
    second = Surroundings()
    _, progress = fit(state(newest), first.saved[newest], train_step, PLAN, second)
    told = [*first.told, *second.told]
    facts = [t for t in told if not t.startswith("save")]
    assert facts == [t for t in STRAIGHT if not t.startswith("save")]
    progress = dataclasses.replace(progress, train_seconds=0.0)
    assert progress == Progress(evaluated_step=10, best_step=4, best_loss=2.0)


@pytest.mark.parametrize("step", [3, 4, 6, 9])
def test_resuming_from_any_checkpoint_repeats_what_came_after_it(step: int) -> None:
    whole = Surroundings()
    fit(state(0), Progress(), train_step, PLAN, whole)
    again = Surroundings()
    fit(state(step), whole.saved[step], train_step, PLAN, again)
    after = max(i for i, told in enumerate(STRAIGHT) if told.startswith(f"save {step}"))
    assert again.told == STRAIGHT[after + 1 :]


def test_a_run_that_was_saved_at_its_end_has_nothing_to_do() -> None:
    run = Surroundings()
    fit(state(10), Progress(evaluated_step=10), train_step, PLAN, run)
    assert run.told == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(bad: float) -> None:
    run = Surroundings(losses={2: bad})
    with pytest.raises(RunFailed, match="loss of step 3 is"):
        fit(state(0), Progress(), train_step, PLAN, run)
    assert run.saved == {}


def test_seldom_records_average_the_time_between_them() -> None:
    told: dict[int, dict[str, float]] = {}

    class Timed(Surroundings):
        def log_step(self, number: int, metrics: dict[str, float]) -> None:
            told[number] = metrics

    plan = dataclasses.replace(PLAN, log_every=4)
    _, progress = fit(state(0), Progress(), train_step, plan, Timed())
    assert list(told) == [4, 8, 10]
    total = sum(told[n]["perf/step_ms"] * k for n, k in ((4, 4), (8, 4), (10, 2)))
    assert total == pytest.approx(1e3 * progress.train_seconds)
    assert told[8]["perf/tokens_per_second"] == pytest.approx(64e3 / told[8]["perf/step_ms"])
