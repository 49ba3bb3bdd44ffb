"""CI's plan covers every test, and a test's cost is judged by its tier. Nothing runs here."""

import json
import os
from itertools import product
from pathlib import Path

import yaml

from tools import results, tiers
from tools.outcomes import MARKERS
from tools.results import Result

TASKS = yaml.safe_load((tiers.ROOT / "taskfile.yml").read_text())["tasks"]


def test_the_plan_ends_before_github_ends_the_job():
    ci = yaml.safe_load((tiers.ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = ci["jobs"].values()
    assert sum(step.minutes for step in tiers.PLAN) + 5 <= job["timeout-minutes"]


def test_every_step_of_the_plan_exists():
    for step in tiers.WITH_GPU:
        match list(step.command):
            case [_, "-x", name, *rest]:
                assert rest == ["--"] * step.is_tier, step
                assert name in TASKS
                assert not step.is_tier or "{{.CLI_ARGS}}" in TASKS[name]["cmds"][-1]
            case [script]:
                assert os.access(tiers.ROOT / script, os.X_OK)


def test_every_test_that_needs_no_internet_is_of_one_tier():
    expressions = []
    for step in tiers.WITH_GPU:
        if step.is_tier:
            _, chosen, _ = TASKS[step.name]["cmds"][-1].split('"')
            expressions.append(chosen)
    for has in product([False, True], repeat=len(MARKERS)):
        markers = dict(zip(sorted(MARKERS), has, strict=True))
        taken = sum(eval(expression, {}, markers) for expression in expressions)
        assert taken == (not markers["network"]), markers


def test_every_allowed_reason_is_that_of_some_test():
    sources = [path.read_text() for path in (tiers.ROOT / "tests").rglob("*.py")]
    allowed = results.patterns(tiers.ROOT / ".ci" / "allowed-skips.txt")
    assert allowed
    assert [a for a in allowed if not any(a.strip("*") in text for text in sources)] == []


def result(path: Path, **seconds: tuple[float, float, list[str]]) -> Result:
    """A tier of tests by name: seconds of their fixtures, of themselves, and their markers."""
    lines = [{"collected": len(seconds)}]
    for name, (setup, call, markers) in seconds.items():
        for phase, spent in (("setup", setup), ("call", call), ("teardown", 0.0)):
            lines.append({"test": name, "outcome": "passed", "phase": phase, "seconds": spent,
                          "reason": "", "markers": markers})  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Result("test", 1.0, 2.0, "", True, *results.read(path))


def test_what_costs_more_than_its_tier_allows_is_named_with_what_it_was(tmp_path):
    done = result(
        tmp_path / "lines",
        quick=(9, 2, []), cheap=(0, 2.5, []),
        whole=(0, 19, ["medium"]), training=(0, 31, ["medium"]),
        long=(0, 99, ["slow"]), first=(24, 1, ["slow"]),
    )  # fmt: skip
    assert results.faults(done, []) == []
    text = results.markdown([done], [], {"training": 12})
    assert [line for line in text.splitlines() if line.startswith("-")] == [
        "- 31 s: `training`, of 20 s, 12 s in the durations kept",
        "- 24 s: the fixtures of `first`",
        "- 2 s: `cheap`, of 2 s",
    ]


def test_durations_are_kept_by_function_in_whole_seconds(tmp_path):
    done = result(tmp_path / "lines", **{"b[1-x]": (0, 3.2, []), "b[2]": (0, 7.6, []),
                                         "a": (0, 1.4, []), "c": (0, 0.9, [])})  # fmt: skip
    results.write_durations([done], tmp_path / "durations.tsv")
    assert (tmp_path / "durations.tsv").read_text() == "a\t1\nb\t8\n"
    assert results.read_durations(tmp_path / "durations.tsv") == {"a": 1, "b": 8}
    assert results.read_durations(tmp_path / "nothing") == {}
