"""What a run cannot change it knows by a fingerprint: edited files are refused, old runs go on."""

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import mainrun
from mainrun import cli
from mainrun.errors import UserError

COMMANDS = {
    "resume": ["resume", "RUN", "training.max_steps=44"],
    "evaluate": ["evaluate", "RUN"],
    "generate": ["generate", "RUN", "--num", "1"],
    "export": ["export", "RUN", "--format", "safetensors", "--output", "OUT"],
    "promote": ["promote", "RUN", "no-evidence"],
}


def call(*words: object, code: int) -> str:
    """What the command says, in this process, which has JAX already."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        assert cli.main([str(word) for word in words]) == code, said.getvalue()
    return said.getvalue()


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def refusal(command: str, run_dir: Path) -> str:
    """The one line that a command says of the run, which it leaves as it was."""
    output = run_dir.with_name("output")
    places = {"RUN": run_dir, "OUT": output}
    before = contents(run_dir)
    said = call(*(places.get(word, word) for word in COMMANDS[command]), code=2)
    lines = [line for line in said.splitlines() if not line.startswith("reading ")]
    assert len(lines) == 1, said
    assert contents(run_dir) == before
    assert not output.exists()
    return lines[0]


def edited(run_dir: Path, setting: str, value: object) -> None:
    """The first line of config.yaml that states the setting says something else."""
    path = run_dir / "config.yaml"
    text, count = re.subn(rf"(\b{setting}: ).*", rf"\g<1>{value}", path.read_text(), count=1)
    assert count
    path.write_text(text)


def with_swapped_ids(run_dir: Path) -> None:
    path = run_dir / "tokenizer.json"
    stored = json.loads(path.read_text())
    vocabulary = stored["model"]["vocab"]
    one, other = list(vocabulary)[40:42]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    path.write_text(json.dumps(stored))


def without_fingerprint(run_dir: Path, *, checkpoints: bool) -> None:
    """As versions before this one wrote it."""
    path = run_dir / "environment.json"
    stored = json.loads(path.read_text())
    del stored["fingerprint"]
    path.write_text(json.dumps(stored))
    for record in run_dir.glob("checkpoints/*/record/metadata") if checkpoints else ():
        stored = json.loads(record.read_text())
        del stored["fingerprint"]
        record.write_text(json.dumps(stored))


@pytest.fixture
def run_dir(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


EDITS: dict[str, Callable[[Path], None]] = {
    "training.batch_size": lambda run_dir: edited(run_dir, "batch_size", 4),
    "model.attention.num_heads": lambda run_dir: edited(run_dir, "num_heads", 4),
    "model.d_model": lambda run_dir: edited(run_dir, "d_model", 32),
    "data.validation_fraction": lambda run_dir: edited(run_dir, "validation_fraction", 0.3),
    "seed": lambda run_dir: edited(run_dir, "seed", 7),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_an_edited_config_is_refused_by_the_setting_and_its_line(
    run_dir: Path, command: str
) -> None:
    original = (run_dir / "config.yaml").read_text()
    for setting, edit in EDITS.items():
        edit(run_dir)
        said = refusal(command, run_dir)
        assert f"`{setting}` is " in said
        assert f"{run_dir}/config.yaml:" in said
        assert "put it back" in said
        (run_dir / "config.yaml").write_text(original)


@pytest.mark.parametrize("command", ["resume", "evaluate", "generate", "export"])
def test_an_edited_tokenizer_is_refused(run_dir: Path, command: str) -> None:
    with_swapped_ids(run_dir)
    assert f"{run_dir}/tokenizer.json is not the tokenizer" in refusal(command, run_dir)


def test_python_is_told_the_same(run_dir: Path) -> None:
    original = (run_dir / "config.yaml").read_text()
    edited(run_dir, "num_heads", 4)
    with pytest.raises(UserError, match=r"`model\.attention\.num_heads` is 4"):
        mainrun.load(run_dir)
    (run_dir / "config.yaml").write_text(original)
    with_swapped_ids(run_dir)
    with pytest.raises(UserError, match="is not the tokenizer"):
        mainrun.load(run_dir)


def test_a_tokenizer_that_is_only_written_otherwise_is_the_same(run_dir: Path) -> None:
    path = run_dir / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))
    call("generate", run_dir, "--num", 1, code=0)


@pytest.mark.parametrize("command", ["resume", "evaluate", "generate", "export"])
@pytest.mark.parametrize("edit", [*EDITS.values(), with_swapped_ids])
def test_where_the_record_does_not_say_it_the_checkpoint_does(
    run_dir: Path, command: str, edit: Callable[[Path], None]
) -> None:
    without_fingerprint(run_dir, checkpoints=False)
    edit(run_dir)
    said = refusal(command, run_dir)
    assert re.search(r"/checkpoints/\d+ was trained with", said), said


def test_a_damaged_checkpoint_is_no_witness(run_dir: Path) -> None:
    record = run_dir / "checkpoints" / "40" / "record" / "metadata"
    record.write_text(record.read_text().replace('"model.d_model": 16', '"model.d_model": 17'))
    assert "44 of 44 steps" in call("resume", run_dir, "training.max_steps=44", code=0)


def test_a_run_of_an_older_version_goes_on_and_is_known_from_then_on(run_dir: Path) -> None:
    without_fingerprint(run_dir, checkpoints=True)
    for command in ("evaluate", "generate"):
        call(command, run_dir, code=0)
    assert "44 of 44 steps" in call("resume", run_dir, "training.max_steps=44", code=0)
    edited(run_dir, "num_heads", 4)
    assert "was trained with 2" in refusal("resume", run_dir)


def test_what_resuming_cannot_change_is_refused_on_the_command_line(run_dir: Path) -> None:
    for word in ("model.norm=rmsnorm", "training.batch_size=4", "data.packing=documents"):
        before = contents(run_dir)
        said = call("resume", run_dir, word, code=2)
        assert f"`{word.partition('=')[0]}` is {word.partition('=')[2]} (command line)" in said
        assert contents(run_dir) == before
