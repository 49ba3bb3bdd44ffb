"""`mainrun sweep`: many trials of one search space, each a normal run in a process of its own.

Here is only which sweep is meant and which engine works on it: the one here, which needs no account
(`local_sweep`), or W&B's server and agent (`wandb_sweep`). Both leave the same folder.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from mainrun import probe
from mainrun.errors import UserError
from mainrun.sweep import local_sweep, search_space, sweep_file, wandb_sweep
from mainrun.sweep.search_space import SearchSpace
from mainrun.sweep.sweep_folder import load, open_folder
from mainrun.wandb_run import check_wandb

Backend = Literal["auto", "local", "wandb"]


def run(
    source: Path,
    overrides: Sequence[str] = (),
    *,
    count: int | None = None,
    backend: Backend = "auto",
    sweep_id: str | None = None,
    run_dir: Path | None = None,
    population: int | None = None,
) -> Path:
    """Runs trials of `source`, a sweep file or the folder of a sweep, which is gone on with.

    Returns the folder, which is `run_dir` or `runs/<date>-<time>-<file>`.

    `overrides` hold for all trials. `count` is how many trials the folder shall have in the end;
    without it, `run_cap` or the size of the grid. `population` trials train side by side, without
    it as many as gain by it; W&B's agent has them one after another. Raises UserError, RunFailed or
    Stopped.
    """
    if sweep_id is not None:
        if backend == "local":
            raise UserError("--id names a sweep at Weights & Biases: leave out --backend local")
        return wandb_sweep.join(source, sweep_id, overrides, count=count, run_dir=run_dir)
    if source.is_dir():
        if overrides:
            raise UserError(
                f"{overrides[0]!r}: the settings of {source} are made and cannot change"
            )
        if run_dir is not None and run_dir.resolve() != source.resolve():
            raise UserError(f"{source} is a sweep already: it goes on there, not in {run_dir}")
        sweep = load(source)
        _check_open(source)
        if _engine(backend, sweep.space, source) == "wandb":
            return wandb_sweep.go_on(sweep, count=count)
    else:
        space = search_space.with_overrides(sweep_file.read(source), overrides)
        if _engine(backend, space, run_dir) == "wandb":
            return wandb_sweep.start(source, space, count=count, run_dir=run_dir)
        if run_dir is None or not run_dir.exists():
            _check_mesh(space)
            local_sweep.num_trials(space, count, None)  # before there is a folder
        sweep = open_folder(source, space, run_dir)
        _check_open(sweep.folder)
    local_sweep.work(sweep, count, population)
    return sweep.folder


def _check_open(folder: Path) -> None:
    """UserError where a sweep could not go on, since nobody may write there."""
    try:
        probe.check(folder / "trials")
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): make room or give this user the "
            "right, or go on with a copy of it"
        ) from error


def _check_mesh(space: SearchSpace) -> None:
    """Raises UserError for trials that ask for more than a device each."""
    for axis, size in asdict(search_space.base_config(space).mesh).items():
        if size > 1:
            raise UserError(f"mesh.{axis}={size}: a sweep trains each trial on one device")


def _engine(backend: Backend, space: SearchSpace, run_dir: Path | None) -> Backend:
    """`local` or `wandb`; an existing folder goes on with the engine that it has."""
    known = None
    if run_dir is not None and (run_dir / "sweep.yaml").is_file():
        known = "local" if wandb_sweep.address(run_dir) is None else "wandb"
        if backend not in ("auto", known):
            raise UserError(f"--backend {backend}: {run_dir} was begun with {known}: leave it out")
    if known == "wandb" or backend == "wandb":
        return "wandb"
    if known == "local" or backend == "local":
        return "local"
    return "wandb" if check_wandb(search_space.base_config(space)) == "online" else "local"
