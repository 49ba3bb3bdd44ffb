"""A run opened: its folder made or found, its record, checkpoints and tracker at hand.

All that the user may have got wrong is found while it is prepared, before the folder is touched.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
from tokenizers import Tokenizer

from mainrun import folder, memory, parts, run_config, trained
from mainrun.compilation import Compilation, initial_shapes, initial_state
from mainrun.config import Config
from mainrun.console import be_quiet, say
from mainrun.data import sources
from mainrun.environment import write_environment
from mainrun.errors import RunFailed, UserError
from mainrun.fingerprint import check_data, fingerprint
from mainrun.live_run import LiveRun, Stopping, Watch
from mainrun.origin import Base
from mainrun.parts import Parts, Texts
from mainrun.record import Row, metrics, read_events
from mainrun.result import resume_command
from mainrun.tracking import Silent, Tracker, open_tracker
from mainrun.trained import Which
from mainrun.training import backend, cluster, mesh
from mainrun.training.checkpoint import Checkpoints, Damaged, Progress, Restored
from mainrun.training.loop import evaluated
from mainrun.training.mesh import Layout
from mainrun.training.step import TrainState
from mainrun.wandb_run import check_wandb

ReadTexts = Callable[[Config, Tokenizer | None], Texts]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A run whose data is read and whose parts are joined; nothing is made yet."""

    config: Config
    joined: Parts
    base: Base | None
    command: Sequence[str]
    run_dir: Path | None  # None: a new one, after the date and `name`
    name: str
    overrides: Sequence[str] | None = None  # of a run to go on with; None: a new run
    step: int | None = None  # to go on from; None: the newest whole checkpoint

    @property
    def texts(self) -> Texts:
        return self.joined.texts


class Opened(NamedTuple):
    run: LiveRun
    state: TrainState
    progress: Progress


def read_texts(config: Config, tokenizer: Tokenizer | None) -> Texts:
    """The corpus of a run, and a word that it is being read."""
    say(f"reading {config.data.source}")
    return parts.read_texts(config, tokenizer)


def prepare(
    config: Config,
    run_dir: Path | None,
    name: str,
    *,
    command: Sequence[str],
    read: ReadTexts = read_texts,
    layout: Layout | None = None,
) -> Prepared:
    """A new run, on the devices of the config's mesh where no layout is given.

    Raises UserError for whatever cannot be read or cannot work.
    """
    _prepare_process(config)
    config = _with_pinned_data(config)
    layout = layout or _layout(config)
    base = _load_base(config)
    texts = read(config, base.tokenizer if base else None)
    _check_same(texts.fingerprint)
    config = _settled(config, texts, layout)
    return Prepared(config, parts.assemble(config, texts, layout), base, command, run_dir, name)


def prepare_to_resume(
    run_dir: Path,
    overrides: Sequence[str],
    *,
    command: Sequence[str],
    checkpoint: Which = "newest",
    read: ReadTexts = read_texts,
    layout: Layout | None = None,
) -> Prepared:
    """A run to go on with, on whatever devices there are now.

    Raises UserError where its folder or its data is not what it was, or lacks the checkpoint.
    """
    config = run_config.load_to_resume(run_dir, overrides)
    step = None if checkpoint == "newest" else trained.step_of(run_dir, checkpoint)
    base = trained.base_to_resume(config, run_dir)
    _prepare_process(config)
    layout = layout or _layout(config)
    texts = read(config, folder.tokenizer(run_dir))
    check_data(run_dir, config.data.source, texts.fingerprint)
    config = _settled(config, texts, layout)
    joined = parts.assemble(config, texts, layout)
    return Prepared(config, joined, base, command, run_dir, run_dir.name, overrides, step)


@contextlib.contextmanager
def opened(
    prepared: Prepared,
    compilation: Compilation,
    stopping: Stopping,
    *,
    initial: Callable[[Config, Parts, Base | None], TrainState] = initial_state,
    watch: Watch = lambda step, found: None,
    label: str | None = None,
) -> Iterator[Opened]:
    """The run, ready to go on; however the block ends, the record says so.

    `initial` makes the state before the first step. `label` stands before what the run tells.
    Raises UserError, RunFailed or Stopped.
    """
    config, joined, base = prepared.config, prepared.joined, prepared.base
    restored: Restored | None = None
    damaged: list[str] = []
    if prepared.overrides is None:
        run_dir = Path(cluster.from_first(lambda: str(_made(prepared))))
    else:
        assert prepared.run_dir is not None
        run_dir = prepared.run_dir
        like = _restorable(config, joined, base)
        restored, damaged = _restored(run_dir, prepared.step, like)
        _check_same(f"checkpoint {restored.step if restored else None}")
        if restored is None and base is None and config.training.init_from is not None:
            base = trained.find_base(config, run_dir)
    step, progress = (restored.step, restored.progress) if restored else (0, Progress())
    if prepared.overrides is not None and progress.evaluated_step < step:
        # Killed between an evaluation and what is saved behind it: it is not made again.
        for row in _evaluations(run_dir, step):
            progress = evaluated(progress, step, row["val/loss"])
            watch(step, {name: float(value) for name, value in row.items() if name != "step"})
    telling = open_tracker(
        run_dir,
        config,
        total_steps=joined.plan.total_steps,
        resume_step=None if prepared.overrides is None else step,
        label=label,
    )
    with contextlib.ExitStack() as stack:
        tracker: Tracker = Silent()
        checkpoints = run_dir / "checkpoints"
        if cluster.is_first():
            tracker = stack.enter_context(telling)
            saved = Checkpoints(
                checkpoints,
                keep=config.training.checkpoint.keep,
                fingerprint=fingerprint(
                    config, run_dir / "tokenizer.json", prepared.texts.fingerprint
                ),
            )
            stack.enter_context(saved)
            if prepared.overrides is not None:
                if restored:
                    saved.set_aside_after(restored.step)
                for reason in damaged:
                    tracker.log("warning", message=f"damaged checkpoint set aside: {reason}")
                tracker.log(
                    "resumed",
                    step,
                    overrides=list(prepared.overrides),
                    damaged=damaged,
                    total_steps=joined.plan.total_steps,
                    device=backend.describe_device(),
                    precision=config.training.precision,
                )
                _write_environment(prepared, run_dir)
            if joined.network.kernel.warning is not None:
                tracker.log("warning", message=joined.network.kernel.warning)
        cluster.wait_for_all()
        if not cluster.is_first():
            saved = stack.enter_context(Checkpoints(checkpoints, read_only=True))
        run = LiveRun(config, joined, tracker, saved, stopping, resume_command(run_dir), watch)
        with memory.explained(compilation.step_bytes, config, joined.network.vocab_size):
            state = restored.state if restored else initial(config, joined, base)
            if not tracker.has_start:
                run.tell_start(run_dir.name, state, progress, compilation)
            yield Opened(run, state, progress)


def _made(prepared: Prepared) -> Path:
    """The folder of a new run, whole."""
    return folder.create(
        prepared.run_dir,
        prepared.name,
        prepared.config,
        prepared.texts.tokenizer,
        data_fingerprint=prepared.texts.fingerprint,
        device=backend.describe_device(),
        command=prepared.command,
        base=prepared.base.reference() if prepared.base else None,
    )


def _write_environment(prepared: Prepared, run_dir: Path) -> None:
    write_environment(
        run_dir,
        command=prepared.command,
        devices=[backend.describe_device()],
        data_fingerprint=prepared.texts.fingerprint,
    )


def _prepare_process(config: Config) -> None:
    """A process made ready for JAX; UserError for what the config asks of W&B in vain."""
    check_wandb(config)
    backend.prepare()
    if not cluster.is_first():
        be_quiet()


def _layout(config: Config) -> Layout:
    """The devices of the config's mesh, and a word where some are left out."""
    training, devices = config.training, jax.devices()
    cuts = 1 if training.grad_accumulation == "auto" else training.grad_accumulation
    examples = training.batch_size // cuts
    made = mesh.layout(config.mesh, examples, devices, processes=jax.process_count())
    if made.devices < len(devices):
        say(f"{made.devices} of {len(devices)} devices: more cannot share {examples} examples")
    return made


def _settled(config: Config, texts: Texts, layout: Layout) -> Config:
    """The config with a number of micro-batches: as many as one device's examples need."""
    share = memory.settled(layout.share_of(config), texts.tokenizer.get_vocab_size())
    cuts = share.training.grad_accumulation
    return replace(config, training=replace(config.training, grad_accumulation=cuts))


def _check_same(fact: str) -> None:
    """Raises UserError where the processes of this run do not see the same files."""
    if (first := cluster.from_first(lambda: fact)) != fact:
        raise UserError(
            f"process {jax.process_index()} reads other files than the first one ({fact[:20]}, not "
            f"{first[:20]}): all need the same data, and a run folder that all of them see"
        )


def _load_base(config: Config) -> Base | None:
    if config.training.init_from is not None:
        say(f"reading {config.training.init_from}")
    return trained.load_base(config)


def _restored(
    run_dir: Path, step: int | None, like: TrainState
) -> tuple[Restored | None, list[str]]:
    """The checkpoint to go on from, read before the record is locked, so nothing is changed."""
    path = run_dir / "checkpoints"
    if not path.is_dir():
        return None, []
    with Checkpoints(path, read_only=True) as stored:
        if step is None:
            return stored.restore_newest(like)
        try:
            return Restored(step, *stored.restore(step, like)), []
        except Damaged as error:
            raise RunFailed(
                f"{path / str(step)} is damaged ({error}): nothing was changed"
            ) from error


def _evaluations(run_dir: Path, step: int) -> list[Row]:
    """The row of this step, where the record has its evaluation."""
    path = run_dir / "events.jsonl"
    rows = metrics(read_events(path)) if path.is_file() else []
    return [row for row in rows if row["step"] == step and "val/loss" in row]


def _restorable(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """What a checkpoint is read into: shapes, and the base that it does not hold."""
    shapes = initial_shapes(config, joined, base)
    return shapes._replace(frozen=base.params) if base and shapes.frozen else shapes


def _with_pinned_data(config: Config) -> Config:
    """The config with the commit of its hub data set, so that resuming reads the same anywhere."""
    return replace(config, data=replace(config.data, revision=sources.revision(config.data)))
