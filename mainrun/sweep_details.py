"""What a sweep came to, told in Markdown from the content of its `summary.json` alone.

For the sweep's own `summary.md`, and for the page of its job. That one is made on the host, of what
a container has written: so every text here is data, and every number is formatted as one, which
refuses what is none (ValueError or TypeError).
"""

import shlex
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any

from mainrun.console import clock, printable
from mainrun.markdown import code, escaped, fenced, table

_SHOWN_FAILURES = 30


def markdown(result: Mapping[str, Any]) -> str:
    title = f"# {escaped(result['name'])}: {escaped(result['status'])}"
    return "\n\n".join([title, *details(result)]) + "\n"


def details(result: Mapping[str, Any]) -> list[str]:
    """The paragraphs below the title; headings are of the second order."""
    metric, best, ranking = result["metric"], result["best"], result["ranking"]
    parts = [f"**Reason:** {escaped(result['reason'])}"] if result["reason"] else []
    if best:
        word = "lowest" if metric["goal"] == "minimize" else "highest"
        parts.append(
            f"{code(metric['name'])} **{value_text(best)}** in trial {best['trial']:d}, the {word}."
        )
    facts = [
        ("search", f"{escaped(result['method'])} over {len(result['settings'])} settings"),
        ("trials", counted(result["trials"])),
        ("time in all trials", clock(result["total_seconds"])),
        ("Weights & Biases", escaped(result["wandb"]["url"])),
        ("sweep folder", escaped(result["run_dir"])),
    ]
    parts.append(table(["", ""], [fact for fact in facts if fact[1]]))
    if ranking:
        settings = map(escaped, result["settings"])
        header = ["trial", escaped(metric["name"]), "at step", *settings, "time"]
        parts += ["## Best trials", table(header, map(_ranked, ranking))]
    parts += _failures(result["failures"])
    if result["resume_command"]:
        parts += ["## To go on", fenced(printable(result["resume_command"]), "sh")]
    if best:
        commands = [train_again(result)]
        if best["run_dir"]:
            commands.append(shlex.join(["mainrun", "generate", best["run_dir"]]))
        parts += ["## To use the best", fenced("\n".join(map(printable, commands)), "sh")]
    return parts


def value_text(trial: Mapping[str, Any]) -> str:
    """`1.234 ± 0.012`."""
    value, stderr = trial["value"], trial["stderr"]
    if value is None:
        return ""
    return f"{value:.4g}" + (f" ± {stderr:.2g}" if stderr else "")


def counted(trials: Mapping[str, Any]) -> str:
    """`5 of 8 trials, 1 failed, 1 interrupted`."""
    of = "" if trials["wanted"] is None else f" of {trials['wanted']:d}"
    words = {"pruned": "pruned", "failed": "failed", "refused": "refused", "running": "interrupted"}
    others = [f", {trials[name]:d} {word}" for name, word in words.items() if trials[name]]
    return f"{trials['finished']:d}{of} trials" + "".join(others)


def train_again(result: Mapping[str, Any]) -> str:
    return shlex.join(["mainrun", "train", str(PurePosixPath(result["run_dir"]) / "best.yaml")])


def _ranked(row: Mapping[str, Any]) -> list[str]:
    step, seconds = row["step"], row["seconds"]
    return [
        f"{row['trial']:d}",
        value_text(row),
        "" if step is None else f"{step:,}",
        *map(escaped, row["settings"]),
        "" if seconds is None else clock(seconds),
    ]


def _failures(failures: list[Mapping[str, Any]]) -> Iterable[str]:
    if not failures:
        return
    yield "## Failures"
    shown = failures[:_SHOWN_FAILURES]
    cells = [[escaped(row[name]) for name in ("status", "settings", "reason")] for row in shown]
    rows = [[f"{row['trial']:d}", *rest] for row, rest in zip(shown, cells, strict=True)]
    yield table(["trial", "", "settings", "reason"], rows)
    if len(failures) > len(shown):
        yield f"The first {len(shown)} of {len(failures):,}; summary.json has all."
