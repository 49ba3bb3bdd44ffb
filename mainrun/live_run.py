"""A run while it goes on: what the loop calls, joined to tracker, checkpoints and stop signal."""

import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from mainrun.compilation import Compilation
from mainrun.config import Config
from mainrun.data import tokenizers
from mainrun.errors import RunFailed, Stopped
from mainrun.model.generate import generate
from mainrun.model.gpt import Params, num_parameters
from mainrun.parts import Parts
from mainrun.tracking import Tracker
from mainrun.training import backend, cluster, evaluate
from mainrun.training.checkpoint import Checkpoints, Damaged, Progress
from mainrun.training.loop import Course, course
from mainrun.training.step import TrainState
from mainrun.training.trainee import Trainee

_SAMPLE_TOKENS = 32

Watch = Callable[[int, Mapping[str, float]], None]
"""Is told the step and the metrics of every evaluation."""


@runtime_checkable
class Stopping(Protocol):
    """Whether the run shall stop, and why, where it is not simply asked to."""

    @property
    def reason(self) -> str | None: ...

    def requested(self) -> bool: ...

    def check(self) -> None:
        """Raises Stopped when a stop was requested."""


class Voted:
    """A stop that any process of a run may ask for, and all obey at one step."""

    def __init__(self, own: Stopping) -> None:
        self._own, self._vote = own, cluster.Vote(0)

    @property
    def reason(self) -> str | None:
        return self._own.reason

    def requested(self) -> bool:
        return self._vote(int(self._own.requested())) > 0

    def check(self) -> None:
        if self.requested():
            raise Stopped


class LiveRun:
    """What the loop calls: batches, evaluations, checkpoints, the log and the stop signal."""

    def __init__(
        self,
        config: Config,
        joined: Parts,
        tracker: Tracker,
        saved: Checkpoints,
        stopping: Stopping,
        resume_with: str,
        watch: Watch = lambda step, found: None,
    ) -> None:
        self._config, self._parts, self._watch = config, joined, watch
        self._tracker, self._saved, self._stopping = tracker, saved, Voted(stopping)
        self._resume_with = resume_with
        self._score_batch = evaluate.make_score_batch(
            joined.network,
            micro_batches=joined.micro_batches,
            mask_documents=config.data.mask_documents,
            head_tokens=joined.head_tokens,
            layout=joined.layout,
        )

    def tell_start(
        self, name: str, state: TrainState, progress: Progress, compilation: Compilation
    ) -> None:
        """What the run is, and the best that it has come to, where the record knows neither."""
        texts = self._parts.texts
        self._tracker.log(
            "run_started",
            0,
            name=name,
            parameters=num_parameters(state.all_params),
            trained_parameters=num_parameters(state.params),
            vocab_size=self._parts.network.vocab_size,
            total_steps=self._parts.plan.total_steps,
            steps_per_epoch=self._parts.steps_per_epoch,
            train_documents=texts.num_train_documents,
            val_documents=len(texts.validation.tokens),
            train_tokens=texts.num_train_tokens,
            val_tokens=int(texts.validation.tokens.sum()),
            device=backend.describe_device(),
            mesh=str(self._parts.layout),
            precision=self._config.training.precision,
            attention=str(self._parts.network.kernel),
            micro_batches=self._parts.micro_batches,
            compile_seconds=compilation.seconds,
            step_bytes=compilation.step_bytes,
            estimated_step_bytes=compilation.estimate.total_bytes,
            memory_bytes=compilation.estimate.by_part,
        )
        if progress.best_step >= 0:  # the record is lost, and a checkpoint was not
            self._tracker.log("evaluation", progress.best_step, **{"val/loss": progress.best_loss})

    def course(self, trainee: Trainee, progress: Progress) -> Course:
        """The run from here to its end, for whoever takes its steps. Raises as `loop.course`."""
        try:
            progress = yield from course(trainee, progress, self._parts.plan, self)
            self._saved.wait()
            self._check_learned(trainee.state)
        except Stopped:
            self._saved.wait()
            reason = self._stopping.reason
            why: dict[str, Any] = {} if reason is None else {"reason": reason}
            self._tracker.log("stopped", resume_command=self._resume_with, **why)
            raise
        return progress

    def _check_learned(self, state: TrainState) -> None:
        """Raises RunFailed where every step was skipped: the parameters are the first ones."""
        if int(state.updates) > 0:
            return
        skipped = f"each of the {int(state.step)} steps was skipped"
        if self._config.training.precision == "float16" and int(state.loss_scale.overflows) > 0:
            raise RunFailed(
                f"{skipped}, since float16 gradients overflowed, up to a loss scale of "
                f"{float(state.loss_scale.scale):g}: lower training.loss_scale.initial, train for "
                "more steps, or set training.precision=bfloat16"
            )
        raise RunFailed(f"{skipped}, since the loss was no number or jumped: nothing was learnt")

    def evaluate(self, state: TrainState) -> float:
        started, number = time.perf_counter(), int(state.step)
        found = self._scored(state.all_params)
        if state.average:
            averaged = self._scored(state.all_averaged)
            found |= {
                name.replace("val/", "val_average/"): value for name, value in averaged.items()
            }
        seconds = {"val/seconds": time.perf_counter() - started}
        samples = self._samples(state)
        self._stopping.check()
        self._tracker.log("evaluation", number, **found, **seconds)
        if samples:
            self._tracker.log("samples", number, texts=samples)
        self._watch(number, found)
        return found["val/loss"]

    def _scored(self, params: Params) -> dict[str, float]:
        """The `val/` metrics of these parameters."""
        text, batch_size = self._parts.texts.validation, self._config.training.batch_size
        scored = evaluate.score(
            self._score_batch, params, text.windows, batch_size, self._stopping.check
        )
        context_length = self._config.data.context_length
        return evaluate.metrics(scored, text, batch_size=batch_size, context_length=context_length)

    def save(self, state: TrainState, progress: Progress, *, best: bool) -> None:
        number = int(state.step)
        self._saved.save(number, state, progress)
        self._tracker.log("checkpoint", number, best=best, path=f"checkpoints/{number}")

    def saved(self, number: int, like: TrainState) -> TrainState:
        self._saved.wait()
        cluster.wait_for_all()
        try:
            return self._saved.restore(number, like)[0]
        except Damaged as error:
            raise RunFailed(
                f"the checkpoint of step {number}, to go back to, is damaged: {error}"
            ) from error

    def log(self, event: str, number: int, fields: Mapping[str, float | str]) -> None:
        self._tracker.log(event, number, **fields)

    def stop_requested(self) -> bool:
        return self._stopping.requested()

    def _samples(self, state: TrainState) -> list[str]:
        """A few documents, drawn with a key of this step."""
        count, eos_id = self._config.training.num_samples, self._parts.texts.eos_id
        if count == 0:
            return []
        tokens = generate(
            self._parts.network,
            state.all_params,
            np.full((count, 1), eos_id, np.int32),
            np.ones(count, np.int32),
            jax.random.fold_in(jax.random.key(self._config.seed), int(state.step)),
            max_tokens=min(_SAMPLE_TOKENS, self._config.data.context_length - 1),
            eos_id=eos_id,
        )
        return [tokenizers.decode(self._parts.texts.tokenizer, row) for row in np.asarray(tokens)]
