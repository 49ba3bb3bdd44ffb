"""What a run tells the world while it goes on.

`Tracker.log(event, step, **fields)` is the one way a fact leaves a run. The record
(`events.jsonl`) takes it first; the table, the console and Weights & Biases are views of it.
W&B is a guest: whatever happens to it is a warning, and never the end of a training. Secrets are
taken out before any of them sees the fact.
"""

import configparser
import contextlib
import netrc
import os
import re
import secrets
import shlex
import sys
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mainrun import plots, summary
from mainrun.config import Config, as_dict
from mainrun.console import Console
from mainrun.environment import secret_values, without_secrets
from mainrun.errors import RunFailed, Stopped, UserError, one_line
from mainrun.record import Record, Table, metric_fields, read_events

Mode = Literal["online", "offline", "disabled"]

EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 75}
"""The events a process ends with, and W&B's exit code for them: anything but 0 shows as failed."""

_INIT_SECONDS = 30  # to reach the server, then offline; W&B's own 90 are long to look at nothing
_FINISH_SECONDS = 60  # to upload the rest, then `wandb sync` may do it; W&B would wait for ever


class Tracker:
    """Tells each fact to the record, the table, the console and W&B, in this order."""

    def __init__(self, record: Record, table: Table, console: Console) -> None:
        self._record = record
        self._table = table
        self._console = console
        self._secrets = secret_values()
        self._wandb: _Wandb | None = None
        self._warned_of_wandb = False
        self.ending: str | None = None

    def log(self, event: str, step: int | None = None, **fields: Any) -> None:
        """Tells `event`. A field with a slash in its name is a metric, in its unit of the README.

        Numbers may be Python's, NumPy's or scalars of JAX (which are fetched here). Raises
        RunFailed, naming file and reason, where the disk does not take it.
        """
        told = {name: _plain(value, self._secrets) for name, value in fields.items()}
        if event in EXIT_CODES:
            self.ending = event
        self._record.append(event, step, told)
        self._table.add(event, step, told)
        self._console.show(event, step, told)
        if self._wandb is not None:
            self._guarded(lambda wandb: wandb.tell(event, step, told))

    def start_wandb(self, run_dir: Path, config: Config, mode: Mode, run_id: str) -> None:
        """Tells the record as what W&B knows this run; offline where no server answers."""
        troubles = []
        for attempt in () if mode == "disabled" else dict.fromkeys((mode, "offline")):
            try:
                self._wandb = _Wandb(run_dir, config, attempt, run_id, self._secrets)
                break
            except Exception as error:  # a guest's trouble, whatever it is
                troubles.append(f"Weights & Biases, {attempt}: {_named(error)}")
        address = self._wandb.address if self._wandb else {"wandb": "disabled"}
        self.log("tracking_started", **address)
        for trouble in troubles:
            self.log("warning", message=trouble)

    def finish_wandb(self, ending: str) -> None:
        self._guarded(lambda wandb: wandb.finish(ending))
        self._wandb = None

    def _guarded(self, tell: "Callable[[_Wandb], None]") -> None:
        if self._wandb is None:
            return
        try:
            tell(self._wandb)
        except Exception as error:  # a guest's trouble, whatever it is
            if not self._warned_of_wandb:
                self._warned_of_wandb = True
                self.log(
                    "warning",
                    message=f"Weights & Biases: {_named(error)}; the run goes on, "
                    f"and what was not sent can be: {self._wandb.sync_command}",
                )


@contextlib.contextmanager
def open_tracker(
    run_dir: Path, config: Config, *, total_steps: int, resume_step: int | None = None
) -> Iterator[Tracker]:
    """A tracker for the run folder, which must exist; `resume_step` None starts a new record.

    However the block ends, the record says so (`finished`, `stopped` for Stopped, else `failed`
    with the reason, unless the block has said it), summary and plots are written, W&B is closed
    and the result is printed. Raises UserError where another process writes the run, where a new
    run finds an old record, or for W&B online without a key; RunFailed on a full disk.
    """
    mode = check_wandb(config)
    record = Record(run_dir / "events.jsonl", resume=resume_step is not None)
    with contextlib.closing(record):
        known = [e["wandb_id"] for e in read_events(record.path) if "wandb_id" in e]
        console = Console(total_steps=total_steps, first_step=resume_step or 0)
        tracker = Tracker(record, Table(run_dir / "metrics.csv", record.path), console)
        try:
            tracker.start_wandb(run_dir, config, mode, known[-1] if known else _new_id(run_dir))
            yield tracker
        except BaseException as error:
            _end(tracker, console, run_dir, error)
            raise
        _end(tracker, console, run_dir, None)


def check_wandb(config: Config) -> Mode:
    """What `tracking.wandb` comes to on this machine; raises UserError for online without a key.

    `auto` follows WANDB_MODE where that is set, else goes online where a key is found: in
    WANDB_API_KEY or WANDB_IDENTITY_TOKEN_FILE, W&B's settings file, or netrc, as `wandb login`
    leaves it. W&B is not imported for it.
    """
    asked = config.tracking.wandb
    if asked == "auto":
        for mode in ("online", "offline", "disabled"):
            if os.environ.get("WANDB_MODE") == mode:
                asked = mode
    if asked == "auto":
        return "online" if _has_key() else "offline"
    if asked == "online" and not _has_key():
        raise UserError(
            "tracking.wandb=online, but no Weights & Biases key is found: "
            "set WANDB_API_KEY, or say tracking.wandb=offline"
        )
    return asked


def _end(tracker: Tracker, console: Console, run_dir: Path, error: BaseException | None) -> None:
    """The last words of a process; a view that cannot be made does not change how the run ended."""
    ending = "stopped" if isinstance(error, Stopped) else "failed" if error else "finished"
    if tracker.ending is not None and error is None:
        ending = tracker.ending
    try:
        if tracker.ending != ending and isinstance(error, Stopped):
            tracker.log("stopped", resume_command=summary.resume_command(run_dir))
        elif tracker.ending != ending and error is not None:
            tracker.log("failed", reason=_reason(error))
        elif tracker.ending != ending:
            tracker.log("finished")
    except RunFailed as full:
        console.line(f"failed: {full}")
    result: list[str] = []
    # W&B before the pictures: after a SIGTERM time is short, and pictures can be made any day.
    for last_work in (
        lambda: result.extend(summary.result_lines(summary.write_summary(run_dir))),
        lambda: tracker.finish_wandb(ending),
        lambda: plots.write_plots(run_dir),
    ):
        try:
            last_work()
        except Exception as trouble:
            with contextlib.suppress(RunFailed):
                tracker.log("warning", message=f"after the end: {_named(trouble)}")
    console.close()
    with contextlib.suppress(OSError):
        sys.stdout.write("".join(f"{line}\n" for line in result))
        sys.stdout.flush()


class _Wandb:
    """One W&B run: its own id wherever it is continued, its files inside the run folder.

    Neither console, code, git, host nor user is captured. `wandb.init` costs 0.6 s.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Config,
        mode: Literal["online", "offline"],
        run_id: str,
        secrets: Mapping[str, str],
    ) -> None:
        self._run_dir, self._secrets = run_dir, secrets
        # W&B keeps artifacts to be uploaded, and logs, in folders of the user's. Here they stay
        # with the run, or a `wandb sync` from another container would not find them.
        folder = (run_dir / "wandb").resolve()
        folder.mkdir(exist_ok=True)
        ours = {"WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
        self._set_here = [name for name in ours if name not in os.environ]
        os.environ.update({name: ours[name] for name in self._set_here})
        try:
            self._run = self._init(config, mode, run_id)
        except BaseException:
            self._restore_environment()
            raise
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")
        folder = run_dir / "wandb" / Path(self._run.dir).parent.name
        self.sync_command = shlex.join(["wandb", "sync", str(folder)])
        self.address = {
            "wandb": mode,
            "wandb_id": run_id,
            "wandb_url": self._run.url if mode == "online" else None,
            "sync_command": self.sync_command if mode == "offline" else None,
        }

    def _init(self, config: Config, mode: Literal["online", "offline"], run_id: str) -> Any:
        import wandb

        self._module = wandb
        settings = without_secrets(as_dict(config), self._secrets)
        name = settings["tracking"]["name"] or self._run_dir.resolve().name
        wandb.setup(wandb.Settings(silent=True))  # or it tells where it found the key
        try:
            return wandb.init(
                project=config.tracking.project,
                entity=config.tracking.entity,
                name=name,
                tags=without_secrets(config.tracking.tags, self._secrets),
                id=run_id,
                resume="allow",
                config=settings,
                dir=self._run_dir,
                mode=mode,
                reinit="create_new",
                settings=wandb.Settings(
                    console="off",
                    disable_git=True,
                    disable_code=True,
                    save_code=False,
                    x_disable_meta=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                    quiet=True,
                    silent=True,
                    init_timeout=_INIT_SECONDS,
                    finish_timeout=_FINISH_SECONDS,
                    finish_timeout_raises=True,
                ),
            )
        except Exception:
            wandb.teardown(exit_code=1)  # its process holds on to the id, and we try again offline
            raise

    def tell(self, event: str, step: int | None, fields: Mapping[str, Any]) -> None:
        if event == "run_started":
            self._run.config.update({"run": dict(fields)}, allow_val_change=True)
        elif event == "samples":
            table = self._module.Table(
                columns=["step", "text"], data=[[step, text] for text in fields["texts"]]
            )
            self._run.log({"step": step, "samples": table})
        elif step is not None and (values := metric_fields(fields)):
            # `step` as a metric of its own, not as W&B's counter: that only counts upwards, and a
            # resumed run goes back.
            self._run.log({"step": step, **values})

    def finish(self, ending: str) -> None:
        try:
            artifact = self._module.Artifact(f"{self.address['wandb_id']}-log", type="log")
            for name in ("events.jsonl", "summary.md", "summary.json", "config.yaml"):
                path = self._run_dir / name
                # A config may hold a secret that its user wrote there: then it stays here.
                if path.is_file() and not self._holds_secret(path):
                    artifact.add_file(str(path), name=name, skip_cache=True)
            self._run.log_artifact(artifact)
            # Not in a sweep: there a stop is the sweep's own word, and a preempted trial would be
            # started again.
            if ending == "stopped" and "WANDB_SWEEP_ID" not in os.environ:
                self._run.mark_preempting()
        finally:
            self._run.finish(exit_code=EXIT_CODES[ending])
            self._restore_environment()

    def _holds_secret(self, path: Path) -> bool:
        data = path.read_bytes()
        return any(os.fsencode(secret) in data for secret in self._secrets)

    def _restore_environment(self) -> None:
        for name in self._set_here:
            os.environ.pop(name, None)


def _new_id(run_dir: Path) -> str:
    """An id for W&B: the agent's in a sweep, else the folder's name and some chance.

    The record keeps it, so a resumed run goes on with it wherever its folder has been moved.
    """
    name = re.sub(r"[^A-Za-z0-9-]+", "-", run_dir.resolve().name).strip("-")[:40]
    return os.environ.get("WANDB_RUN_ID") or f"{name}-{secrets.token_hex(4)}"


def _has_key() -> bool:
    """Whether W&B would find credentials, looking where it looks."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeError):
        settings.read(Path(folder).expanduser() / "settings", encoding="utf-8")
    of_wandb = settings["default"] if settings.has_section("default") else {}
    if (
        os.environ.get("WANDB_API_KEY")
        or os.environ.get("WANDB_IDENTITY_TOKEN_FILE")
        or of_wandb.get("api_key")
    ):
        return True
    server = os.environ.get("WANDB_BASE_URL") or of_wandb.get("base_url")
    host = urllib.parse.urlsplit(server or "https://api.wandb.ai").netloc
    for path in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        with contextlib.suppress(netrc.NetrcParseError, OSError):
            found = path and netrc.netrc(Path(path).expanduser()).authenticators(host)
            if found:
                return bool(found[2])
    return False


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
    return _named(error)


def _named(error: BaseException) -> str:
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
