"""A sweep whose trials W&B's server chooses: registered or joined, and worked on by W&B's agent.

The agent is the one of the W&B command line, a process of its own that starts each trial as another
(`mainrun train`), so no trial leaves anything on the GPU for the next. The server's word is checked
like a file's: what is joined must be a search of settings that exist, and run nothing but
`mainrun train`. Here the address of the sweep is kept, and what its trials came to is gathered.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from mainrun import child, config
from mainrun.child import MAINRUN, say
from mainrun.errors import RunFailed, Stopped, UserError, one_line
from mainrun.record import read_events
from mainrun.stop import StopSignal, listening
from mainrun.sweep import search_space, sweep_file
from mainrun.sweep.search_space import SearchSpace
from mainrun.sweep.study import FAILURES_IN_A_ROW, UNFINISHED, Outcome, Trial
from mainrun.sweep.sweep_folder import (
    WANDB_ADDRESS,
    Sweep,
    go_on_command,
    load,
    open_folder,
    outcome_of,
    pruned,
    tell,
)  # fmt: skip
from mainrun.sweep.sweep_summary import Ending, Report
from mainrun.wandb_run import check_wandb

_ONLINE = "tracking.wandb=online"
_STOPPED_BY_SERVER = "stopped by Weights & Biases: others did better by then"
_SECONDS_TO_STOP = 150  # a trial's for saving, before the agent kills it; a container has 180


def start(source: Path, space: SearchSpace, *, count: int | None, run_dir: Path | None) -> Path:
    """Registers the search at W&B, or finds it in `run_dir`, and works on it; the folder."""
    _check_online(space.overrides)
    check_wandb(config.load(None, [_ONLINE]))
    online = search_space.with_overrides(space, [_ONLINE])
    made = open_folder(source, online, run_dir, files={WANDB_ADDRESS: "{}\n"})
    return go_on(made, count=count)


def join(
    source: Path,
    sweep_id: str,
    overrides: Sequence[str],
    *,
    count: int | None,
    run_dir: Path | None,
) -> Path:
    """Works on a sweep that W&B has; what is searched is said there. Returns the folder.

    `source` says which project, where the id does not.
    """
    _check_online(overrides)
    for override in overrides:
        if not override.lstrip("-").startswith("tracking.wandb="):
            raise UserError(
                f"{override!r}: what the trials of {sweep_id} share is said at Weights & Biases, "
                "where the sweep was registered"
            )
    check_wandb(config.load(None, [_ONLINE]))
    *place, name = sweep_id.split("/")
    if run_dir is not None and (known_here := address(run_dir)):
        if known_here["path"].split("/")[-1] != name:
            raise UserError(
                f"{run_dir} belongs to {known_here['path']}: {sweep_id} needs another --run-dir"
            )
        return go_on(load(run_dir), count=count)
    entity, project = _place(sweep_file.read(source))
    if len(place) > 2 or not all([*place, name]):
        raise UserError(f"--id {sweep_id}: write ENTITY/PROJECT/ID")
    say(f"the search is the one of {sweep_id} at Weights & Biases, not that of {source}")
    with _server() as server:
        project = place[-1] if place else project
        entity = place[0] if len(place) == 2 else entity or server.default_entity
        path = f"{entity}/{project}/{name}"
        try:
            found = server.sweep(path)
        except Exception as error:
            if isinstance(getattr(error, "exc", None), ValueError):  # as W&B wraps its "not found"
                raise UserError(f"--id {sweep_id}: Weights & Biases has no sweep {path}") from None
            raise
        definition, url = found.config, found.url
    space = sweep_file.from_definition(definition, {}, name=name, source=path)
    mode = check_wandb(search_space.base_config(space))
    if mode != "online":
        raise UserError(
            f"--id {sweep_id}: its trials would be {mode}, and Weights & Biases not told: its "
            f"`command` needs {_ONLINE}, as `mainrun sweep` registers it"
        )
    known = json.dumps({"path": path, "url": url}) + "\n"
    made = open_folder(Path(name), space, run_dir, files={WANDB_ADDRESS: known})
    return go_on(made, count=count)


def go_on(made: Sweep, *, count: int | None) -> Path:
    """Works on the sweep until the server, or the count, says it is enough; its folder."""
    check_wandb(config.load(None, [_ONLINE]))
    if not address(made.folder):
        _register(made)
    known = address(made.folder) or {}
    path = known["path"]
    limits = [limit for limit in (count, made.space.run_cap) if limit is not None]
    wanted = min(limits) if limits else None
    say(f"{made.space.name}: {made.space.method} by Weights & Biases: {known['url']}")

    def report(status: Ending, reason: str | None = None) -> None:
        trials, run_dirs = _trials(made)
        again = None if status == "finished" else go_on_command(made.folder)
        tell(
            Report(
                made.folder, made.space, status, reason, trials, wanted, run_dirs, again,
                url=known["url"],
            ),
            result=True,
        )  # fmt: skip

    with listening() as stopping:
        try:
            _resume_interrupted(made, path, stopping)
            _work(made, path, wanted, stopping)
        except Stopped:
            report("stopped")
            raise
        except RunFailed as error:
            report("failed", str(error))
            raise
        report("finished")
    return made.folder


def address(folder: Path) -> dict[str, str] | None:
    """Path and URL of the folder's sweep at W&B; empty before it has one, None without W&B."""
    file = folder / WANDB_ADDRESS
    if not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise RunFailed(f"{file}: damaged: {error}") from error


def _register(made: Sweep) -> None:
    entity, project = _place(made.space)
    with _server() as server:
        import wandb

        entity = entity or server.default_entity
        name = wandb.sweep(sweep_file.definition(made.space), entity=entity, project=project)
        path = f"{entity}/{project}/{name}"
        url = server.sweep(path).url
    file = made.folder / WANDB_ADDRESS
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({"path": path, "url": url}) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _resume_interrupted(made: Sweep, path: str, stopping: StopSignal) -> None:
    """The trial that was stopped with the sweep goes on first, as the same run of W&B's.

    Only the last: one before it was stopped by the server, which has seen enough of it.
    """
    names = _parameters_of_runs(made.folder)
    trials, run_dirs = _trials(made)
    if not trials or trials[-1].outcome.status != "running" or _came_to_its_end(made.folder):
        return
    run_id, run_dir = list(names)[-1], run_dirs[trials[-1].number]
    say(f"trial {trials[-1].number} goes on: {run_dir}")
    entity, project, name = path.split("/")
    ours = {
        "WANDB_SWEEP_ID": name,
        "WANDB_RUN_ID": run_id,
        "WANDB_ENTITY": entity,
        "WANDB_PROJECT": project,
        "WANDB_SWEEP_PARAM_PATH": str(names[run_id]),
    }
    with child.log(made.folder / "agent.log", stopping) as output:
        child.follow([*MAINRUN, "resume", str(run_dir)], output, stopping, os.environ | ours)
    stopping.check()


def _came_to_its_end(folder: Path) -> bool:
    """Whether the last agent here ended by itself."""
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        return bool(summary["status"] == "finished")
    except (OSError, ValueError, KeyError, TypeError):  # a view, which may be lost
        return False


def _work(made: Sweep, path: str, wanted: int | None, stopping: StopSignal) -> None:
    """The agent, from its start to its end. Raises Stopped or RunFailed."""
    left = None if wanted is None else wanted - len(_parameters_of_runs(made.folder))
    code = 0
    if left is None or left > 0:
        log = made.folder / "agent.log"
        with child.log(log, stopping) as output:
            code = child.follow(_agent(path, left), output, stopping, _environment(made.folder))
        stopping.check()
    trials, _ = _trials(made)
    reasons = [t.outcome.reason for t in trials if t.outcome.status == "failed"]
    last = [t.outcome.status for t in trials[-FAILURES_IN_A_ROW:]]
    if last == ["failed"] * FAILURES_IN_A_ROW:
        raise RunFailed(f"{len(last)} trials in a row failed, the last: {reasons[-1]}")
    if not any(t.outcome.status == "finished" for t in trials):
        why = reasons[-1] if reasons else f"see {made.folder / 'agent.log'}"
        raise RunFailed(f"no trial came to an end: {why}")
    if code != 0:
        raise RunFailed(f"W&B's agent ended with code {code}: see {made.folder / 'agent.log'}")


def _agent(path: str, count: int | None) -> list[str]:
    return [
        sys.executable, "-m", "wandb", "agent", "--forward-signals",
        "--term-timeout", str(_SECONDS_TO_STOP),
        "--max-consecutive-failed-runs", str(FAILURES_IN_A_ROW),
        *([] if count is None else ["--count", str(count)]),
        path,
    ]  # fmt: skip


def _environment(folder: Path) -> dict[str, str]:
    """The agent's: `mainrun` is ours, whatever PATH said; files and trials stay in the folder."""
    ours = str(Path(sys.executable).parent)
    path = os.pathsep.join([ours, *filter(None, [os.environ.get("PATH")])])
    return os.environ | {
        "PATH": path,
        "WANDB_DIR": str(folder.resolve()),
        "MAINRUN_RUNS_DIR": str(folder / "trials"),
    }


def _trials(made: Sweep) -> tuple[list[Trial], dict[int, Path]]:
    """The trials that the agents of this folder began, and the run folders that they have."""
    names = _parameters_of_runs(made.folder)
    folders = _run_folders(made.folder / "trials", set(names))
    trials, run_dirs = [], {}
    for number, (run_id, file) in enumerate(names.items(), start=1):
        stored = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        values = {
            setting: stored.get(setting, {}).get("value") for setting in made.space.parameters
        }
        outcome = Outcome("failed", reason="it has no run folder: see agent.log")
        if run_id in folders:
            run_dirs[number] = folders[run_id]
            outcome = outcome_of(folders[run_id], made.space.metric)
            if outcome.status == "running":
                outcome = UNFINISHED
                if number < len(names):  # the agent went on to the next
                    outcome = pruned(folders[run_id], made.space.metric, _STOPPED_BY_SERVER)
        trials.append(Trial(number, values, outcome))
    return trials, run_dirs


def _parameters_of_runs(folder: Path) -> dict[str, Path]:
    """The ids of the runs that agents began here, in their order, with each one's parameters."""
    files = folder.glob("wandb/sweep-*/config-*.yaml")
    ordered = sorted(files, key=lambda file: (file.stat().st_mtime_ns, file.name))
    return {file.stem.removeprefix("config-"): file for file in ordered}


def _run_folders(runs: Path, ids: set[str]) -> dict[str, Path]:
    """The folder of each run, found by the id that its record keeps."""
    found = {}
    for record in runs.glob("*/events.jsonl"):
        with contextlib.suppress(UserError):
            for event in read_events(record):
                if event.get("wandb_id") in ids:
                    found[event["wandb_id"]] = record.parent
    return found


def _place(space: SearchSpace) -> tuple[str | None, str]:
    """Entity and project: the sweep file's, else the config's."""
    tracking = search_space.base_config(space).tracking
    entity = space.others.get("entity") or tracking.entity
    return entity, str(space.others.get("project") or tracking.project)


def _check_online(overrides: Sequence[str]) -> None:
    for override in overrides:
        setting, _, value = override.lstrip("-").partition("=")
        if setting == "tracking.wandb" and value in ("offline", "disabled"):
            raise UserError(
                f"{override}: a sweep at Weights & Biases is online; use --backend local"
            )


@contextlib.contextmanager
def _server() -> Iterator[Any]:
    """W&B's API; whatever goes wrong with it is RunFailed, and what it prints is no result."""
    import wandb

    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield wandb.Api()
        except UserError:
            raise
        except Exception as error:
            raise RunFailed(f"Weights & Biases: {one_line(error)}") from error
        finally:
            wandb.teardown()
