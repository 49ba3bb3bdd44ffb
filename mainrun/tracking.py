"""What a run tells the world while it goes on.

`Tracker.log(event, step, **fields)` is the one way a fact leaves a run. The record
(`events.jsonl`) takes it first; the table, the console and Weights & Biases are views of it.
W&B is a guest: whatever happens to it is a warning, and never the end of a training. Secrets are
taken out before any of them sees the fact.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mainrun import plots, summary
from mainrun.config import Config
from mainrun.console import Console, say
from mainrun.environment import secret_values, without_secrets
from mainrun.errors import RunFailed, Stopped, UserError, named
from mainrun.record import Record, Table, read_events, write_table
from mainrun.result import resume_command
from mainrun.wandb_run import EXIT_CODES, Mode, WandbRun, check_wandb, new_id


class Tracker:
    """Tells each fact to the record, the table, the console and W&B, in this order."""

    def __init__(self, record: Record, table: Table, console: Console) -> None:
        self._record = record
        self._table = table
        self._console = console
        self._secrets = secret_values()
        self._wandb: WandbRun | None = None
        self._warned_of_wandb = False
        self.has_start = False
        """Whether the record says how the run began."""
        self.ending: str | None = None

    def log(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Tells `event`. A field with a slash in its name is a metric, in its unit of the README.

        Numbers may be Python's, NumPy's or scalars of JAX (which are fetched here). Raises
        RunFailed, naming file and reason, where the disk does not take it into the record; a table
        that is lost is a warning.
        """
        told = {name: _plain(value, self._secrets) for name, value in fields.items()}
        if event in EXIT_CODES:
            self.ending = event
        self._record.append(event, step, told)
        if trouble := self._table.add(event, step, told):
            path = self._table.path
            message = f"{path}: cannot be written ({trouble}); it is made again from the record"
            self.log("warning", message=message)
        self._console.show(event, step, told)
        if self._wandb is not None:
            self._guarded(lambda wandb: wandb.tell(event, step, told))

    def start_wandb(self, run_dir: Path, config: Config, mode: Mode, run_id: str) -> None:
        """Tells the record as what W&B knows this run; offline where no server answers."""
        troubles = []
        for attempt in () if mode == "disabled" else dict.fromkeys((mode, "offline")):
            try:
                self._wandb = WandbRun(run_dir, config, attempt, run_id, self._secrets)
                break
            except Exception as error:  # a guest's trouble, whatever it is
                troubles.append(f"Weights & Biases, {attempt}: {named(error)}")
        address = self._wandb.address if self._wandb else {"wandb": "disabled"}
        self.log("tracking_started", **address)
        for trouble in troubles:
            self.log("warning", message=trouble)

    def finish_wandb(self, ending: str) -> None:
        self._guarded(lambda wandb: wandb.finish(ending))
        self._wandb = None

    def _guarded(self, tell: "Callable[[WandbRun], None]") -> None:
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:  # a guest's trouble, whatever it is
            if not self._warned_of_wandb:
                self._warned_of_wandb = True
                self.log(
                    "warning",
                    message=f"Weights & Biases: {named(error)}; the run goes on, "
                    f"and what was not sent can be: {self._wandb.sync_command}",
                )


class Silent(Tracker):
    """Of a process that leaves the telling to another."""

    def __init__(self) -> None:
        self.has_start, self.ending = False, None

    def log(self, event: str, step: int | None = None, **fields: Any) -> None:
        pass


@contextlib.contextmanager
def open_tracker(
    run_dir: Path,
    config: Config,
    *,
    total_steps: int,
    resume_step: int | None = None,
    label: str | None = None,
) -> Iterator[Tracker]:
    """A tracker for the run folder, which must exist; `resume_step` None starts a new record.

    However the block ends, the record says so (`finished`, `stopped` for Stopped, else `failed`
    with the reason, unless the block has said it), summary and plots are written, W&B is closed
    and the result is printed, but for a run with a `label`, which is one of several. Raises
    UserError where another process writes the run, where a new run finds an old record, or for
    W&B online without a key; RunFailed on a full disk.
    """
    mode = check_wandb(config)
    record = Record(run_dir / "events.jsonl", resume=resume_step is not None)
    with contextlib.closing(record):
        events = read_events(record.path)
        if not events:
            _set_aside(run_dir / "metrics.csv")
        known = [event["wandb_id"] for event in events if event.get("wandb_id")]
        console = Console(total_steps=total_steps, first_step=resume_step or 0, label=label)
        tracker = Tracker(record, Table(run_dir / "metrics.csv", record.path), console)
        tracker.has_start = any(event["event"] == "run_started" for event in events)
        try:
            tracker.start_wandb(run_dir, config, mode, known[-1] if known else new_id(run_dir))
            yield tracker
        except BaseException as error:
            _end(tracker, console, run_dir, error)
            raise
        _end(tracker, console, run_dir, None)


def write_views(run_dir: Path) -> None:
    """Makes table, summary and plots anew from the record, of a run that nobody is writing."""
    try:
        record = Record(run_dir / "events.jsonl", resume=True)
    except UserError:  # another process is
        return
    except RunFailed as trouble:
        say(f"warning: {trouble}")
        return
    with contextlib.closing(record):
        for write in (write_table, summary.write_summary, plots.write_plots):
            try:
                write(run_dir)
            except Exception as trouble:
                say(f"warning: {named(trouble)}")


def _set_aside(table: Path) -> None:
    """Of a record that is lost the table is all there is, and it is about to be made anew."""
    aside = table.with_name("metrics.lost.csv")
    if table.is_file() and not aside.exists():
        table.rename(aside)


def _end(tracker: Tracker, console: Console, run_dir: Path, error: BaseException | None) -> None:
    """The last words of a process; a view that cannot be made does not change how the run ended."""
    ending = "stopped" if isinstance(error, Stopped) else "failed" if error else "finished"
    if tracker.ending is not None and error is None:
        ending = tracker.ending
    try:
        if tracker.ending != ending and isinstance(error, Stopped):
            tracker.log("stopped", resume_command=resume_command(run_dir))
        elif tracker.ending != ending and error is not None:
            tracker.log("failed", reason=_reason(error))
        elif tracker.ending != ending:
            tracker.log("finished")
    except RunFailed as full:
        if str(full) != str(error):  # which the command tells as its last line
            console.line(f"failed: {full}")
    result: list[str] = []
    # W&B before the pictures: after a SIGTERM time is short, and pictures can be made any day.
    for last_work in (
        lambda: write_table(run_dir),
        lambda: result.extend(summary.result_lines(summary.write_summary(run_dir))),
        lambda: tracker.finish_wandb(ending),
        lambda: plots.write_plots(run_dir),
    ):
        try:
            last_work()
        except Exception as trouble:
            with contextlib.suppress(RunFailed):
                tracker.log("warning", message=f"after the end: {named(trouble)}")
    console.close()
    with contextlib.suppress(OSError):
        if not console.is_one_of_several:
            sys.stdout.write("".join(f"{line}\n" for line in result))
        sys.stdout.flush()


def _plain(value: Any, secrets: Mapping[str, str]) -> Any:
    """Python's own scalars, lists and dicts, without secrets."""
    match value:
        case None | bool() | int() | float():
            return value
        case str() | Path():
            return without_secrets(str(value), secrets)
        case Mapping():
            return {str(key): _plain(item, secrets) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item, secrets) for item in value]
        case _:
            return value.item()  # a scalar of NumPy or JAX; anything else is a mistake of ours


def _reason(error: BaseException) -> str:
    if isinstance(error, (RunFailed, UserError)):
        return str(error)
    return named(error)
