"""What reads a run guards what it is given: no other network, no other text for the run's own."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest

from mainrun import cli, trained
from mainrun.errors import UserError

ANOTHER_RUN = [
    "model.mlp.kind=relu",
    "model.attention.num_heads=4",
    "model.d_model=32",
    "model.norm=rmsnorm",
    "data.context_length=8",
    "data.validation_fraction=0.3",
    "data.num_documents=100",
    "tokenizer.vocab_size=300",
    "seed=7",
    "training.weight_average.kind=ema",
]


def call(*words: object, code: int = 0) -> tuple[str, str]:
    """What the command prints and what it tells, in this process, which has JAX already."""
    printed, told = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(printed):
        assert cli.main([str(word) for word in words]) == code, told.getvalue()
    return printed.getvalue(), told.getvalue()


def evaluated(*words: object) -> dict[str, float]:
    return json.loads(call("evaluate", *words, "--json")[0])


@pytest.fixture(scope="module")
def lines(corpus: Path) -> list[str]:
    return corpus.read_text().splitlines()


@pytest.mark.parametrize("command", ["evaluate", "generate"])
@pytest.mark.parametrize("word", ANOTHER_RUN)
def test_an_override_that_makes_another_run_is_refused(
    finished_run: Path, command: str, word: str
) -> None:
    printed, told = call(command, finished_run, word, code=2)
    assert printed == ""
    (line,) = told.splitlines()
    path, _, value = word.partition("=")
    assert f"`{path.removesuffix('.kind')}" in line
    assert f"is {value} (command line)" in line or path.startswith("training.weight_average")


def test_python_refuses_it_too(finished_run: Path) -> None:
    with pytest.raises(UserError, match=r"`model\.mlp\.kind` is relu \(command line\)"):
        trained.load(finished_run, ["model.mlp.kind=relu"])


def test_what_changes_the_computation_alone_changes_no_result(finished_run: Path) -> None:
    own, other = evaluated(finished_run), evaluated(finished_run, "training.batch_size=7")
    assert other["val/loss"] == pytest.approx(own["val/loss"], abs=1e-6)
    assert other["val/tokens"] == own["val/tokens"]


def test_another_text_in_the_place_of_the_runs_own_is_refused(
    finished_run: Path, lines: list[str], tmp_path: Path
) -> None:
    """Sorted, most of what was trained on would be scored as validation."""
    path = tmp_path / "sorted.txt"
    path.write_text("\n".join(sorted(lines)) + "\n")
    printed, told = call("evaluate", finished_run, f"data.source=file:{path}", code=2)
    assert printed == ""
    line = told.splitlines()[-1]
    assert f"data.source=file:{path} is not what {finished_run} was trained on" in line
    assert "--data" in line


def test_the_runs_own_text_may_have_moved(finished_run: Path, corpus: Path, tmp_path: Path) -> None:
    moved = shutil.copy(corpus, tmp_path / "moved.txt")
    own = evaluated(finished_run)
    assert evaluated(finished_run, f"data.source=file:{moved}") == own
    assert "data" not in own


def test_another_text_is_asked_for_and_the_output_says_so(
    finished_run: Path, lines: list[str], corpus: Path, tmp_path: Path
) -> None:
    path = tmp_path / "other.txt"
    path.write_text("\n".join(lines[:50]) + "\n")
    source = f"file:{path}"
    assert evaluated(finished_run, "--data", source)["data"] == source
    printed, _ = call("evaluate", finished_run, "--data", source)
    said = " ".join(printed.split())
    assert f"text all 50 documents of {source}, not the run's validation text" in said
    printed, _ = call("evaluate", finished_run, "--data", f"file:{corpus}")
    assert "the text it was trained on among them" in printed
    printed, _ = call("evaluate", finished_run)
    assert "text the run's validation text" in " ".join(printed.split())
