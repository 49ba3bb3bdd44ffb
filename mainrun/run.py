"""A training run: the parts of a config joined to a run folder, new or resumed.

The world is met here: the folder is made, signals are listened to, the tracker and the checkpoints
are opened and closed. Whatever the user got wrong is found before the folder is touched.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from mainrun import folder, memory, parts, stop, trained
from mainrun.config import Config
from mainrun.data import sources, tokenizers
from mainrun.data.batches import Batch
from mainrun.environment import write_environment
from mainrun.errors import RunFailed, Stopped, UserError, one_line
from mainrun.model.generate import generate
from mainrun.model.gpt import Params, num_parameters
from mainrun.origin import Base
from mainrun.parts import Parts, Texts
from mainrun.result import resume_command
from mainrun.tracking import Tracker, open_tracker
from mainrun.training import backend, evaluate
from mainrun.training.checkpoint import Checkpoints, Progress, Restored
from mainrun.training.loop import fit
from mainrun.training.step import TrainState, TrainStep
from mainrun.wandb_run import check_wandb

_SAMPLE_TOKENS = 32


@dataclass(frozen=True, eq=False)
class Compiled:
    """The training step, ready to run, and what making it took."""

    train_step: TrainStep
    seconds: float
    step_bytes: int
    estimate: memory.Estimate


def train(config: Config, run_dir: Path | None, name: str, *, command: Sequence[str]) -> None:
    """Train in a new run folder, `run_dir` or one named after date and `name`.

    Raises UserError, RunFailed or Stopped.
    """
    config = _with_pinned_data(config)
    base = _load_base(config)
    texts = _read_texts(config, base.tokenizer if base else None)
    config = memory.settled(config, texts.tokenizer.get_vocab_size())
    # Only now: until there is something to save, a signal simply ends the process.
    with stop.listening() as stopping:
        joined, compiled = _assemble(config, texts, base)
        run_dir = folder.create(
            run_dir,
            name,
            config,
            texts.tokenizer,
            data_fingerprint=texts.fingerprint,
            device=backend.describe_device(),
            command=command,
            base=base.reference() if base else None,
        )
        with (
            open_tracker(run_dir, config, total_steps=joined.plan.total_steps) as tracker,
            Checkpoints(run_dir / "checkpoints", keep=config.training.checkpoint.keep) as saved,
        ):
            state = _initial(config, joined, base)
            run = _Run(config, joined, tracker, saved, stopping, resume_command(run_dir))
            run.tell_start(run_dir.name, state, compiled)
            run.go(state, Progress(), compiled.train_step)


def resume(run_dir: Path, overrides: Sequence[str], *, command: Sequence[str]) -> None:
    """Go on from the newest whole checkpoint, as if never interrupted.

    A finished run is told so and left alone. Raises UserError, RunFailed or Stopped.
    """
    config = folder.config_to_resume(run_dir, overrides)
    if not overrides and folder.is_finished(run_dir):
        _say(f"{run_dir} is finished: nothing is left to do")
        return
    base = trained.base_to_resume(config, run_dir)
    texts = _read_texts(config, tokenizers.load(run_dir / "tokenizer.json"))
    if texts.fingerprint != (trained_on := folder.data_fingerprint(run_dir)):
        raise UserError(
            f"data.source={config.data.source} is not what the run was trained on (fingerprint "
            f"{texts.fingerprint[:12]}, not {trained_on[:12]}): resume with the data it had"
        )
    config = memory.settled(config, texts.tokenizer.get_vocab_size())
    with stop.listening() as stopping:
        joined, compiled = _assemble(config, texts, base)
        restored, damaged = _newest(run_dir, _restorable(config, joined, base))
        if restored is None and base is None and config.training.init_from is not None:
            base = trained.find_base(config, run_dir)
        start = restored.step if restored else 0
        with (
            open_tracker(
                run_dir, config, total_steps=joined.plan.total_steps, resume_step=start
            ) as tracker,
            Checkpoints(run_dir / "checkpoints", keep=config.training.checkpoint.keep) as saved,
        ):
            saved.discard_after(restored.step if restored else -1)
            for reason in damaged:
                tracker.log("warning", message=f"damaged checkpoint left out: {reason}")
            tracker.log("resumed", start, overrides=list(overrides), damaged=damaged)
            write_environment(
                run_dir,
                command=command,
                devices=[backend.describe_device()],
                data_fingerprint=texts.fingerprint,
            )
            state = restored.state if restored else _initial(config, joined, base)
            progress = restored.progress if restored else Progress()
            again = resume_command(run_dir, overrides)
            run = _Run(config, joined, tracker, saved, stopping, again)
            run.go(state, progress, compiled.train_step)


def dry_run(config: Config) -> str:
    """Everything up to the first step; a report of what a run would be and need."""
    base = _load_base(config)
    texts = _read_texts(config, base.tokenizer if base else None)
    config = memory.settled(config, texts.tokenizer.get_vocab_size())
    joined, compiled = _assemble(config, texts, base)
    plan = joined.plan
    shapes = _initial_shapes(config, joined, base)
    limit = backend.memory_limit_bytes()
    rows = [
        ("parameters", _parameters(shapes)),
        ("vocabulary", f"{joined.network.vocab_size:,} tokens"),
        ("training text", f"{texts.num_train_documents:,} documents, "
                          f"{texts.num_train_tokens:,} tokens, {len(texts.train):,} windows"),
        ("validation text", f"{len(texts.validation.tokens):,} documents, "
                            f"{texts.validation.tokens.sum():,} tokens"),
        ("steps", f"{plan.total_steps:,}, {joined.steps_per_epoch:,} an epoch, "
                  f"{plan.tokens_per_step:,} tokens each in {joined.micro_batches} micro-batches"),
        ("device", backend.describe_device()),
        ("memory of a step", f"{memory.gibibytes(compiled.step_bytes)} by the compiler's count"
                             + (f", {memory.gibibytes(limit)} available" if limit else "")),
        ("by part", memory.by_part(compiled.estimate)),
        ("compilation", f"{compiled.seconds:.1f} s"),
    ]  # fmt: skip
    return "\n".join(f"{name:16} {value}" for name, value in rows)


def _parameters(state: TrainState) -> str:
    """How many there are, and how many of them are trained."""
    trains = f", {num_parameters(state.params):,} of them trained" if state.frozen else ""
    return f"{num_parameters(state.all_params):,}{trains}"


class _Run:
    """What the loop calls: batches, evaluations, checkpoints, the log and the stop signal."""

    def __init__(
        self,
        config: Config,
        joined: Parts,
        tracker: Tracker,
        saved: Checkpoints,
        stopping: stop.StopSignal,
        resume_with: str,
    ) -> None:
        self._config, self._parts = config, joined
        self._tracker, self._saved, self._stopping = tracker, saved, stopping
        self._resume_with = resume_with
        self._score_batch = evaluate.make_score_batch(
            joined.network,
            micro_batches=joined.micro_batches,
            mask_documents=config.data.mask_documents,
        )

    def tell_start(self, name: str, state: TrainState, compiled: Compiled) -> None:
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
            precision=self._config.training.precision,
            micro_batches=self._parts.micro_batches,
            compile_seconds=compiled.seconds,
            step_bytes=compiled.step_bytes,
            estimated_step_bytes=compiled.estimate.total_bytes,
            memory_bytes=compiled.estimate.by_part,
        )

    def go(self, state: TrainState, progress: Progress, train_step: TrainStep) -> None:
        try:
            fit(state, progress, train_step, self._parts.plan, self)
            self._saved.wait()
        except Stopped:
            self._saved.wait()
            self._tracker.log("stopped", resume_command=self._resume_with)
            raise

    def batch(self, index: int) -> Batch:
        return parts.batch(self._config, self._parts.texts, index)

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
        try:
            return self._saved.restore(number, like)[0]
        except Exception as error:  # damage has many shapes
            raise RunFailed(
                f"the checkpoint of step {number}, to go back to, is damaged: {one_line(error)}"
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
            jax.random.fold_in(jax.random.key(self._config.seed), state.step),
            max_tokens=min(_SAMPLE_TOKENS, self._config.data.context_length - 1),
            eos_id=eos_id,
        )
        return [tokenizers.decode(self._parts.texts.tokenizer, row) for row in np.asarray(tokens)]


def _read_texts(config: Config, tokenizer: Tokenizer | None = None) -> Texts:
    """The data, in a process made ready for JAX; UserError for whatever cannot be read."""
    check_wandb(config)
    backend.prepare()
    _say(f"reading {config.data.source}")
    return parts.read_texts(config, tokenizer)


def _load_base(config: Config) -> Base | None:
    if config.training.init_from is not None:
        _say(f"reading {config.training.init_from}")
    return trained.load_base(config)


def _assemble(config: Config, texts: Texts, base: Base | None) -> tuple[Parts, Compiled]:
    """Network and optimizer, and the step compiled; UserError for what cannot work or fit."""
    joined = parts.assemble(config, texts)
    _say("compiling the training step")
    compiled = _compile(config, joined, base)
    memory.check_fits(compiled.step_bytes, backend.memory_limit_bytes())
    return joined, compiled


def _newest(run_dir: Path, like: TrainState) -> tuple[Restored | None, list[str]]:
    """The newest whole checkpoint, read before the record is locked, so nothing is changed."""
    path = run_dir / "checkpoints"
    if not path.is_dir():
        return None, []
    with Checkpoints(path, read_only=True) as stored:
        return stored.restore_newest(like)


def _with_pinned_data(config: Config) -> Config:
    """The config with the commit of its hub data set, so that resuming reads the same anywhere."""
    return replace(config, data=replace(config.data, revision=sources.revision(config.data)))


def _compile(config: Config, joined: Parts, base: Base | None) -> Compiled:
    started = time.perf_counter()
    train_step = parts.train_step(config, joined)
    state = _initial_shapes(config, joined, base)
    batch = parts.batch(config, joined.texts, 0)
    executable = jax.jit(train_step, donate_argnums=0).lower(state, batch).compile()
    return Compiled(
        executable,
        time.perf_counter() - started,
        memory.executable_bytes(executable),
        memory.estimate(config, joined.network.vocab_size, joined.micro_batches, state),
    )


def _initial(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """The state before the first step. It takes the base's arrays over: one copy is enough."""
    make = jax.jit(_make_state(config, joined), donate_argnums=0)
    return make(base.params if base else None)


def _initial_shapes(config: Config, joined: Parts, base: Base | None) -> TrainState:
    return jax.eval_shape(_make_state(config, joined), base.params if base else None)


def _restorable(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """What a checkpoint is read into: shapes, and the base that it does not hold."""
    shapes = _initial_shapes(config, joined, base)
    return shapes._replace(frozen=base.params) if base and shapes.frozen else shapes


def _make_state(config: Config, joined: Parts) -> Callable[[Params | None], TrainState]:
    return partial(parts.initial_state, config, joined)


def _say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
