"""`docs/benchmarks.md` from the records in `docs/benchmarks/`: `python -m benchmarks.page`.

A benchmark stores what it measured as JSON; the page is a view of all that is stored and is never
edited, so that no number in it was typed by hand.
"""

import json
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import population, report, steady

FOLDER = Path("docs/benchmarks")  # from the repository's root, where benchmarks are run
_STEPS = ("small", "baseline", "large", "gpt124m")


def store(record: Mapping[str, Any], path: Path) -> None:
    """Writes the record, and the page of its folder anew."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    write(path.parent)


def write(folder: Path) -> None:
    """The page of this folder's records, beside the folder."""
    records = {path.stem: json.loads(path.read_text("utf-8")) for path in folder.glob("*.json")}
    folder.with_suffix(".md").write_text(page(records), encoding="utf-8")


def page(records: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown of the records by their names; what has none yet was not run."""
    parts = [
        "# Benchmarks",
        _wrapped(
            "Made by `python -m benchmarks.page` of the records in this page's folder; nothing "
            "here is written by hand. Each section says which command measured it, and on what. "
            "Seconds of a shared machine swing; the ratios are of times taken in turn."
        ),
        "# Steps against PyTorch",
        _wrapped(report.legend()),
    ]
    names = [*_STEPS, *sorted(n for n in records if n not in (*_STEPS, "population", "steady"))]
    parts += [
        report.markdown(records[name]) if name in records else f"## `{name}`\n\nNot run."
        for name in names
    ]
    for name, title, view in (
        ("population", "# Trials per hour", population.markdown),
        ("steady", "# A long run", steady.markdown),
    ):
        found = records.get(name)
        parts += [title, "Not run." if found is None else f"{view(found)}\n\n{_made(found)}"]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _made(record: Mapping[str, Any]) -> str:
    dirty = " and uncommitted changes" if record["dirty"] else ""
    return (
        f"- `{shlex.join(record['command'])}`\n- commit {record['commit'] or 'none'}{dirty}\n"
        f"- {record['cpus']} CPUs, {record['cpu']}; run on {record['device']}"
    )


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str]) -> None:
    write(Path(arguments[0]) if arguments else FOLDER)


if __name__ == "__main__":
    main(sys.argv[1:])
