"""The report of a sweep: of any size, of any values, by either engine; what mattered in it."""

import json
import math
import random
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from mainrun.analysis import ablation, run_folder, sweep_plots, sweep_report, trials
from mainrun.analysis.document import pictures
from mainrun.analysis.document_html import html
from mainrun.analysis.document_markdown import markdown
from mainrun.analysis.importance import caveat, importances
from tests.report_folders import A_PNG, START, make_run, make_sweep
from tests.test_report_document import HOSTILE, Page, cells
from tests.test_report_run import fact, rows_of

pytestmark = pytest.mark.medium

RATE = {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}
DROPOUT = {"distribution": "q_uniform", "q": 0.1, "min": 0.0, "max": 0.3}


@pytest.fixture(autouse=True)
def _pictures(request, monkeypatch):
    if "real_pictures" not in request.fixturenames:
        monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: file.write(A_PNG))


@pytest.fixture
def real_pictures() -> None:
    """A test that takes it has its pictures rendered."""


def reported(folder: Path):
    document = sweep_report.report(trials.read(folder))
    Page(html(document))
    markdown(document, "report")
    return document


def drawn(document) -> set[str]:
    return {picture.name for picture in pictures(document.blocks)}


def many(folder: Path, count: int, **options) -> Path:
    """A sweep in which the rate is all that matters, 1e-2 the best of it."""
    draw, listed = random.Random(0), []
    for _ in range(count):
        rate, dropout = 10 ** draw.uniform(-4, -1), draw.choice([0.0, 0.1, 0.2, 0.3])
        values = {"optimizer.learning_rate": rate, "model.dropout": dropout,
                  "model.mlp.kind": draw.choice(["gelu", "swiglu"])}  # fmt: skip
        loss = 1 + (math.log10(rate) + 2) ** 2 + draw.gauss(0, 0.01)
        listed.append({"values": values, "value": loss, "stderr": 0.02, "step": 40, "seconds": 60})
    parameters = {"optimizer.learning_rate": RATE, "model.dropout": DROPOUT,
                  "model.mlp.kind": {"values": ["gelu", "swiglu"]}}  # fmt: skip
    return make_sweep(folder, parameters, listed, **options)


def test_the_setting_that_matters_is_the_most_important(tmp_path):
    sweep = trials.read(many(tmp_path / "sweep", 100))
    shares = importances(sweep)
    assert next(iter(shares)) == "optimizer.learning_rate"
    assert shares["optimizer.learning_rate"] > 0.7
    assert sum(shares.values()) == pytest.approx(1)
    assert set(shares) == {p.name for p in sweep.parameters}
    assert "few" not in caveat(sweep)


def test_importance_looks_at_the_good_end_of_the_metric(tmp_path, subtests: pytest.Subtests):
    """What only tells bad trials from worse ones counts for little."""
    for goal in ["minimize", "maximize"]:
        with subtests.test(goal=goal):
            draw, listed = random.Random(1), []
            for _ in range(120):
                dropout, rate = draw.uniform(0, 0.3), 10 ** draw.uniform(-4, -1)
                loss = -dropout if dropout > 0.25 else 2 + math.log10(rate) ** 2
                values = {"model.dropout": dropout, "optimizer.learning_rate": rate}
                listed.append({"values": values, "value": loss if goal == "minimize" else -loss})
            parameters = {
                "model.dropout": {"min": 0.0, "max": 0.3},
                "optimizer.learning_rate": RATE,
            }
            metric = {"name": "val/loss", "goal": goal}
            sweep = trials.read(make_sweep(tmp_path / goal, parameters, listed, metric=metric))
            assert importances(sweep)["model.dropout"] > 0.8


def test_few_trials_have_a_caveat_and_very_few_no_importance(tmp_path):
    assert "mostly chance" in caveat(trials.read(many(tmp_path / "some", 12)))
    assert importances(trials.read(many(tmp_path / "few", 7))) == {}
    assert "too few to tell" in markdown(reported(tmp_path / "few"), "r")


def test_a_sweep_of_any_size_is_reported(tmp_path, subtests: pytest.Subtests):
    for count in [0, 1, 2, 8, 300]:
        with subtests.test(count=count):
            document = reported(many(tmp_path / f"sweep-{count}", count))
            assert ("best_so_far" in drawn(document)) == (count > 0)
            assert ("parallel_coordinates" in drawn(document)) == (count > 1)
            assert ("importance" in drawn(document)) == (count >= 8)
            shown = markdown(document, "r")
            assert len(shown.encode()) < 2**20
            if count == 0:
                assert "No trial has come to its end" in shown
            else:
                assert len(rows_of(document, "trial")) == min(count, 15)


def test_the_best_trial_is_the_first_of_the_table(tmp_path):
    folder = many(tmp_path / "sweep", 20)
    sweep = trials.read(folder)
    best = min(sweep.trials, key=lambda trial: trial.value)
    row = rows_of(reported(folder), "trial")[0]
    assert row[0] == str(best.number)
    assert row[1] == f"{best.value:.4f} ± 0.0200"


STATUSES = ["finished", "failed", "refused", "running", "pruned", "a status of tomorrow"]


def test_every_status_is_shown_and_only_finished_trials_are_ranked(tmp_path):
    listed = [
        {"values": {"model.dropout": 0.1}, "status": status, "reason": f"why {status}",
         "value": 1.0 + place if status in ("finished", "pruned", STATUSES[-1]) else None}
        for place, status in enumerate(STATUSES)
    ]  # fmt: skip
    listed[4]["value"] = 0.5  # better, but not at the end
    folder = make_sweep(tmp_path / "sweep", {"model.dropout": {"values": [0.1, 0.2]}}, listed)
    sweep = trials.read(folder)
    assert [trial.number for trial in sweep.ranking()] == [1]
    document = reported(folder)
    assert {row[1] for row in rows_of(document, "trial")} != set()
    told = fact(document, "trials")
    assert all(f"1 {status}" in told for status in STATUSES)
    shown = markdown(document, "r")
    assert all(f"why {status}" in shown for status in STATUSES)


VALUES = {
    "null and numbers": [None, 16, 64],
    "booleans": [True, False],
    "lists": [[64, 128], [128, 64], []],
    "mappings": [{"kind": "moe", "num_experts": 4}, {"kind": "gelu"}],
    "words": ["gelu", "null", "1", "true", "<b>x</b> | y"],
    "all kinds": [None, True, 1, 1.5, "1", [1], {"a": 1}],
    "equal in Python": [1, True, 0, False],
    "numbers": [1, 10, 100],
    "one": [3],
    "negative": [-1.0, 0.0, 1e6],
}


@pytest.mark.slow
def test_values_of_any_kind_are_reported_one_by_one(
    tmp_path, real_pictures, subtests: pytest.Subtests
):
    for name, values in VALUES.items():
        with subtests.test(name):
            listed = [
                {"values": {"model.mlp.hidden": value}, "value": 1.0 + place + repeat / 10}
                for place, value in enumerate(values)
                for repeat in range(3)
            ]
            parameters = {"model.mlp.hidden": {"values": values}}
            folder = make_sweep(tmp_path / name / "sweep", parameters, listed)
            sweep = trials.read(folder)
            (parameter,) = sweep.parameters
            assert len(parameter.levels) == len(values)
            places = [parameter.place(trial.values["model.mlp.hidden"]) for trial in sweep.trials]
            assert len(set(places)) == len(values)
            assert reported(folder)


def test_numbers_are_on_a_scale_and_all_else_in_columns(tmp_path):
    parameters = {
        "optimizer.learning_rate": RATE,
        "model.dropout": DROPOUT,
        "training.batch_size": {"values": [16, 32, 256]},
        "model.num_layers": {"values": [2, 3, 4]},
        "model.tie_embeddings": {"values": [True, False]},
        "data.context_length": {"distribution": "int_uniform", "min": 8, "max": 64},
    }
    values = {
        "optimizer.learning_rate": 1e-3, "model.dropout": 0.1, "training.batch_size": 16,
        "model.num_layers": 2, "model.tie_embeddings": True, "data.context_length": 9,
    }  # fmt: skip
    sweep = trials.read(make_sweep(tmp_path / "s", parameters, [{"values": values, "value": 1.0}]))
    told = {
        p.name: (p.is_numeric, p.is_log, p.bounds if p.is_numeric else None)
        for p in sweep.parameters
    }
    assert told == {
        "optimizer.learning_rate": (True, True, (1e-4, 1e-1)),
        "model.dropout": (True, False, (0.0, 0.3)),
        "training.batch_size": (True, True, (16, 256)),
        "model.num_layers": (True, False, (2, 4)),
        "model.tie_embeddings": (False, False, None),
        "data.context_length": (True, False, (8, 64)),
    }


def test_one_diverged_trial_does_not_hide_the_others():
    assert sweep_plots._edge([1.0, 1.1, 1.2, 1.3, 1.25, 500.0], "minimize") < 2
    assert sweep_plots._edge([1.0, 1.1, 1.2, 1.3], "minimize") == 1.3
    assert sweep_plots._edge([9.0, 8.5, 8.0, 8.8, 8.2, 0.1], "maximize") > 1
    assert sweep_plots._edge([2.0, 2.0], "minimize") == 2.0
    assert sweep_plots._edge([2.0], "maximize") == 2.0


CHOICES = {
    "optimizer.kind": ["adamw", "lion"],
    "model.mlp.kind": ["moe", "gelu", "swiglu"],
    "model.attention.window_including_self": [None, 16, 32],
    "model.attention.output_gate": [True, False],
    "model.tie_embeddings": [True, False],
}
PANELS = {
    "optimizer.kind": ("Optimizer", {"adamw", "lion"}),
    "model.mlp.kind": ("MoE against dense", {"MoE", "dense"}),
    "model.attention.window_including_self":
        ("Sliding window", {"with a window", "without a window"}),
    "model.attention.output_gate": ("Output gate", {"with a gate", "without a gate"}),
    "model.tie_embeddings": ("Tied embeddings", {"tied", "untied"}),
}  # fmt: skip


def with_runs(folder: Path, setting: str, values: list) -> Path:
    listed = []
    for number, value in enumerate(values * 2, start=1):
        run = folder / "trials" / f"trial-{number:03}"
        listed.append(
            {"values": {setting: value}, "value": 1.0 + number, "run_dir": f"/gone/{run.name}"}
        )
    make_sweep(folder, {setting: {"values": values}}, listed)
    for number, value in enumerate(values * 2, start=1):
        make_run(
            folder / "trials" / f"trial-{number:03}", {0: 4.0, 20: 2.0 + number, 40: 1.0 + number},
            overrides=[f"{setting}={json.dumps(value)}"], peak_bytes=number * 2**20,
            begin=START + timedelta(hours=number),
        )  # fmt: skip
    return folder


@pytest.mark.slow
def test_a_choice_that_is_varied_has_its_panel_and_memory(tmp_path, subtests: pytest.Subtests):
    for setting in CHOICES:
        with subtests.test(setting=setting):
            folder = with_runs(tmp_path / setting, setting, CHOICES[setting])
            sweep = trials.read(folder)
            (panel,) = ablation.panels(sweep)
            assert (panel.name, set(panel.levels)) == PANELS[setting]
            assert sum(map(len, panel.levels.values())) == 2 * len(CHOICES[setting])
            document = reported(folder)
            pictures = {"ablation_memory", f"ablation_{panel.name.lower().replace(' ', '_')}"}
            assert pictures <= drawn(document)
            assert len(rows_of(document, "choice")) == len(panel.levels)


def test_a_choice_inside_a_mapping_that_is_varied_has_its_panel(tmp_path):
    values = [{"kind": "moe"}, {"kind": "gelu"}]
    sweep = trials.read(with_runs(tmp_path / "sweep", "model.mlp", values))
    assert [panel.name for panel in ablation.panels(sweep)] == ["MoE against dense"]


def test_a_setting_that_is_none_of_the_six_has_no_panel(tmp_path):
    folder = with_runs(tmp_path / "sweep", "model.dropout", [0.1, 0.2])
    assert ablation.panels(trials.read(folder)) == []
    assert not [name for name in drawn(reported(folder)) if name.startswith("ablation")]


def test_the_median_curve_ends_where_the_first_run_does(tmp_path):
    losses = [{0: 4.0, 10: 3.0, 40: 1.0}, {0: 5.0, 20: 2.0, 40: 2.0}, {0: 9.0, 30: 3.0}]
    folders = [make_run(tmp_path / f"run-{i}", given) for i, given in enumerate(losses)]
    found = ablation.curve([run_folder.read(folder) for folder in folders], "val/loss")
    assert found is not None
    assert list(found.steps) == [0, 10, 20, 30]
    by_hand = np.array([np.interp(found.steps, list(g), list(g.values())) for g in losses])
    np.testing.assert_allclose(found.median, np.median(by_hand, axis=0))
    assert (found.lower <= found.median).all()
    assert (found.median <= found.upper).all()


def test_trials_are_found_where_the_sweep_has_been_moved_to(tmp_path):
    folder = with_runs(tmp_path / "sweep", "model.dropout", [0.1, 0.2])
    moved = Path(shutil.move(folder, tmp_path / "elsewhere"))
    assert all(trial.run is not None for trial in trials.read(moved).trials)


def test_trials_per_hour_are_counted_from_the_records(tmp_path):
    folder = with_runs(tmp_path / "sweep", "model.dropout", [0.1, 0.2])
    begins = [trial.run.span()[0] for trial in trials.read(folder).trials]
    ends = [trial.run.span()[1] for trial in trials.read(folder).trials]
    hours = (max(ends) - min(begins)).total_seconds() / 3600
    assert fact(reported(folder), "trials per hour") == f"{4 / hours:.1f}"


def test_a_run_that_the_table_does_not_have_yet_is_a_trial_in_progress(tmp_path):
    folder = with_runs(tmp_path / "sweep", "model.dropout", [0.1, 0.2])
    make_run(folder / "trials" / "trial-005", overrides=["model.dropout=0.2"], ending=None)
    last = trials.read(folder).trials[-1]
    assert (last.number, last.status, last.values) == (5, "running", {"model.dropout": 0.2})
    assert "1 running" in fact(reported(folder), "trials")


def test_settings_names_of_wandb_folders_are_found_by_their_path(tmp_path):
    """W&B's agent names its run folders by date: the table says which is whose."""
    folder = tmp_path / "sweep"
    run = folder / "trials" / "20260301-120000-base"
    listed = [{"values": {"model.dropout": 0.1}, "value": 1.5, "run_dir": str(run)}]
    make_sweep(folder, {"model.dropout": {"values": [0.1, 0.2]}}, listed)
    make_run(run, overrides=["model.dropout=0.1"])
    (trial,) = trials.read(folder).trials
    assert trial.run is not None


def test_hostile_values_and_reasons_are_only_text(tmp_path, real_pictures):
    texts = [text for text in HOSTILE if text.isprintable()]  # others no YAML file can hold
    listed = [
        {"values": {"data.source": text}, "value": 1.0, "reason": text, "status": status}
        for text in texts
        for status in ("finished", "failed", text)
    ]
    told = " ".join(texts)
    folder = make_sweep(
        tmp_path / "sweep", {"data.source": {"values": texts}}, listed,
        summary={"status": told, "reason": told, "resume_command": told, "wandb": {"url": told}},
    )  # fmt: skip
    document = reported(folder)
    page = Page(html(document))
    assert not {"script", "svg", "b", "i"} & {tag for tag, _ in page.elements}
    assert all(a["href"].startswith("#") for a in page.named("a") if "href" in a)
    assert all(page.text.count(text) > 3 for text in texts)
    for block in markdown(document, "r").split("\n\n"):
        if block.startswith("| "):
            assert len({cells(line) for line in block.split("\n")}) == 1
