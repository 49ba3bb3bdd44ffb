"""A run's page at Weights & Biases, online or kept in the run folder to be uploaded later.

Neither console, code, git, host nor user is captured, and everything W&B stores stays inside the
run folder. What goes wrong here is raised; that it never ends a training is the tracker's care.
"""

import configparser
import contextlib
import netrc
import os
import re
import secrets
import shlex
import urllib.parse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from mainrun.config import Config, as_dict
from mainrun.environment import without_secrets
from mainrun.errors import UserError
from mainrun.record import metric_fields

Mode = Literal["online", "offline", "disabled"]

EXIT_CODES = {"finished": 0, "failed": 1, "stopped": 75}
"""The events a process ends with, and W&B's exit code for them: anything but 0 shows as failed."""

_INIT_SECONDS = 30  # to reach the server, then offline; W&B's own 90 are long to look at nothing
_FINISH_SECONDS = 60  # to upload the rest, then `wandb sync` may do it; W&B would wait for ever


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
        return "online" if has_key() else "offline"
    if asked == "online" and not has_key():
        raise UserError(
            "tracking.wandb=online, but no Weights & Biases key is found: "
            "set WANDB_API_KEY, or say tracking.wandb=offline"
        )
    return asked


class WandbRun:
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
        with self._own_folders():
            self._run = self._init(config, mode, run_id)
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

    @contextlib.contextmanager
    def _own_folders(self) -> Iterator[None]:
        """In this block W&B keeps artifacts to be uploaded, and logs, with the run.

        In folders of the user's, a `wandb sync` from another container would not find them. Not for
        longer: the runs of a population take turns in one process.
        """
        folder = (self._run_dir / "wandb").resolve()
        folder.mkdir(exist_ok=True)
        ours = {"WANDB_DATA_DIR": str(folder), "WANDB_CACHE_DIR": str(folder / "cache")}
        set_here = [name for name in ours if name not in os.environ]
        os.environ.update({name: ours[name] for name in set_here})
        try:
            yield
        finally:
            for name in set_here:
                os.environ.pop(name, None)

    def tell(self, event: str, step: int | None, fields: Mapping[str, Any]) -> None:
        with self._own_folders():
            self._tell(event, step, fields)

    def _tell(self, event: str, step: int | None, fields: Mapping[str, Any]) -> None:
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
        with self._own_folders():
            self._finish(ending)

    def _finish(self, ending: str) -> None:
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

    def _holds_secret(self, path: Path) -> bool:
        data = path.read_bytes()
        return any(os.fsencode(secret) in data for secret in self._secrets)


def new_id(run_dir: Path) -> str:
    """An id for W&B: the agent's in a sweep, else the folder's name and some chance.

    The record keeps it, so a resumed run goes on with it wherever its folder has been moved.
    """
    name = re.sub(r"[^A-Za-z0-9-]+", "-", run_dir.resolve().name).strip("-")[:40]
    return os.environ.get("WANDB_RUN_ID") or f"{name}-{secrets.token_hex(4)}"


def has_key() -> bool:
    """Whether W&B would find credentials, looking where it looks."""
    folder = os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb"
    settings = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(configparser.Error, OSError, UnicodeError):
        settings.read(Path(os.path.expanduser(folder), "settings"), encoding="utf-8")
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
            found = path and netrc.netrc(os.path.expanduser(path)).authenticators(host)
            if found:
                return bool(found[2])
    return False
