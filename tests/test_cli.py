"""Words in, exit codes and one line out: nothing is touched for the user's mistake."""

import importlib.util
from pathlib import Path

import pytest

from mainrun import cli


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def refusal(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The one line that a user's mistake is answered with."""
    assert cli.main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = [x for x in told.err.splitlines() if not x.startswith(("reading ", "compiling "))]
    assert len(lines) == 1, told.err
    assert list(Path.cwd().iterdir()) == []
    return lines[0]


def test_config_prints_what_train_would_use(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", "seed=5", "--model.d_model=64"]) == 0
    told = capsys.readouterr().out
    assert "seed: 5" in told
    assert "d_model: 64" in told


def test_words_and_options_come_in_any_order(capsys: pytest.CaptureFixture) -> None:
    said = refusal(capsys, "train", "seed=1", "--dry-run", "gone.yaml", "--data.field=x")
    assert said.startswith("mainrun: gone.yaml: cannot read")


def test_unknown_words_are_refused(capsys: pytest.CaptureFixture) -> None:
    assert "no.yaml" in refusal(capsys, "train", "no.yaml")
    assert "one config file" in refusal(capsys, "train", "a.yaml", "b.yaml")
    for words in (["train", "--dry"], ["generate", "runs/x", "--prompts"], ["resume"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(words)
        assert caught.value.code == 2


def test_data_that_cannot_be_used_is_refused(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny: list[str]
) -> None:
    def said(content: bytes | None, name: str = "data.txt") -> str:
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        return refusal(capsys, "train", *tiny, f"data.source=file:{path}")

    assert "gone.txt" in said(None, "gone.txt")
    assert "empty" in said(b"", "empty.txt")
    assert "binary" in said(b"a\x00b\n", "binary.txt")
    assert "UTF-8" in said(b"caf\xe9\nau lait\n", "latin.txt")
    assert "title" in said(b"name,url\na,b\n", "columns.csv")
    assert "data.context_length" in said(b"one\ntwo\nthree\n", "small.txt")


def test_a_run_folder_that_exists_is_refused(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "taken").mkdir()
    assert "exists" in refusal(capsys, "train", *tiny, "--run-dir", tmp_path / "taken")


def test_warmup_longer_than_the_run_is_refused(
    capsys: pytest.CaptureFixture, tiny: list[str]
) -> None:
    assert "schedule.warmup" in refusal(capsys, "train", *tiny, "schedule.warmup.steps=41")


def test_a_model_that_cannot_fit_is_refused_before_the_first_step(
    capsys: pytest.CaptureFixture, tiny: list[str]
) -> None:
    huge = ["model.d_model=65536", "model.mlp.hidden=400000", "model.num_layers=1"]
    assert "needs" in refusal(capsys, "train", *tiny, *huge)


def test_a_run_folder_that_cannot_be_made_is_refused(
    capsys: pytest.CaptureFixture, tmp_path: Path, tiny: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert "--run-dir" in refusal(capsys, "train", *tiny, "--run-dir", tmp_path / "file" / "run")


def test_a_folder_that_is_no_run_is_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    for command in ("resume", "evaluate", "generate"):
        assert "is no run folder" in refusal(capsys, command, tmp_path)


def test_what_resuming_cannot_change_is_refused(
    capsys: pytest.CaptureFixture, finished_run: Path
) -> None:
    assert "model" in refusal(capsys, "resume", finished_run, "model.d_model=32")
    assert "override" in refusal(capsys, "resume", finished_run, "more")


def test_other_data_than_the_runs_is_refused_on_resume(
    capsys: pytest.CaptureFixture, finished_run: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another text entirely, but long enough to be one.\n" * 300)
    words = (f"data.source=file:{other}", "training.max_steps=50")
    assert "was trained on (fingerprint" in refusal(capsys, "resume", finished_run, *words)


def test_a_prompt_longer_than_the_context_is_refused(
    capsys: pytest.CaptureFixture, finished_run: Path
) -> None:
    said = refusal(capsys, "generate", finished_run, "--prompt", "The parser " * 30)
    assert "data.context_length=16" in said


def test_generate_begins_with_the_prompt_and_repeats_with_the_seed(
    capsys: pytest.CaptureFixture, finished_run: Path
) -> None:
    def texts(*words: str) -> list[str]:
        assert cli.main(["generate", str(finished_run), "--num", "3", *words]) == 0
        return capsys.readouterr().out.splitlines()

    first = texts("--prompt", "The parser", "--seed", "1")
    assert len(first) == 3
    assert all(text.startswith("The parser") for text in first)
    assert texts("--prompt", "The parser", "--seed", "1") == first
    assert texts("--prompt", "The parser", "--seed", "2") != first
    assert len(set(texts("--temperature", "0"))) == 1


@pytest.mark.slow
def test_wandb_disabled_does_not_import_it(
    tmp_path: Path, tiny: list[str], mainrun: object
) -> None:
    """The import would be visible: the module is shadowed by one that raises."""
    assert importlib.util.find_spec("wandb")
    (tmp_path / "trap").mkdir()
    (tmp_path / "trap" / "wandb.py").write_text("raise SystemExit('wandb was imported')\n")
    import os

    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "trap")}
    short = [*tiny, "training.max_steps=1", "--run-dir", str(tmp_path / "run")]
    mainrun("train", *short, env=environment)  # type: ignore[operator]
