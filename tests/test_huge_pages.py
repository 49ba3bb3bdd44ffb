"""A process that trains on a CPU starts anew once, asking glibc for large pages."""

import os
import subprocess
import sys

import pytest

from mainrun import huge_pages
from mainrun.record import read_events
from tests.conftest import Mainrun

large_pages = pytest.mark.skipif(
    not huge_pages.are_given(), reason="the kernel gives no large pages"
)


@large_pages
def test_the_request_is_added_to_what_is_said(subtests: pytest.Subtests) -> None:
    cases = [
        ({}, "glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.perturb=1"},
         "glibc.malloc.perturb=1:glibc.malloc.hugetlb=1"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "glibc.malloc.hugetlb=0"),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}, "glibc.malloc.hugetlb=1"),
    ]  # fmt: skip
    for before, after in cases:
        with subtests.test(before=before, after=after):
            made = huge_pages.requested({"HOME": "/", **before})
            assert made == {"HOME": "/", "GLIBC_TUNABLES": after}


@pytest.mark.slow
def test_a_run_is_the_same_with_and_without(
    tmp_path: os.PathLike, tiny: list[str], mainrun: Mainrun
) -> None:
    """The words of the command come through the second start, whatever is in them."""
    losses = []
    for name, value in (("with", ""), ("without", "glibc.malloc.hugetlb=0")):
        run_dir = tmp_path / f"a run {name}"  # type: ignore[operator]
        words = [*tiny, "training.max_steps=3", "tracking.tags=['a b', \"c\"]"]
        mainrun("train", *words, "--run-dir", run_dir, env=os.environ | {"GLIBC_TUNABLES": value})
        found = read_events(run_dir / "events.jsonl")
        losses.append([e["train/loss"] for e in found if e["event"] == "train_step"])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@large_pages
def test_the_process_keeps_its_number() -> None:
    """Whoever started it signals it by that."""
    code = (
        "import os, sys; from mainrun import huge_pages; before = os.environ.get('PID');"
        "os.environ['PID'] = before or str(os.getpid()); huge_pages.ask();"
        "print(os.environ['PID'] == str(os.getpid()), bool(before))"
    )
    environment = {n: v for n, v in os.environ.items() if n != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert done.stdout.split() == ["True", "True"], done.stderr
