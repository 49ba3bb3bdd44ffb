"""Runs become points of a law and a report; what does not compare, or is too few, is refused."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from mainrun import config
from mainrun.analysis import scaling, scaling_fits, scaling_runs
from mainrun.analysis.document import Paragraph
from mainrun.analysis.scaling_laws import JointLaw
from mainrun.analysis.scaling_runs import Run
from mainrun.errors import UserError
from mainrun.model.gpt import Network

LAW = JointLaw(E=1.7, A=30.0, B=60.0, alpha=0.3, beta=0.25)


def made(
    sizes: Sequence[float], amounts: Sequence[float], *, noise: float = 0.003, seeds: int = 1
) -> list[Run]:
    """Runs whose losses are a known law's, with noise."""
    draw = np.random.default_rng(0)
    return [
        Run(
            name=f"run-{i}-{j}-{seed}", seed=seed, parameters=int(N), non_embedding=int(0.7 * N),
            tokens=int(D), epochs=1.0, num_documents=None, vocab_size=1000,
            last=(loss := float(LAW.loss(N, D) * math.exp(noise * draw.normal()))), best=loss,
        )
        for i, N in enumerate(sizes)
        for j, D in enumerate(amounts)
        for seed in range(seeds)
    ]  # fmt: skip


def test_parameters_outside_embeddings_are_those_of_the_closed_form(subtests: pytest.Subtests):
    """12·L·d² weights as Kaplan et al. count, and 13·L·d + 2·d of biases and norms besides."""
    width, layers, vocab, context = 24, 3, 300, 16
    for heads in ["tie_embeddings=true", "tie_embeddings=false"]:
        with subtests.test(heads=heads):
            overrides = [f"model.d_model={width}", f"model.num_layers={layers}",
                         "model.attention.num_heads=2", f"model.{heads}"]  # fmt: skip
            settings = config.load(None, overrides).model
            network = Network(
                settings, vocab_size=vocab, context_length=context, precision="float32"
            )
            sizes = {name: leaf.size for name, leaf in network.init(jax.random.key(0)).items()}
            outside = scaling_runs.non_embedding(sizes.items())
            assert outside == 12 * layers * width**2 + 13 * layers * width + 2 * width
            tables = vocab * (1 if settings.tie_embeddings else 2) + context
            assert sum(sizes.values()) == outside + tables * width


@pytest.mark.slow
def test_the_law_that_made_the_runs_lies_within_the_intervals():
    runs = made(np.geomspace(3e4, 3e6, 4), np.geomspace(1e5, 1e7, 4))
    fits = scaling_fits.fit(runs, resamples=60)
    assert [found.quantity for found in fits.frontiers] == ["N", "D", "C"]
    assert fits.joint is not None
    for name in ("alpha", "beta"):
        estimate = fits.joint.estimate(lambda law, n=name: getattr(law, n))
        assert estimate.low <= getattr(LAW, name) <= estimate.high
        assert not estimate.includes_zero
    N, D = fits.joint.optimum(1e12)
    true_N, true_D = LAW.optimum(1e12)
    assert N.low <= true_N <= N.high
    assert D.low <= true_D <= D.high
    assert N.value * D.value == pytest.approx(1e12 / 6)


def test_the_frontier_takes_the_best_of_each_size_and_all_its_seeds():
    runs = made([1e4, 1e5, 1e6, 1e7], [1e5, 1e6], noise=0.0, seeds=2)
    (of_size, of_compute) = scaling_fits.fit(runs, resamples=20).frontiers
    assert (of_size.quantity, of_compute.quantity) == ("N", "C")
    best = {run.last for run in runs if run.tokens == 1_000_000}
    assert set(of_size.losses) == best
    assert len(of_size.x) == 8, "four sizes, two seeds"
    assert of_size.points == 4
    by_compute = of_compute.losses[np.argsort(of_compute.x)]
    assert (np.diff(by_compute) <= 0).all(), "nothing cheaper is as good"


def test_laws_that_the_runs_do_not_determine_are_named_with_their_reason():
    fits = scaling_fits.fit(made([1e4, 1e5, 1e6, 1e7], [1e6]), resamples=20)
    assert [found.quantity for found in fits.frontiers] == ["N", "C"]
    missing = dict(fits.missing)
    assert "needs 4 different numbers of tokens, and there are 1" in missing["L(D)"]
    assert "needs 10 different pairs" in missing["L(N, D)"]


def test_too_few_runs_are_refused():
    with pytest.raises(UserError, match="needs 4 different sizes, and there are 3"):
        scaling_fits.fit(made([1e4, 1e5, 1e6], [1e6]))


def test_seeds_that_disagree_make_an_exponent_that_may_be_0(monkeypatch: pytest.MonkeyPatch):
    draw = np.random.default_rng(3)
    runs = [replace(run, last=4 + 0.5 * draw.normal()) for run in made([1e4, 1e5, 1e6, 1e7], [1e6])]
    monkeypatch.setattr(scaling_fits, "RESAMPLES", 40)
    text = repr(scaling.document(scaling_runs.Found(runs, []), "x"))
    assert "L(N)'s exponent includes 0: these runs do not tell that a larger model helps" in text


def test_what_makes_losses_hard_to_compare_is_said(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scaling_fits, "RESAMPLES", 2)
    runs = made(np.geomspace(3e4, 3e6, 4), [1e6])
    first = replace(runs[0], epochs=9.0, best=0.9 * runs[0].last, num_documents=5)

    def said(runs: Sequence[Run]) -> set[str]:
        blocks = scaling.document(scaling_runs.Found(runs, []), "x").blocks
        return {str(block.text) for block in blocks if isinstance(block, Paragraph)}

    warnings = sorted(said([first, *runs[1:]]) - said(runs))
    assert len(warnings) == 3
    assert "1 of 4 runs ended more than 1 % above their own best" in warnings[0]
    assert "read their text 9.0 times" in warnings[1]
    assert "data.num_documents differs" in warnings[2]


@pytest.fixture
def study(finished_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A sweep folder: one true run as trials whose records and configs say what they are told."""

    def copied(number: int, loss: float, **texts: str) -> Path:
        trial = tmp_path / "study" / "trials" / f"trial-{number:03}"
        shutil.copytree(finished_run, trial, ignore=shutil.ignore_patterns("checkpoints", "plots"))
        (tmp_path / "study" / "sweep.yaml").write_text("method: grid\n")
        text = (trial / "config.yaml").read_text()
        for old, new in texts.items():
            text = text.replace(*(f"{old}: {value}" for value in new.split("→")))
        (trial / "config.yaml").write_text(text)
        (trial / "environment.json").unlink()  # it says what the run was trained with
        record = trial / "events.jsonl"
        events = [json.loads(line) for line in record.read_text().splitlines()]
        last = max(e["step"] for e in events if e["event"] == "evaluation")
        changed = [
            e | {"val/nats_per_token": loss}
            if e["event"] == "evaluation" and e["step"] == last
            else e
            for e in events
        ]
        record.write_text("".join(f"{json.dumps(event)}\n" for event in changed))
        return tmp_path / "study"

    return copied


def test_a_run_is_read_as_it_was_trained(study: Callable[..., Path], finished_run: Path):
    (run,) = scaling_runs.read([study(1, 2.5)]).runs
    told = json.loads((finished_run / "summary.json").read_text())
    assert (run.last, run.seed, run.name) == (2.5, 1337, "trial-001")
    assert (run.parameters, run.tokens) == (told["parameters"], told["tokens_seen"])
    assert run.non_embedding < run.parameters


def test_a_run_without_a_last_loss_is_left_out_by_name(study: Callable[..., Path]):
    study(1, 2.5)
    found = scaling_runs.read([study(2, math.nan)])
    assert [run.name for run in found.runs] == ["trial-001"]
    assert found.left_out == [("trial-002", "its last loss is no number")]


def test_a_run_that_was_changed_on_the_way_is_left_out_by_the_setting(
    study: Callable[..., Path], tmp_path: Path
):
    study(1, 2.5)
    record = study(2, 2.4) / "trials" / "trial-002" / "events.jsonl"
    start, *lines = record.read_text().splitlines(keepends=True)
    resumed = {"event": "resumed", "timestamp": json.loads(start)["timestamp"], "step": 0}
    resumed["overrides"] = ["optimizer.learning_rate=1e-2"]
    record.write_text("".join([start, json.dumps(resumed) + "\n", *lines]))
    found = scaling_runs.read([tmp_path / "study"])
    assert [run.name for run in found.runs] == ["trial-001"]
    why = "resumed with optimizer.learning_rate=0.01 from step 0"
    assert found.left_out == [("trial-002", why)]


def test_runs_on_another_text_are_refused_by_the_setting(study: Callable[..., Path]):
    study(1, 2.5)
    with pytest.raises(UserError, match=r"`data\.validation_fraction` is 0\.2 and elsewhere 0\.1"):
        scaling_runs.read([study(2, 2.4, validation_fraction="0.1→0.2")])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="is no run folder"):
        scaling.report([tmp_path], None)


def test_the_report_is_a_page_with_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs = made(np.geomspace(3e4, 3e6, 4), np.geomspace(1e5, 1e7, 4))
    monkeypatch.setattr(scaling_runs, "read", lambda folders: scaling_runs.Found(runs, []))
    monkeypatch.setattr(scaling_fits, "RESAMPLES", 30)
    path = scaling.report([tmp_path], None)
    assert path == tmp_path / "scaling.html"
    assert "<html" in path.read_text()
    text = (tmp_path / "scaling.md").read_text()
    assert "extrapolated" in text
    drawn = {picture.stem for picture in (tmp_path / "scaling").glob("*.png")}
    letters = {"scaling_N", "scaling_D", "scaling_C"}
    assert drawn == {*letters, "scaling_joint", "scaling_optimum"}
