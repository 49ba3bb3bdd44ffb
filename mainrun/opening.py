"""A run opened: its folder made or found, its record, checkpoints and tracker at hand.

All that the user may have got wrong is found while it is prepared, before the folder is touched.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from mainrun import folder, memory, parts, trained
from mainrun.compilation import Compilation, initial_shapes, initial_state
from mainrun.config import Config
from mainrun.console import say
from mainrun.data import sources, tokenizers
from mainrun.environment import write_environment
from mainrun.errors import UserError
from mainrun.live_run import LiveRun, Stopping, Watch
from mainrun.origin import Base
from mainrun.parts import Parts, Texts
from mainrun.result import resume_command
from mainrun.tracking import open_tracker
from mainrun.training import backend
from mainrun.training.checkpoint import Checkpoints, Progress, Restored
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
) -> Prepared:
    """A new run. Raises UserError for whatever cannot be read or cannot work."""
    _prepare_process(config)
    config = _with_pinned_data(config)
    base = _load_base(config)
    texts = read(config, base.tokenizer if base else None)
    config = memory.settled(config, texts.tokenizer.get_vocab_size())
    return Prepared(config, parts.assemble(config, texts), base, command, run_dir, name)


def prepare_to_resume(
    run_dir: Path,
    overrides: Sequence[str],
    *,
    command: Sequence[str],
    read: ReadTexts = read_texts,
) -> Prepared:
    """A run to go on with. Raises UserError where its folder or its data is not what it was."""
    config = folder.config_to_resume(run_dir, overrides)
    base = trained.base_to_resume(config, run_dir)
    _prepare_process(config)
    texts = read(config, tokenizers.load(run_dir / "tokenizer.json"))
    if texts.fingerprint != (trained_on := folder.data_fingerprint(run_dir)):
        raise UserError(
            f"data.source={config.data.source} is not what the run was trained on (fingerprint "
            f"{texts.fingerprint[:12]}, not {trained_on[:12]}): resume with the data it had"
        )
    config = memory.settled(config, texts.tokenizer.get_vocab_size())
    joined = parts.assemble(config, texts)
    return Prepared(config, joined, base, command, run_dir, run_dir.name, overrides)


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
        run_dir = _made(prepared)
    else:
        assert prepared.run_dir is not None
        run_dir = prepared.run_dir
        restored, damaged = _newest(run_dir, _restorable(config, joined, base))
        if restored is None and base is None and config.training.init_from is not None:
            base = trained.find_base(config, run_dir)
    step = restored.step if restored else 0
    with (
        open_tracker(
            run_dir,
            config,
            total_steps=joined.plan.total_steps,
            resume_step=None if prepared.overrides is None else step,
            label=label,
        ) as tracker,
        Checkpoints(run_dir / "checkpoints", keep=config.training.checkpoint.keep) as saved,
    ):
        if prepared.overrides is not None:
            saved.discard_after(restored.step if restored else -1)
            for reason in damaged:
                tracker.log("warning", message=f"damaged checkpoint left out: {reason}")
            tracker.log("resumed", step, overrides=list(prepared.overrides), damaged=damaged)
            _write_environment(prepared, run_dir)
        if joined.network.kernel.warning is not None:
            tracker.log("warning", message=joined.network.kernel.warning)
        again = resume_command(run_dir, prepared.overrides or ())
        run = LiveRun(config, joined, tracker, saved, stopping, again, watch)
        state = restored.state if restored else initial(config, joined, base)
        if prepared.overrides is None:
            run.tell_start(run_dir.name, state, compilation)
        yield Opened(run, state, restored.progress if restored else Progress())


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


def _load_base(config: Config) -> Base | None:
    if config.training.init_from is not None:
        say(f"reading {config.training.init_from}")
    return trained.load_base(config)


def _newest(run_dir: Path, like: TrainState) -> tuple[Restored | None, list[str]]:
    """The newest whole checkpoint, read before the record is locked, so nothing is changed."""
    path = run_dir / "checkpoints"
    if not path.is_dir():
        return None, []
    with Checkpoints(path, read_only=True) as stored:
        return stored.restore_newest(like)


def _restorable(config: Config, joined: Parts, base: Base | None) -> TrainState:
    """What a checkpoint is read into: shapes, and the base that it does not hold."""
    shapes = initial_shapes(config, joined, base)
    return shapes._replace(frozen=base.params) if base and shapes.frozen else shapes


def _with_pinned_data(config: Config) -> Config:
    """The config with the commit of its hub data set, so that resuming reads the same anywhere."""
    return replace(config, data=replace(config.data, revision=sources.revision(config.data)))
