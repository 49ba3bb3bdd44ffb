"""What a run is known by: the settings it cannot change, its tokenizer, its documents.

It is written down as the run begins, in `environment.json`, and in every checkpoint; `config.yaml`
and `tokenizer.json` lie open to anybody's editor. Here what they say now is held against what was
trained, before anything is compiled. Versions before this wrote the documents' fingerprint alone;
their runs go on, and have the whole of it in the checkpoints that are saved from then on.
"""

import contextlib
import hashlib
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mainrun import config as configs
from mainrun.config import Config
from mainrun.errors import UserError

_MOST_BYTES = 2**22  # of what a checkpoint says of itself: some ten thousand arrays


def fingerprint(config: Config, tokenizer: Path, data: str) -> dict[str, Any]:
    """As JSON has it; of the file of the tokenizer, and of the documents' own fingerprint."""
    settings = fixed(configs.leaves(configs.as_dict(config)))
    return {"settings": settings, "tokenizer": _of_tokenizer(tokenizer), "data": data}


def fixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that a run cannot change."""
    return {path: value for path, value in settings.items() if configs.is_fixed(path)}


def check_settings(run_dir: Path, settings: Mapping[str, Any], origins: Mapping[str, str]) -> None:
    """UserError for a setting, and where it stands, that is not as the run was trained with it."""
    for place, was in _recorded(run_dir):
        check_same(settings, was.get("settings", {}), origins, place)


def check_same(
    settings: Mapping[str, Any], was: Mapping[str, Any], origins: Mapping[str, str], place: Path
) -> None:
    """UserError for a setting that is not as it `was` in that place."""
    for path, value in was.items():
        # A setting of a kind that is no longer chosen is not there at all.
        if (now := settings.get(path, "unset")) != value:
            origin = origins.get(path, "config.yaml")
            remedy = "leave it out" if origin == "command line" else "put it back"
            raise UserError(
                f"`{path}` is {_shown(now)} ({origin}), but {place} was trained with "
                f"{_shown(value)}: {remedy}, or train anew with `mainrun train`"
            )


def check_tokenizer(run_dir: Path) -> None:
    """UserError where tokenizer.json is not what the run was trained with."""
    path = run_dir / "tokenizer.json"
    now = _of_tokenizer(path)
    for place, was in _recorded(run_dir):
        if was.get("tokenizer", now) != now:
            raise UserError(
                f"{path} is not the tokenizer that {place} was trained with: put it back"
            )


def check_data(run_dir: Path, source: str, now: str, otherwise: str = "") -> None:
    """UserError where documents of this fingerprint are not what the run was trained on.

    `otherwise` is what else there is to do about it.
    """
    known = _data(run_dir)
    if not known:
        raise UserError(
            f"nothing in {run_dir} says what data it was trained on: put its environment.json back"
        )
    for place, was in known:
        if was != now:
            raise UserError(
                f"data.source={source} is not what {place} was trained on (fingerprint "
                f"{now[:12]}, not {was[:12]}): say where that is with data.source{otherwise}"
            )


def is_data(run_dir: Path, now: str) -> bool:
    """Whether the run is known to be trained on documents of this fingerprint."""
    return now in dict(_data(run_dir)).values()


def _data(run_dir: Path) -> list[tuple[Path, str]]:
    return [(place, was["data"]) for place, was in _recorded(run_dir) if "data" in was]


def _recorded(run_dir: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Those that stand in the record and in each checkpoint, as far as they do, and where."""
    path = run_dir / "environment.json"
    if path.is_file():
        environment = _json(path)
        known = dict(environment.get("fingerprint", {}))
        if "data_fingerprint" in environment:
            known["data"] = environment["data_fingerprint"]
        yield run_dir, known
    for checkpoint in sorted(run_dir.glob("checkpoints/*")):
        if checkpoint.name.isdecimal():  # not one that was set aside, or is being written
            yield checkpoint, _of_checkpoint(checkpoint)


def _of_checkpoint(folder: Path) -> dict[str, Any]:
    """From its own item, in the file that Orbax gives it.

    None where that is not as it was sealed: who reads all of a checkpoint says what is damaged.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        files = folder / "record" / "metadata", folder / "seal.json"
        if max(path.stat().st_size for path in files) > _MOST_BYTES:
            return {}
        record, seal = files[0].read_bytes(), json.loads(files[1].read_bytes())
        if seal["record/metadata"] == [len(record), zlib.crc32(record)]:
            return dict(json.loads(record)["fingerprint"])
    return {}


def _of_tokenizer(path: Path) -> str:
    """Of what the file says, however it is indented."""
    return hashlib.sha256(json.dumps(_json(path), sort_keys=True).encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _shown(value: Any) -> str:
    """As YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)
