"""A sweep in its job's page: made of its `summary.json`, whatever a container has put there."""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mainrun.job_summary import markdown
from tests.test_job_summary import (
    HOSTILE,
    MAX_BYTES,
    assert_harmless,
    facts,
    fences,
    headings,
    job,
    tokens,
)  # fmt: skip


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


def sweep_result(**changes: Any) -> dict:
    """The content of a sweep's `summary.json`."""
    ranked = {"trial": 2, "value": 1.5, "stderr": 0.25, "step": 40, "settings": ["0.1"],
              "seconds": 61.0}  # fmt: skip
    return {
        "name": "random", "run_dir": "runs/random-4711-1", "status": "stopped", "reason": None,
        "sweep": "random", "method": "random", "metric": {"name": "val/loss", "goal": "minimize"},
        "trials": {"wanted": 4, "finished": 1, "pruned": 0, "failed": 1, "refused": 0,
                   "running": 1},
        "best": {"trial": 2, "value": 1.5, "stderr": 0.25, "step": 40, "overrides": ["a.b=0.1"],
                 "run_dir": "runs/random-4711-1/trials/trial-002"},
        "settings": ["model.dropout"], "ranking": [ranked],
        "failures": [{"trial": 1, "status": "failed", "reason": "no such corpus",
                      "settings": "model.dropout=0.2"}],
        "total_seconds": 120.0, "resume_command": "mainrun sweep runs/random-4711-1",
        "wandb": {"url": None},
        **changes,
    }  # fmt: skip


@pytest.fixture
def sweep(runs: Path) -> Path:
    (runs / "random-4711-1").mkdir(parents=True)
    return runs / "random-4711-1"


SWEEP = {"task": "sweep", "run": "runs/random-4711-1", "words": ["x.yaml", "k=a b"]}


def test_a_sweep_brings_its_own_summary_and_a_stopped_one_says_how_to_go_on(
    sweep: Path, runs: Path
):
    (sweep / "summary.json").write_text(json.dumps(sweep_result()))
    page = markdown(job("stopped", "it was stopped", **SWEEP), runs, ["last"])
    assert headings(page) == [
        ("h1", "Sweep was stopped"), ("h2", "random-4711-1: stopped"), ("h3", "Best trials"),
        ("h3", "Failures"), ("h3", "To go on"), ("h3", "To use the best"),
    ]  # fmt: skip
    assert "`val/loss` **1.5 ± 0.25** in trial 2, the lowest." in page
    assert facts(page)["trials"] == "1 of 4 trials, 1 failed, 1 interrupted"
    assert "| 2 | 1.5 ± 0.25 | 40 | 0.1 | 01:01 |" in page
    assert "| 1 | failed | model.dropout\\=0.2 | no such corpus |" in page
    assert fences(page)["sh"] == (
        "mainrun train runs/random-4711-1/best.yaml\n"
        "mainrun generate runs/random-4711-1/trials/trial-002\n"
    )
    assert "workflows/sweep.yml) with `resume` = `random-4711-1`; when the sweep is no" in page
    assert "last\n" in [token.content for token in tokens(page) if token.type == "fence"]
    assert "To go on, on" not in markdown(job("finished", **SWEEP), runs, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "no summary of its own"),
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        (json.dumps(sweep_result(total_seconds="[x](y)")), "cannot be read"),
        (json.dumps(sweep_result(best=sweep_result()["best"] | {"trial": "<b>"})), "cannot be"),
        (json.dumps(sweep_result(failures=[{}])), "cannot be read"),
        (" " * 2**25, "cannot be read: summary.json has 32 MiB"),
        (json.dumps(sweep_result(settings=["x" * 2000] * 500)), "too long for this page"),
    ],
    ids=range(9),
)
def test_a_sweep_without_a_readable_summary_has_a_page_all_the_same(
    sweep: Path, runs: Path, text: str | None, said: str
):
    if text is not None:
        (sweep / "summary.json").write_text(text)
    page = markdown(job("killed", "it was killed", **SWEEP), runs, ["the end"])
    assert said in page.replace("\\", "")
    assert facts(page)["artifact"] == "sweep-4711-1"
    assert fences(page)["text"] == "the end\n"
    assert len(page.encode()) < MAX_BYTES


def test_what_a_sweep_has_written_for_people_is_not_read(sweep: Path, runs: Path):
    (sweep / "summary.md").write_text("# [log in](https://evil.example)\n\n<details open>\n")
    (sweep / "summary.json").write_text(json.dumps(sweep_result()))
    page = markdown(job("failed", "x", url="", **SWEEP), runs, [])
    assert "evil" not in page
    assert_harmless(page)


def test_a_sweeps_many_failures_are_counted_and_the_first_are_shown(sweep: Path, runs: Path):
    failure = sweep_result()["failures"][0] | {"reason": "é" * 500}
    (sweep / "summary.json").write_text(json.dumps(sweep_result(failures=[failure] * 5000)))
    page = markdown(job("failed", "x", **SWEEP), runs, ["the end"])
    assert len(page.encode()) < MAX_BYTES
    assert "The first 30 of 5,000" in page


def hostile(value: Any) -> Any:
    """The same with hostile text in the place of every text."""
    match value:
        case dict():
            return {key: hostile(item) for key, item in value.items()}
        case list():
            return [hostile(item) for item in value]
        case str():
            return HOSTILE
        case _:
            return value


def test_hostile_text_in_every_field_of_a_sweep_is_shown_and_never_obeyed(sweep: Path, runs: Path):
    result = hostile(sweep_result(reason="x", wandb={"url": "https://evil.example"}))
    (sweep / "summary.json").write_text(json.dumps(result))
    page = markdown(job("failed", "x", url="", **SWEEP), runs, [])
    assert_harmless(page)
    assert {text for tag, text in headings(page) if tag != "h2"} == {
        "Sweep failed", "Best trials", "Failures", "To go on", "To use the best",
    }  # fmt: skip
    assert "alert(1)" in page


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The places of all values in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
        yield (*path, key)
        if isinstance(item, (dict, list)):
            yield from places(item, (*path, key))


def test_a_sweeps_summary_with_anything_in_any_place_is_harmless(
    sweep: Path, runs: Path, subtests: pytest.Subtests
):
    values = [HOSTILE, 5, None, [HOSTILE], {HOSTILE: HOSTILE}, math.nan]
    for place, value in itertools.product(places(sweep_result()), values):
        with subtests.test(place=place, value=value):
            result = sweep_result()
            inside: Any = result
            for key in place[:-1]:
                inside = inside[key]
            inside[place[-1]] = value
            (sweep / "summary.json").write_text(json.dumps(result))
            page = markdown(job("failed", "x", url="", **SWEEP), runs, [])
            assert_harmless(page)
            assert headings(page)[0] == ("h1", "Sweep failed")


def test_no_secret_of_a_sweeps_is_on_the_page(
    sweep: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
):
    secret = "canary_*[x](y)_0123456789"
    monkeypatch.setenv("WANDB_API_KEY", secret)
    (sweep / "summary.json").write_text(json.dumps(sweep_result(reason=secret)))
    page = markdown(job("failed", "x", **SWEEP), runs, [])
    assert "canary" not in page
    assert "WANDB" in page
