"""`mainrun report` as it is typed: which report is meant, where it goes, what it must not touch."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.report_folders import make_run, make_sweep
from tests.test_report_document import Page


def fingerprints(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    folder = tmp_path / "sweep"
    listed = [
        {"values": {"model.dropout": 0.1 * number}, "value": 1.5 + number,
         "run_dir": str(folder / "trials" / f"trial-00{number}")}
        for number in (1, 2, 3)
    ]  # fmt: skip
    make_sweep(folder, {"model.dropout": {"min": 0.0, "max": 0.5}}, listed)
    for number in (1, 2, 3):
        make_run(folder / "trials" / f"trial-00{number}", overrides=[f"model.dropout=0.{number}"])
        (folder / "trials" / f"trial-00{number}.log").write_text("a line\n")
    return folder


def test_a_run_is_reported_in_its_folder_and_its_record_is_left_alone(mainrun, tmp_path):
    folder = make_run(tmp_path / "run")
    before = fingerprints(folder)
    done = mainrun("report", folder)
    assert done.stdout == f"{folder / 'report.html'}\n"
    after = fingerprints(folder)
    assert {name: after[name] for name in before} == before
    new = after.keys() - before.keys()
    assert {"report.html", "report.md", "report/loss_per_token.png"} <= new
    assert all(name.startswith("report") for name in new)
    assert "run: finished" in Page((folder / "report.html").read_text()).text
    mainrun("report", folder)  # and once more, over the old one
    assert fingerprints(folder).keys() == after.keys()


def test_a_sweep_is_reported_in_its_folder(mainrun, sweep):
    assert mainrun("report", sweep).stdout == f"{sweep / 'report.html'}\n"
    assert "Best trials" in Page((sweep / "report.html").read_text()).text


def test_several_runs_are_compared_here_or_where_output_says(mainrun, sweep, tmp_path):
    trials = sorted((sweep / "trials").glob("*/"))
    done = mainrun("report", *trials, cwd=tmp_path)
    assert done.stdout == "report.html\n"
    assert "3 runs compared" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report" / "val_loss_by_steps.png").is_file()
    other = tmp_path / "new" / "all.html"
    assert mainrun("report", *trials, "--output", other).stdout == f"{other}\n"
    assert sorted(path.name for path in other.parent.iterdir()) == ["all", "all.html", "all.md"]


def test_a_run_named_twice_is_one_run(mainrun, tmp_path):
    folder = make_run(tmp_path / "run")
    mainrun("report", folder, f"{folder}/../run", "--output", tmp_path / "r.html")
    assert "run: finished" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "sweep/trials/trial-001"], "is a sweep: report it alone"),
        (["nowhere"], "no such folder"),
        (["sweep/trials/trial-001.log"], "no such folder"),
        (["sweep/trials"], "no run folder"),
        (["sweep", "--output", "report.pdf"], "name it report.pdf.html"),
        (["sweep", "--output", "sweep/trials"], "name it sweep/trials.html"),
    ],
)
def test_what_cannot_be_reported_is_refused_in_one_line(mainrun, sweep, words, said):
    done = mainrun("report", *words, code=2, cwd=sweep.parent)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(sweep.parent.rglob("report.html"))


def test_a_place_that_takes_nothing_is_told_before_any_work(mainrun, tmp_path):
    (tmp_path / "file").write_text("")
    folder = make_run(tmp_path / "run")
    done = mainrun("report", folder, "--output", tmp_path / "file" / "r.html", code=2)
    assert "cannot be written (Not a directory)" in done.stderr


@pytest.mark.parametrize("kind", ["run", "sweep", "comparison"])
def test_reports_open_without_jax_and_without_a_study(sweep, kind, tmp_path):
    trials = sorted((sweep / "trials").glob("*/"))
    words = {"run": trials[:1], "sweep": [sweep], "comparison": trials}[kind]
    program = f"""
import sys
from mainrun.cli import main
words = {[str(word) for word in words]}
assert main(["report", *words, "--output", {str(tmp_path / "r.html")!r}]) == 0
heavy = {{"jax", "flax", "optax", "orbax", "optuna", "wandb", "tokenizers"}}
print(sorted(sys.modules.keys() & heavy))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr


def test_a_sweep_whose_study_is_locked_is_reported(mainrun, sweep):
    import fcntl

    with (sweep / "study.journal").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        mainrun("report", sweep)


@pytest.mark.slow
def test_a_real_sweep_is_reported(mainrun, tiny, tmp_path):
    file = tmp_path / "sweep.yaml"
    file.write_text(
        "method: random\nparameters:\n"
        "  optimizer.learning_rate: {distribution: log_uniform_values, "
        "min: 1.0e-3, max: 1.0e-2}\n  model.tie_embeddings: {values: [true, false]}\n"
    )
    settings = [word for word in tiny if "learning_rate" not in word]
    folder = tmp_path / "real"
    mainrun("sweep", file, *settings, "--count", 3, "--run-dir", folder, "--backend", "local")
    mainrun("report", folder)
    page = Page((folder / "report.html").read_text())
    assert "3 finished" in page.text
    assert "trials per hour" in page.text
