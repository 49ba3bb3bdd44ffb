"""Where and with what a run was made (`environment.json`), and what of it must not be told.

Enough to make the run again: versions, commit, devices, data fingerprint, command. No host or
user name, and no address of a git remote, where credentials may stand. Secrets are the values of
environment variables whose names say so; whatever is written of a run goes through
`without_secrets` first.
"""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PACKAGES = (
    "mainrun", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers",
    "tiktoken", "pyarrow", "pydantic", "structlog", "wandb",
)  # fmt: skip
"""What may move a number or a file format."""

_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)
_SHORTEST_SECRET = 8  # characters; TOKENIZERS_PARALLELISM=true must not take "true" out of a text


def environment(
    command: Sequence[str], devices: Sequence[str], data_fingerprint: str | None
) -> dict[str, Any]:
    """Plain values; `commit` and `dirty` are null where neither git nor an image's build knows."""
    commit, dirty = _commit(Path(__file__).resolve())
    record = {
        "command": list(command),
        "commit": commit,
        "dirty": dirty,
        "data_fingerprint": data_fingerprint,
        "devices": list(devices),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
    }
    return dict(without_secrets(record, secret_values()))


def write_environment(
    run_dir: Path,
    *,
    command: Sequence[str],
    devices: Sequence[str],
    data_fingerprint: str | None,
    fingerprint: Mapping[str, Any] | None = None,
) -> None:
    """Writes `environment.json`; a resumed run keeps the first record and adds to its `resumed`.

    `fingerprint` is what a new run is known by (`fingerprint.py`).
    """
    path = run_dir / "environment.json"
    record = environment(command, devices, data_fingerprint)
    if fingerprint is not None:
        record["fingerprint"] = dict(fingerprint)
    if path.exists():
        first = json.loads(path.read_text(encoding="utf-8"))
        record = {**first, "resumed": [*first.get("resumed", []), record]}
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def secret_values() -> dict[str, str]:
    """Each secret of this process's environment, and the name of the variable that holds it."""
    return {
        value: name
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET
    }


def without_secrets(value: Any, secrets: Mapping[str, str]) -> Any:
    """The value with `[NAME]` in the place of each secret, in every text inside it."""
    match value:
        case str():
            # The longest first: one secret may begin as another does.
            for secret in sorted(secrets, key=len, reverse=True):
                value = value.replace(secret, f"[{secrets[secret]}]")
            return value
        case Mapping():
            return {key: without_secrets(item, secrets) for key, item in value.items()}
        case list() | tuple():
            return [without_secrets(item, secrets) for item in value]
        case _:
            return value


def _commit(file: Path) -> tuple[str | None, bool | None]:
    """The commit of the checkout that `file` belongs to, and whether anything differs from it.

    In an image is no git checkout: what it was built from stands in MAINRUN_COMMIT, as `<sha>` or
    `<sha>-dirty`.
    """
    if git(file.parent, "ls-files", "--error-unmatch", file.name) is None:
        # installed, perhaps under somebody else's checkout
        built_from = re.fullmatch(
            r"([0-9a-f]{40,64})(-dirty)?", os.environ.get("MAINRUN_COMMIT", "")
        )
        return (built_from[1], built_from[2] is not None) if built_from else (None, None)
    commit = git(file.parent, "rev-parse", "HEAD")
    changes = git(file.parent, "status", "--porcelain")
    return commit, None if changes is None else changes != ""


def git(folder: Path, *arguments: str) -> str | None:
    """What git answers about a checkout; None where it has no answer."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None  # no git, no checkout, or one whose owner git distrusts
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
