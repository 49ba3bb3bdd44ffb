"""One config with other settings, each profiled by a process of its own, one after the other.

So nothing of one is left for the next: no memory, no cache, no device in use. What cannot be
profiled says why in its row, and the others go on.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from mainrun import child, memory, stop, yaml12
from mainrun import config as configs
from mainrun.errors import RunFailed, UserError
from mainrun.profile import output


@dataclass(frozen=True)
class Row:
    """One of those compared: what is set, and its profile as JSON has it, or why there is none."""

    overrides: tuple[str, ...]
    found: dict[str, Any] | None
    reason: str = ""

    @property
    def name(self) -> str:
        return " ".join(self.overrides)


def variants(settings: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each that `key=a,b` and the like ask for: all combinations of several.

    Values are YAML, so a mapping's commas are its own. Raises UserError for what has another form.
    """
    return list(product(*map(_choices, settings)))


def compare(
    path: Path,
    overrides: Sequence[str],
    chosen: Sequence[tuple[str, ...]],
    options: Sequence[str],
    folder: Path | None,
) -> list[Row]:
    """A row for each; their folders, traces included, stand in `folder` where it is given.

    `options` are the command's own words for each. Raises UserError for settings that no run can
    have, before the first is measured; RunFailed where none could be, or it was asked to stop.
    """
    for changed in chosen:
        configs.load(path, [*overrides, *changed])
    rows: list[Row] = []
    with _place(folder) as place, stop.listening() as stopping:
        for number, changed in enumerate(chosen, 1):
            child.say(f"{number} of {len(chosen)}: {' '.join(changed)}")
            each = place / f"{number}-{_file_name(changed)}"
            words = [str(path), *overrides, *changed, *options, "--output", str(each)]
            log = place / f"{each.name}.log"
            with log.open("wb", buffering=0) as written:
                code = child.follow([*child.MAINRUN, "profile", *words], written, stopping)
            if stopping.requested():
                raise RunFailed(f"stopped after {len(rows)} of {len(chosen)} were measured")
            found = output.read(each) if code == 0 else None
            rows.append(Row(changed, found, "" if found else _reason(log, code)))
        rows = _under_one_peak(rows)
        if folder is not None:
            output.write(folder, as_rows(rows))
    if not any(row.found for row in rows):
        raise RunFailed(f"none could be measured; the last: {rows[-1].reason}")
    return rows


def comparison(rows: Sequence[Row]) -> str:
    """The rows for a terminal."""
    head = ("ms a step:", "alone", "input", "dispatch", "compute", "training",
            "tokens/s", "of peak", "memory", "compile")  # fmt: skip
    cells = [head, *(_cells(row) for row in rows)]
    whole = [line for line in cells if len(line) == len(head)]
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    name_width = max(len(line[0]) for line in cells)

    def text(name: str, *rest: str) -> str:
        if len(rest) > 1:
            rest = tuple(cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True))
        return "  ".join([name.ljust(name_width), *rest])

    return "\n".join(text(*line) for line in cells)


def as_rows(rows: Sequence[Row]) -> dict[str, Any]:
    """The rows as JSON has them."""
    return {
        "rows": [
            {"overrides": list(row.overrides), "profile": row.found, "reason": row.reason or None}
            for row in rows
        ]
    }


def _cells(row: Row) -> tuple[str, ...]:
    if row.found is None:
        return row.name, row.reason
    found = row.found
    seconds = ("step_seconds", "input_seconds", "dispatch_seconds", "compute_seconds",
               "training_step_seconds")  # fmt: skip
    return (
        row.name,
        *(f"{1e3 * found[name]:,.2f}" for name in seconds),
        f"{found['tokens_per_second']:,.0f}",
        f"{100 * found['utilisation']:.1f} %",
        memory.gibibytes(found["peak_memory_bytes"]),
        f"{found['compile_seconds']:.1f} s",
    )


def _under_one_peak(rows: Sequence[Row]) -> list[Row]:
    """The rows with the best of the peaks that were measured, for each precision: a busy machine
    measures another one every time, and no row shall gain by that."""
    best: dict[str, float] = {}
    for row in rows:
        if row.found is not None:
            precision, peak = row.found["precision"], row.found["measured_peak_flops"]
            best[precision] = max(peak, best.get(precision, 0.0))

    def under_best(found: dict[str, Any]) -> dict[str, Any]:
        peak = best[found["precision"]]
        used = found["tokens_per_second"] * found["flops_per_token"]["total"]
        changed = {
            "measured_peak_flops": peak,
            "utilisation": used / (found["peak_flops"] or peak),
        }
        return found | changed

    return [replace(row, found=under_best(row.found)) if row.found else row for row in rows]


def _choices(setting: str) -> list[str]:
    key, equals, text = setting.partition("=")
    try:
        values = yaml12.parse(f"[{text}]")
    except ValueError as error:
        raise UserError(f"--compare {setting}: {error}") from error
    if not key or not equals or not values:
        raise UserError(f"--compare {setting}: write a setting and its values, key.path=a,b,c")
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for value in values]


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    """Where those that are compared have their folders."""
    if folder is not None:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="mainrun-profile-") as temporary:
        yield Path(temporary)


def _file_name(overrides: Sequence[str]) -> str:
    return re.sub(r"[^\w.=-]+", "_", " ".join(overrides))[:100]


def _reason(log: Path, code: int) -> str:
    if code < 0:
        return f"ended by signal {-code}" + (": out of memory?" if code == -9 else "")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.strip()), f"ended with code {code}")
    return said.removeprefix("mainrun: ").removeprefix("failed: ")
