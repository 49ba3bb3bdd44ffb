"""The report of several runs: their table, their differences, and what is said about chance."""

import math
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mainrun.analysis import comparison, comparison_plots, figures, run_folder, significance
from mainrun.analysis.document import Document, Heading, pictures
from mainrun.analysis.document_html import html
from mainrun.analysis.document_markdown import markdown
from tests.report_folders import A_PNG, make_run
from tests.test_report_document import HOSTILE, Page
from tests.test_report_run import rows_of

pytestmark = pytest.mark.medium


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(A_PNG))


@pytest.fixture
def real_pictures() -> None:
    """A test that takes it has its pictures rendered."""


def compared(*folders: Path) -> Document:
    document = comparison.report([run_folder.read(folder) for folder in folders])
    Page(html(document))
    markdown(document, "report")
    return document


def headings(document: Document) -> list[str]:
    return [block.text for block in document.blocks if isinstance(block, Heading)]


def seeds(folder: Path, kind: str, *losses: float) -> list[Path]:
    return [
        make_run(folder / f"{kind}-{seed}", {0: 4.0, 40: loss},
                 overrides=[f"optimizer.kind={kind}", f"seed={seed}"])
        for seed, loss in enumerate(losses)
    ]  # fmt: skip


def test_groups_of_seeds_are_tested_and_single_runs_are_not(tmp_path, real_pictures):
    folders = [
        *seeds(tmp_path, "adamw", 1.50, 1.51, 1.52), *seeds(tmp_path, "lion", 1.60, 1.61, 1.63),
        *seeds(tmp_path, "sgd", 1.8), *seeds(tmp_path, "adam", 1.4),
    ]  # fmt: skip
    document = compared(*folders)
    assert headings(document) == [
        "Runs", "Curves", "Settings that differ", "Groups", "Beyond chance?", "One seed only",
    ]  # fmt: skip
    ((first, second, difference, interval, _, _, p, corrected),) = next(
        list(b.rows)
        for b in document.blocks
        if getattr(b, "header", [""])[0:2] == ["group", "less group"]
    )
    assert (first, second) == ("kind=lion", "kind=adamw")
    assert float(difference) == pytest.approx(0.1033, abs=1e-4)
    low, high = map(float, interval.split(" to "))
    assert low < float(difference) < high
    assert p == corrected
    assert float(p) < 0.01
    (single,) = [b.rows for b in document.blocks if getattr(b, "header", [""])[-1:] == ["data"]]
    assert list(single) == [["sgd-0", "+0.4000", f"{math.hypot(0.01, 0.01):.4f}", "the same"]]
    assert "they are not" in markdown(document, "r")
    assert {picture.name for picture in pictures(document.blocks)} == {
        "val_loss_by_steps", "val_loss_by_tokens", "results",
    }  # fmt: skip


def test_two_runs_of_one_seed_each_are_told_that_seeds_are_missing(tmp_path):
    document = compared(*seeds(tmp_path, "adamw", 1.5), *seeds(tmp_path, "lion", 1.6))
    assert "Beyond chance?" not in headings(document)
    assert "No test is possible here" in markdown(document, "r")


def test_runs_on_other_data_are_told_apart(tmp_path):
    one = make_run(tmp_path / "one", overrides=["seed=1"])
    other = make_run(tmp_path / "other", overrides=["model.dropout=0.2"], fingerprint="e" * 64)
    shown = markdown(compared(one, other), "r")
    assert "The data differ" in shown
    assert "different |" in shown


def test_settings_that_differ_are_listed_and_no_others(tmp_path):
    one = make_run(tmp_path / "one", overrides=["model.dropout=0.25", "optimizer.kind=sgd"])
    other = make_run(tmp_path / "other", overrides=["model.tie_embeddings=false"])
    rows = rows_of(compared(one, other), "setting")
    told = {row[0].text: tuple(row[1:]) for row in rows}
    assert told["model.dropout"] == ("0.25", "0.1")
    assert told["model.tie_embeddings"] == ("true", "false")
    assert told["optimizer.b1"] == ("—", "0.9")  # of another kind
    assert "model.d_model" not in told
    assert "data.source" not in told


def test_equal_runs_have_no_difference(tmp_path):
    shown = markdown(compared(make_run(tmp_path / "a"), make_run(tmp_path / "b")), "r")
    assert "None." in shown
    assert "Left out" in shown  # the same seed twice is one


@pytest.mark.parametrize("ending", ["failed", "stopped", None])
def test_a_run_without_an_end_is_shown_and_not_compared(tmp_path, ending):
    broken = make_run(tmp_path / "broken", overrides=["seed=9"], ending=ending)
    document = compared(*seeds(tmp_path, "adamw", 1.5, 1.6), broken)
    assert "broken" in [row[0] for row in rows_of(document, "run")]
    (group,) = significance.groups([run_folder.read(broken)])
    assert group.losses == []


def test_nothing_to_compare_is_reported_all_the_same(tmp_path):
    broken = [make_run(tmp_path / f"{i}", {}, ending="failed", steps=0) for i in range(2)]
    shown = markdown(compared(*broken), "r")
    assert "None of these runs came to its end" in shown


@pytest.mark.slow
def test_hundreds_of_runs_are_one_page(tmp_path, real_pictures):
    folders = [
        make_run(tmp_path / f"run-{i}", {0: 4.0, 40: 1.5 + i / 100}, overrides=[f"seed={i // 3}",
                 f"model.dropout={0.001 * (i + 1):.3f}"])
        for i in range(120)
    ]  # fmt: skip
    document = compared(*folders)
    assert len(markdown(document, "r").encode()) < 2**20
    heights = [int.from_bytes(p.light[20:24]) for p in pictures(document.blocks)]
    assert max(heights) < 3000


def test_a_group_is_named_by_the_least_that_tells_it_from_the_others(tmp_path):
    groups = significance.groups(
        [
            run_folder.read(folder)
            for kind in ("adamw", "lion")
            for folder in seeds(tmp_path, kind, 1.5, 1.6)
        ]
    )
    assert comparison.group_names(groups) == ["kind=adamw", "kind=lion"]


def test_ends_of_curves_are_framed_and_not_their_beginnings():
    _, axes = figures.new_axes()
    axes.plot([0, 20, 40], [9.0, 2.0, 1.0])
    axes.plot([0, 20, 40], [9.0, 2.1, 1.2])
    axes.plot([0], [9.0])
    figures.frame_ends(axes)
    low, high = axes.get_ylim()
    assert 0.9 < low < 1.0
    assert 2.0 < high < 2.3


def test_names_that_are_hostile_are_only_text(tmp_path, real_pictures):
    folders = [
        make_run(tmp_path / f"run-{i}", name=text, overrides=[f"model.dropout=0.{i + 1}"])
        for i, text in enumerate(HOSTILE)
    ]
    page = Page(html(compared(*folders)))
    assert not {"script", "svg", "b", "i"} & {tag for tag, _ in page.elements}


def test_the_best_keep_their_colours_where_there_are_many(tmp_path):
    folders = [
        make_run(tmp_path / f"run-{i}", {0: 4.0, 40: 2.0 - i / 10},
                 overrides=[f"model.dropout=0.{i + 10}"])
        for i in range(12)
    ]  # fmt: skip
    groups = significance.groups([run_folder.read(folder) for folder in folders])
    styles = comparison_plots._styles(groups, [f"{i}" for i in range(12)])
    grey = [i for i, style in enumerate(styles) if style["color"] == figures.GREY]
    assert grey == [0, 1, 2, 3, 4]
    assert len({style["color"] for style in styles}) == 8
