"""What became of the tiers: outcomes read, judged, and written as a table. No process, no clock."""

from __future__ import annotations

import fnmatch
import json
from collections import defaultdict
from pathlib import Path
from typing import Mapping, NamedTuple, Sequence

BUDGETS = {"check": 2, "test": 20}  # seconds; a test that only `task test-all` runs has none
FIXTURE_BUDGET = 20  # seconds; a fixture is paid by the test that comes first, in whatever tier
KEPT_SECONDS = 1  # what takes less is not in the durations that are kept
MOST_LINES = 40

NOT_BEGUN, TIME_IS_UP, STOPPED = "not begun", "time is up", "stopped"


class Case(NamedTuple):
    """A test with its parameters, as far as it got."""

    outcome: str  # passed, failed, skipped or unfinished
    reason: str = ""  # of a skip
    markers: Sequence[str] = ()
    setup_seconds: float = 0.0
    seconds: float = 0.0  # of the test itself


class Result(NamedTuple):
    """A step of the plan; without cases where it is no tier."""

    name: str
    minutes: float
    limit: float
    ending: str  # nothing where all went well
    is_tier: bool = False
    collected: int = 0
    cases: Mapping[str, Case] = {}

    def names(self, outcome: str) -> list[str]:
        return [name for name, case in self.cases.items() if case.outcome == outcome]

    @property
    def not_reached(self) -> int:
        """Cases that have not come to an end."""
        return max(0, self.collected - len(self.cases)) + len(self.names("unfinished"))


def read(path: Path) -> tuple[int, dict[str, Case]]:
    """How many cases were collected, and those that began, from what `tools/outcomes.py` wrote."""
    collected = 0
    cases: dict[str, Case] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        facts = json.loads(line)
        if "collected" in facts:
            collected += facts["collected"]
            continue
        name, phase, outcome = facts["test"], facts["phase"], facts["outcome"]
        case = cases.get(name, Case("unfinished", markers=facts["markers"]))
        if outcome == "failed":
            case = case._replace(outcome="failed")
        elif outcome == "skipped":
            case = case._replace(outcome="skipped", reason=facts["reason"])
        elif phase == "teardown" and case.outcome == "unfinished":
            case = case._replace(outcome="passed")
        if phase == "setup":
            case = case._replace(setup_seconds=facts["seconds"])
        elif phase == "call":
            case = case._replace(seconds=facts["seconds"])
        cases[name] = case
    return collected, cases


def patterns(path: Path) -> list[str]:
    """Reasons for which a test may be skipped; `*` stands for anything, `#` begins a comment."""
    lines = (line.strip() for line in path.read_text("utf-8").splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def faults(result: Result, allowed: Sequence[str]) -> list[str]:
    """What makes a tier red."""
    if result.ending == NOT_BEGUN:
        return [NOT_BEGUN]
    failed = len(result.names("failed"))
    forbidden = sum(
        not _is_allowed(result.cases[name].reason, allowed) for name in result.names("skipped")
    )
    says = {
        f"{failed:,} failed": failed,
        # A failed test explains the code.
        result.ending: result.ending and not (failed and result.ending.startswith("ended")),
        "nothing ran": not result.cases,
        f"{result.not_reached:,} not reached": result.not_reached,
        f"{forbidden:,} skipped that may not be": forbidden,
    }
    return [words for words, is_so in says.items() if is_so]


def markdown(done: Sequence[Result], allowed: Sequence[str], kept: Mapping[str, int]) -> str:
    """The table, and below it what failed, was skipped, and cost more than its tier allows.

    `kept` are the seconds of an earlier run, as `write_durations` has them.
    """
    rows = [["tier", "cases", "passed", "failed", "skipped", "minutes", "of", ""]]
    for result in done:
        counts, verdict = [""] * 4, result.ending
        if result.is_tier:
            numbers = [len(result.names(outcome)) for outcome in ("passed", "failed", "skipped")]
            counts = [f"{n:,}" for n in (sum(numbers) + result.not_reached, *numbers)]
            verdict = "; ".join(faults(result, allowed)) or "green"
        rows.append([result.name, *counts, f"{result.minutes:.1f}", f"{result.limit:g}", verdict])
    failed = [f"`{name}`" for result in done for name in result.names("failed")]
    parts = [
        _aligned(rows),
        _listed("Failed:", failed),
        _listed("Skipped:", _skips(done, allowed)),
        _listed("Slower than their tier's tests shall be:", _slow(done, kept)),
    ]
    return "\n\n".join(part for part in parts if part)


def closing_line(done: Sequence[Result]) -> str:
    """`N passed, N failed, N skipped`: what reads the output of test runners looks for it."""
    return ", ".join(
        f"{sum(len(result.names(outcome)) for result in done)} {outcome}"
        for outcome in ("passed", "failed", "skipped")
    )


def write_durations(done: Sequence[Result], path: Path) -> None:
    """Whole seconds of each test's slowest parameters, by name: few lines, and few that change."""
    slowest: defaultdict[str, float] = defaultdict(float)
    for result in done:
        for name, case in result.cases.items():
            slowest[_function(name)] = max(slowest[_function(name)], case.seconds)
    lines = [f"{name}\t{slowest[name]:.0f}\n" for name in sorted(slowest)
             if slowest[name] >= KEPT_SECONDS]  # fmt: skip
    path.write_text("".join(lines), encoding="utf-8")


def read_durations(path: Path) -> dict[str, int]:
    """Seconds by test; empty where none were kept yet."""
    rows = path.read_text("utf-8").splitlines() if path.exists() else []
    return {name: int(seconds) for name, seconds in (row.split("\t") for row in rows)}


def _function(name: str) -> str:
    return name.partition("[")[0]


def _is_allowed(reason: str, allowed: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(reason, pattern) for pattern in allowed)


def _skips(done: Sequence[Result], allowed: Sequence[str]) -> list[str]:
    """A line for each reason, those first that make it red."""
    names = defaultdict(list)
    for result in done:
        for name in result.names("skipped"):
            names[result.cases[name].reason].append(name)
    lines = []
    for reason in sorted(names, key=lambda reason: (_is_allowed(reason, allowed), reason)):
        where = "" if _is_allowed(reason, allowed) else f" (not allowed; `{names[reason][0]}`)"
        lines.append(f"{len(names[reason]):,} × {reason}{where}")
    return lines


def _slow(done: Sequence[Result], kept: Mapping[str, int]) -> list[str]:
    lines = []
    for result in done:
        for name, case in result.cases.items():
            tier = "test" if "medium" in case.markers else "check"
            if not {"slow", "docker"} & set(case.markers) and case.seconds > BUDGETS[tier]:
                before = kept.get(_function(name))
                was = "" if before is None else f", {before} s in the durations kept"
                lines.append((case.seconds, f"`{name}`, of {BUDGETS[tier]} s{was}"))
            if case.setup_seconds > FIXTURE_BUDGET:
                lines.append((case.setup_seconds, f"the fixtures of `{name}`"))
    return [f"{seconds:.0f} s: {words}" for seconds, words in sorted(lines, reverse=True)]


def _listed(title: str, lines: Sequence[str]) -> str:
    if not lines:
        return ""
    more = [f"and {len(lines) - MOST_LINES:,} more"] if len(lines) > MOST_LINES else []
    return "\n".join([title, "", *(f"- {line}" for line in [*lines[:MOST_LINES], *more])])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(3, *map(len, column)) for column in zip(*rows)]
    # What is a number stands to the right.
    rules = [
        "-" * width if column in (0, 7) else "-" * (width - 1) + ":"
        for column, width in enumerate(widths)
    ]
    lines = []
    for row in (rows[0], rules, *rows[1:]):
        cells = [
            cell.rjust(width) if rule.endswith(":") else cell.ljust(width)
            for cell, width, rule in zip(row, widths, rules)
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
