"""A checkpoint that cannot be read costs nothing: one line, an exit code, and no file touched."""

import errno
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import orbax.checkpoint as ocp
import pytest

from mainrun import cli

COMMANDS = {
    "resume": ["resume", "RUN", "training.max_steps=44"],
    "evaluate": ["evaluate", "RUN"],
    "generate": ["generate", "RUN"],
    "export": ["export", "RUN", "--format", "safetensors", "--output", "OUT"],
}
ERRORS: list[Callable[[], Exception]] = [
    MemoryError,
    lambda: OSError(errno.ESTALE, "Stale file handle"),
    lambda: PermissionError(errno.EACCES, "Permission denied"),
    lambda: OSError(errno.EMFILE, "Too many open files"),
    lambda: ValueError("unknown item in the tree"),
]


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_whatever_reading_raises_nothing_is_touched(
    command: str,
    tmp_path: Path,
    finished_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = shutil.copytree(finished_run, tmp_path / "run")
    places = {"RUN": str(run_dir), "OUT": str(tmp_path / "out")}
    words = [places.get(word, word) for word in COMMANDS[command]]
    before = contents(run_dir)
    for make_error in ERRORS:
        for target in (ocp.CheckpointManager.restore, ocp.CheckpointManager.__init__):
            error = make_error()
            if target is ocp.CheckpointManager.__init__ and not isinstance(error, OSError):
                continue

            def fail(*_: object, raised: Exception = error, **__: object) -> None:
                raise raised

            with monkeypatch.context() as patched:
                patched.setattr(ocp.CheckpointManager, target.__name__, fail)
                assert cli.main(words) == 1, (command, error)
            told = capsys.readouterr().err.splitlines()[-1]
            assert "checkpoints" in told
            assert "remove" not in told
            assert "Traceback" not in told
            assert contents(run_dir) == before, (command, error)
            assert not (tmp_path / "out").exists()
