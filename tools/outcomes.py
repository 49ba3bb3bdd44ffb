"""A pytest plugin that says what becomes of each test at once: `-p tools.outcomes --outcomes FILE`.

pytest's own `--junitxml` is written when pytest ends: a run that is cut off leaves none. These are
lines of JSON, added as things happen, one process writing whatever the number of workers:

    {"collected": 1200}                                     the cases that a session means to run
    {"test": ID, "outcome": "passed", "seconds": 0.1,       one for each phase of a case: set-up,
     "phase": "call", "reason": "", "markers": ["slow"]}    call, teardown

`tools/tiers.py` reads them.
"""

import json
from collections.abc import Sequence
from typing import IO

import pytest

MARKERS = {"medium", "slow", "docker", "gpu", "network"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", metavar="FILE", help="add a line for each outcome to this file")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("outcomes")
    if path and not hasattr(config, "workerinput"):  # xdist's workers report to their controller
        file = open(path, "a", encoding="utf-8")  # noqa: SIM115 -- pytest closes it
        config.add_cleanup(file.close)
        config.pluginmanager.register(Outcomes(file))


class Outcomes:
    """Writes the lines."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.is_counted = False

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._count(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._count(len(ids))  # of each worker, and all of them have the same

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed or report.skipped:  # a whole file, which counts as one case
            self._write(collected=1)
            self._write(test=report.nodeid, outcome=report.outcome, phase="collect", seconds=0.0,
                        reason=_reason(report), markers=[])  # fmt: skip

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._write(test=report.nodeid, outcome=report.outcome, phase=report.when,
                    seconds=report.duration, reason=_reason(report),
                    markers=sorted(MARKERS & set(report.keywords)))  # fmt: skip

    def _count(self, cases: int) -> None:
        if not self.is_counted:
            self.is_counted = True
            self._write(collected=cases)

    def _write(self, **facts: object) -> None:
        self.file.write(json.dumps(facts) + "\n")
        self.file.flush()


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped, in one line; nothing where it was not."""
    if not report.skipped:
        return ""
    if hasattr(report, "wasxfail"):
        return f"expected to fail: {report.wasxfail}"
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return " ".join(text.removeprefix("Skipped: ").split())
