"""The report of one run, however it went: a real one, and made ones of every kind of ending."""

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from mainrun.analysis import run_folder, run_report
from mainrun.analysis.document import Code, Details, Listing, Table, pictures
from mainrun.analysis.document_html import html
from mainrun.analysis.document_markdown import markdown
from mainrun.errors import UserError
from mainrun.record import Record
from tests.report_folders import A_PNG, make_run
from tests.test_report_document import HOSTILE, Page

pytestmark = pytest.mark.medium


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(A_PNG))


@pytest.fixture
def real_pictures() -> None:
    """A test that takes it has its pictures rendered."""


def rows_of(document, name: str) -> list:
    """Of the first table whose header begins with this, folded ones too."""

    def tables(blocks):
        for block in blocks:
            if isinstance(block, Table):
                yield block
            elif isinstance(block, Details):
                yield from tables(block.blocks)

    return next(list(t.rows) for t in tables(document.blocks) if t.header[0] == name)


def fact(document, name: str) -> str:
    for block in document.blocks:
        if isinstance(block, Table) and block.header == ("", ""):
            for row in block.rows:
                if row[0] == name:
                    return row[1]
    raise AssertionError(f"no fact {name}")


def reported(folder: Path):
    document = run_report.report(run_folder.read(folder))
    Page(html(document))
    markdown(document, "report")
    return document


def test_a_real_run_is_told_whole(finished_run: Path, real_pictures):
    document = reported(finished_run)
    told = json.loads((finished_run / "summary.json").read_text())
    assert document.title == f"{told['name']}: finished"
    drawn = {picture.name for picture in pictures(document.blocks)}
    assert {"loss_per_token", "val_loss", "optimizer_learning_rate", "optimizer_grad_norm",
            "perf_tokens_per_second"} <= drawn  # fmt: skip
    shown = markdown(document, "report")
    best = told["val/loss"]["best"]
    assert f"**{best['value']:.4f} ± {best['stderr']:.4f}**" in shown
    assert "```mermaid" in shown
    settings = ("data:\n", "data: -1\n")  # config.yaml has two keys of that name
    assert "data:" not in shown.replace(settings[0], "").replace(settings[1], "")
    page = Page(html(document))
    for words in ("Curves", "Facts", "Speed", "Memory", "Samples", "Settings", "Environment"):
        assert words in page.text
    assert f"mainrun generate {finished_run}" in page.text


def test_settings_are_told_as_differences_from_the_base(tmp_path):
    overrides = ["model.dropout=0.37", "optimizer.kind=sgd", "seed=7"]
    rows = rows_of(reported(make_run(tmp_path / "run", overrides=overrides)), "setting")
    told = {row[0].text: tuple(row[1:]) for row in rows}
    assert told["model.dropout"] == ("0.37", "0.1")
    assert told["optimizer.kind"] == ("sgd", "adamw")
    assert told["seed"] == ("7", "1337")
    assert "model.d_model" not in told


def test_a_run_with_the_settings_of_the_base_says_so(tmp_path):
    assert "All as in `config/base.yaml`." in markdown(reported(make_run(tmp_path / "run")), "r")


def test_memory_is_told_by_part_largest_first(tmp_path):
    document = reported(make_run(tmp_path / "run", peak_bytes=3 * 2**30))
    rows = rows_of(document, "part of the estimate")
    assert [row[0] for row in rows] == ["mlp", "logits", "optimizer state"]
    assert [row[2] for row in rows] == ["50 %", "25 %", "25 %"]
    assert fact(document, "peak of the device (on a CPU: of the process)") == "3.00 GiB"


def test_speed_leaves_out_the_first_step_of_a_process(tmp_path):
    folder = make_run(tmp_path / "run", steps=41)
    speeds = [1000.0 + step for step in range(2, 42)]
    said = fact(reported(folder), "tokens per second")
    assert said.startswith(f"{statistics.median(speeds):,.0f} in the median")


def test_percentiles_are_those_of_a_sorted_list():
    rows = [{"step": i, "x": float(i)} for i in range(101)]
    assert run_folder.percentiles(rows, "x") == pytest.approx((5, 50, 95))
    assert run_folder.percentiles(rows[:1], "x") == (0, 0, 0)
    assert run_folder.percentiles([{"step": 1, "x": math.nan}], "x") is None


ENDINGS = {
    "finished": {},
    "stopped": {"ending": "stopped"},
    "failed": {"ending": "failed", "reason": "out of memory"},
    "killed": {"ending": None},
    "without an evaluation": {"losses": {}},
    "with one evaluation": {"losses": {0: 3.0}},
    "not finite": {"losses": {0: math.nan, 20: math.inf, 40: -math.inf}, "stderr": math.nan},
    "without a step": {"losses": {}, "steps": 0},
}


def test_a_run_is_reported_however_it_ended(tmp_path, real_pictures, subtests: pytest.Subtests):
    for name, options in ENDINGS.items():
        with subtests.test(name):
            document = reported(make_run(tmp_path / name / "run", **options))
            assert document.title.startswith("run: ")


def test_reason_and_way_to_go_on_are_told_of_a_failed_run(tmp_path):
    document = reported(make_run(tmp_path / "run", ending="failed", reason="out of memory"))
    shown = markdown(document, "r")
    assert "**Reason\\:** out of memory" in shown
    assert f"mainrun resume {tmp_path / 'run'}" in shown


def test_a_run_that_died_in_its_first_second_is_reported(tmp_path):
    folder = make_run(tmp_path / "run")
    (folder / "events.jsonl").write_text("")
    (folder / "environment.json").write_text("{ half")
    (folder / "config.yaml").write_text("of: another\nversion: 3\n")
    shown = markdown(reported(folder), "r")
    assert "No evaluation has been recorded" in shown
    assert "of: another" in shown


def test_a_run_that_is_being_written_is_running_and_stays_as_it_is(tmp_path):
    folder = make_run(tmp_path / "run", ending=None)
    record = Record(folder / "events.jsonl", resume=True)
    try:
        assert run_folder.read(folder).status == "running"
        record.append("evaluation", 41, {"val/loss": 1.0})
    finally:
        record.close()
    assert run_folder.read(folder).status == "failed"
    assert run_folder.read(folder).best["value"] == 1.0


def test_what_happened_on_the_way_is_listed(tmp_path):
    more = [
        {"event": "step_skipped", "step": 3, "reason": "the loss is not finite"},
        {"event": "warning", "message": "damaged checkpoint left out: 12"},
        {"event": "stopped_early", "step": 30, "best_step": 10},
    ]
    rows = rows_of(reported(make_run(tmp_path / "run", more=more)), "what")
    assert [row[:3] for row in rows] == [
        ["step skipped", "3", "the loss is not finite"],
        ["warning", "", "damaged checkpoint left out: 12"],
        ["stopped early", "30", "no better since step 10"],
    ]


def test_every_metric_that_was_logged_has_its_curve(tmp_path, real_pictures):
    more = [
        {"event": "train_step", "step": step, "train/balance_loss": 1.0, "noise/scale_tokens": 9.0,
         "precision/loss_scale": 1024.0, "optimizer/new_thing": 3.0,
         "train/../../x\0 $": 1.0}
        for step in (41, 42)
    ]  # fmt: skip
    document = reported(make_run(tmp_path / "run", more=more))
    assert {
        "balance_loss",
        "noise_scale_tokens",
        "precision_loss_scale",
        "optimizer_new_thing",
        "train_______x___",
    } <= {picture.name for picture in pictures(document.blocks)}


def test_hostile_names_reasons_and_samples_are_only_text(tmp_path, real_pictures):
    text = " ".join(HOSTILE)
    folder = make_run(
        tmp_path / "run", name=text, ending="failed", reason=text, samples=HOSTILE,
        more=[{"event": "warning", "message": text}],
    )  # fmt: skip
    document = reported(folder)
    page = Page(html(document))
    assert not {"script", "svg", "iframe", "b", "i"} & {tag for tag, _ in page.elements}
    assert all(a["src"].startswith("data:image/png") for a in page.named("img"))
    assert all(text in page.text for text in HOSTILE if text.isprintable())
    shown = re.sub(r"(?ms)^(`{3,})text$.*?^\1$", "", markdown(document, "r"))
    assert not re.search(r"(?<!\\)<(?!/?details|/?summary)", shown)


def test_first_and_last_samples_are_shown(tmp_path):
    more = [{"event": "samples", "step": 40, "texts": ["the last\nof all"]}]
    folder = make_run(tmp_path / "run", samples=["the first"], more=more)
    document = reported(folder)
    assert Listing("the last of all") in document.blocks
    folded = [block for block in document.blocks if isinstance(block, Details)]
    assert (Listing("the first"),) in [block.blocks for block in folded]


def test_the_folder_is_named_as_it_is_to_be_typed(tmp_path):
    folder = make_run(tmp_path / "a run")
    assert fact(reported(folder), "run folder") == Code(str(folder))
    assert f"mainrun evaluate '{folder}'" in markdown(reported(folder), "r")


def test_a_folder_without_a_record_is_no_run(tmp_path):
    with pytest.raises(UserError, match=r"no events\.jsonl"):
        run_folder.read(tmp_path)
