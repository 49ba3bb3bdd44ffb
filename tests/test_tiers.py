"""CI's table is green for nothing but a whole run: small suites, run by pytest as CI runs ours."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools import results, tiers

pytestmark = pytest.mark.medium

PYTEST = "[sys.executable, '-m', 'pytest', '-p', 'no:cacheprovider', '-q', {suite!r}, *{options!r}]"
ONE, TWO = (["-p", "xdist", "-n", count] for count in "12")
PASSES = "def test_passes(): pass\n"
BLOCKS = """
import fcntl, os, signal, threading
def test_passes(): pass
def test_blocks():
    with open(os.environ["HELD"], "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        if os.fork() == 0:  # a child that holds it too
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.pause()
        if "DEAF" in os.environ:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        if "CANCEL" in os.environ:
            os.kill(int(os.environ["TIERS"]), signal.SIGTERM)
        threading.Event().wait()
def test_never(): pass
"""


@pytest.fixture
def ci(tmp_path: Path):
    """Runs tiers of one suite each: what was printed, and the exit code."""

    def run(*suites: str, options=(), minutes=(), allowed="", before="", **environ):
        steps = [before] if before else []
        for number, text in enumerate(suites):
            suite = tmp_path / f"test_{number}.py"
            suite.write_text(text)
            (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    medium\n    slow\n")
            limit = minutes[number] if minutes else 5
            command = PYTEST.format(suite=str(suite), options=list(options))
            steps.append(f"Step('tier-{number}', {limit}, {command})")
        kept = tmp_path / "kept"
        kept.mkdir(exist_ok=True)
        (kept / "allowed-skips.txt").write_text(allowed)
        program = (
            "import os, sys\nfrom pathlib import Path\nfrom tools import tiers\n"
            "from tools.tiers import Step, main\n"
            f"tiers.GRACE_SECONDS_OF_A_CANCEL = {0.5 if 'DEAF' in environ else 60}\n"
            "os.environ['TIERS'] = str(os.getpid())\n"
            f"sys.exit(main([{', '.join(steps)}], Path({str(tmp_path / 'out')!r}), "
            f"Path({str(kept)!r})))"
        )
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tiers.ROOT,
            env={**os.environ, **environ, "GITHUB_STEP_SUMMARY": str(tmp_path / "page.md"),
                 "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # they take seconds
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        return done.stdout, done.returncode

    return run


def rows(text: str) -> dict[str, list[str]]:
    """By the tier's name: cases, passed, failed, skipped, verdict."""
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {
        first.strip(): [c.strip() for c in (*counts, verdict)]
        for first, *counts, _, _, verdict in cells
    }


def test_all_passed_is_green_and_says_so_last(ci, tmp_path):
    text, code = ci(PASSES, PASSES + "def test_too(): pass\n", options=TWO)
    assert code == 0
    assert rows(text)["tier-0"] == ["1", "1", "0", "0", "green"]
    assert rows(text)["tier-1"] == ["2", "2", "0", "0", "green"]
    assert text.splitlines()[-2:] == ["", "3 passed, 0 failed, 0 skipped"]
    assert (tmp_path / "out" / "durations.tsv").exists()
    assert (tmp_path / "page.md").read_text().endswith("Green.\n")


def test_a_failure_is_red_and_named_and_the_next_tier_still_runs(ci, tmp_path):
    fails = """
import pytest
@pytest.fixture
def broken(): raise OSError
@pytest.fixture
def late():
    yield
    raise OSError
def test_passes(): pass
def test_fails(): assert 1 > 2
def test_is_not_set_up(broken): pass
def test_is_not_torn_down(late): pass
"""
    text, code = ci(fails, PASSES)
    assert code == 1
    assert rows(text)["tier-0"] == ["4", "1", "3", "0", "3 failed"]
    assert rows(text)["tier-1"][-1] == "green"
    for name in ("fails", "is_not_set_up", "is_not_torn_down"):
        assert f"- `test_0.py::test_{name}`" in text.splitlines()
    assert text.splitlines()[-3:] == ["Red.", "", "2 passed, 3 failed, 0 skipped"]
    assert not (tmp_path / "out" / "durations.tsv").exists()


def test_a_worker_that_dies_is_red_with_the_test_that_it_died_of(ci):
    dies = "import os\ndef test_dies(): os._exit(0)\n" + PASSES
    text, code = ci(dies, options=ONE)
    assert code == 1
    assert rows(text)["tier-0"] == ["2", "1", "1", "0", "1 failed"]
    assert "- `test_0.py::test_dies`" in text


def test_a_skip_is_red_unless_its_reason_is_allowed(ci):
    skips = (
        """
import pytest
@pytest.mark.parametrize("n", [1, 2])
def test_skips(n): pytest.skip("no Docker Engine answers: [Errno 2]")
@pytest.mark.xfail(reason="not yet")
def test_is_to_fail(): assert False
"""
        + PASSES
    )
    whole_file = "import pytest\npytest.importorskip('no_such_module')\n" + PASSES
    text, code = ci(skips, whole_file)
    assert code == 1
    assert rows(text)["tier-0"] == ["4", "1", "0", "3", "3 skipped that may not be"]
    first = "- 2 × no Docker Engine answers: [Errno 2] (not allowed; `test_0.py::test_skips[1]`)"
    assert first in text
    assert "- 1 × expected to fail: not yet (not allowed" in text
    assert rows(text)["tier-1"][:4] == ["1", "0", "0", "1"]

    allowed = "# reasons\n\nno Docker Engine *\nexpected to fail: *\n"
    text, code = ci(skips, allowed=allowed)
    assert "- 2 × no Docker Engine answers: [Errno 2]\n" in text
    assert rows(text)["tier-0"][-1] == "green"
    assert code == 0


@pytest.mark.parametrize("text", ["", "import nothing_like_it\n", "raise SystemExit(0)\n"])
def test_nothing_ran_is_red(ci, text):
    text, code = ci(text)
    assert code == 1
    assert rows(text)["tier-0"][-1] != "green"


def test_a_tier_that_never_came_to_pytest_is_red(ci):
    """As where lint fails before it, or a task no longer passes our arguments on."""
    before = "Step('lint', 5, ['sh', '-c', 'exit 3']), Step('odd', 5, ['true'])"
    text, code = ci(PASSES, before=before)
    assert code == 1
    assert rows(text)["lint"] == ["0", "0", "0", "0", "ended with code 3; nothing ran"]
    assert rows(text)["odd"] == ["0", "0", "0", "0", "nothing ran"]
    assert rows(text)["tier-0"][-1] == "green"


def test_what_is_no_tier_may_fail_for_the_skips_tell(ci):
    text, code = ci(PASSES, before="Step('PyTorch', 5, ['false'], is_tier=False)")
    assert rows(text)["PyTorch"] == ["", "", "", "", "ended with code 1"]
    assert code == 0


def test_an_early_end_is_red_though_pytest_says_zero(ci):
    ends = "import pytest\ndef test_ends(): pytest.exit('enough', 0)\ndef test_never(): pass\n"
    text, code = ci(PASSES + ends)
    assert code == 1
    assert rows(text)["tier-0"] == ["3", "1", "0", "0", "2 not reached"]


@pytest.mark.slow
def test_time_that_runs_out_is_red_and_leaves_nothing_running(ci, tmp_path):
    """The deadline may come before pytest has begun, on a slow machine: no number is asserted."""
    held = tmp_path / "held"
    text, code = ci(BLOCKS, PASSES, minutes=[0.02, 0], options=ONE, HELD=str(held))
    assert code == 1
    assert rows(text)["tier-0"][-1].startswith("time is up")
    assert rows(text)["tier-1"] == ["0", "0", "0", "0", "not begun"]
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # would wait for the test's process


@pytest.mark.parametrize("options", [[], ONE], ids=["one process", "workers"])
@pytest.mark.parametrize("deaf", [{}, {"DEAF": "1"}], ids=["ends", "has to be killed"])
def test_a_tier_that_is_cut_off_counts_what_it_did(ci, tmp_path, options, deaf):
    """Cancelled by the very test that blocks, so that what was done by then is certain."""
    held = tmp_path / "held"
    text, code = ci(BLOCKS, PASSES, options=options, HELD=str(held), CANCEL="1", **deaf)
    assert code == 1
    assert rows(text)["tier-0"] == ["3", "1", "0", "0", "stopped; 2 not reached"]
    assert rows(text)["tier-1"][-1] == "not begun"
    assert text.splitlines()[-1] == "1 passed, 0 failed, 0 skipped"
    with held.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


@pytest.mark.parametrize("code", [0, 9])
def test_tests_with_a_gpu_are_of_the_plan_where_a_driver_answers(tmp_path, monkeypatch, code):
    stand_in = tmp_path / "nvidia-smi"
    stand_in.write_text(f"#!/bin/sh\nexit {code}\n")
    stand_in.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ("test-gpu" in [step.name for step in tiers.plan()]) == (code == 0)


def test_markers_reach_the_outcomes_from_workers_too(ci, tmp_path):
    marked = "import pytest\n@pytest.mark.medium\ndef test_passes(): pass\n"
    ci(marked, options=ONE)
    _, cases = results.read(tmp_path / "out" / "tier-0.jsonl")
    assert [case.markers for case in cases.values()] == [["medium"]]
