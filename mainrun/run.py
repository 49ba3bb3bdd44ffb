"""A training run from its first word to its last: new, resumed, or only tried.

Signals are listened to here, and the step is compiled; how a run is prepared and opened is
`opening`'s, what happens in it `live_run`'s.
"""

from collections.abc import Sequence
from pathlib import Path

from mainrun import folder, memory, run_config, stop
from mainrun.compilation import Compiled, compile_step, initial_shapes
from mainrun.config import Config
from mainrun.console import say
from mainrun.model.gpt import num_parameters
from mainrun.opening import Prepared, opened, prepare, prepare_to_resume
from mainrun.tracking import write_views
from mainrun.trained import Which
from mainrun.training import backend, cluster
from mainrun.training.loop import drive
from mainrun.training.step import TrainState
from mainrun.training.trainee import Alone


def train(config: Config, run_dir: Path | None, name: str, *, command: Sequence[str]) -> None:
    """Train in a new run folder, `run_dir` or one named after date and `name`.

    Raises UserError, RunFailed or Stopped.
    """
    with cluster.together():
        _go(prepare(config, run_dir, name, command=command))


def resume(
    run_dir: Path,
    overrides: Sequence[str],
    *,
    command: Sequence[str],
    checkpoint: Which = "newest",
) -> None:
    """Go on from the newest whole checkpoint, as if never interrupted; or from another.

    Checkpoints after that one are set aside. A finished run is told so, and its views are made
    anew: it may have been killed before it had them.

    Raises UserError, RunFailed or Stopped.
    """
    run_config.load_to_resume(run_dir, overrides)
    if not overrides and checkpoint == "newest" and folder.is_finished(run_dir):
        say(f"{run_dir} is finished: nothing is left to do")
        write_views(run_dir)
        return
    folder.check_open(run_dir)
    with cluster.together():
        _go(prepare_to_resume(run_dir, overrides, command=command, checkpoint=checkpoint))


def dry_run(config: Config) -> str:
    """Everything up to the first step; a report of what a run would be and need."""
    prepared = prepare(config, None, "", command=())
    compilation = _compile(prepared).compilation
    joined, texts, plan = prepared.joined, prepared.texts, prepared.joined.plan
    shapes = initial_shapes(prepared.config, joined, prepared.base)
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
        ("attention", str(joined.network.kernel)),
        ("memory of a step", f"{memory.gibibytes(compilation.step_bytes)} by the compiler's count"
                             + (f", {memory.gibibytes(limit)} available" if limit else "")),
        ("by part", memory.by_part(compilation.estimate)),
        ("compilation", f"{compilation.seconds:.1f} s"),
    ]  # fmt: skip
    return "\n".join(f"{name:16} {value}" for name, value in rows)


def _go(prepared: Prepared) -> None:
    # Only now: until there is something to save, a signal simply ends the process.
    with stop.listening() as stopping:
        compiled = _compile(prepared)
        with opened(prepared, compiled.compilation, stopping) as (run, state, progress):
            trainee = Alone(state, compiled.run, compiled.feed)
            del state  # the first step takes its memory over
            with cluster.together():
                drive(run.course(trainee, progress), trainee.take)


def _compile(prepared: Prepared) -> Compiled:
    say("compiling the training step")
    return compile_step(prepared.config, prepared.joined, prepared.base)


def _parameters(state: TrainState) -> str:
    """How many there are, and how many of them are trained."""
    trains = f", {num_parameters(state.params):,} of them trained" if state.frozen else ""
    return f"{num_parameters(state.all_params):,}{trains}"
