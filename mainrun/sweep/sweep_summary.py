"""What a sweep came to, as files of its folder: a table, a summary, the best trial's config.

`trials.csv` has every trial, `summary.json` and `summary.md` what a person or a workflow wants to
know, `best.yaml` the settings of the best trial, to be trained again. All are views of the trials
and can be written at any time.
"""

import csv
import io
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from mainrun import sweep_details
from mainrun.console import clock
from mainrun.sweep.metric import Metric
from mainrun.sweep.search_space import SearchSpace, as_overrides, yaml_text
from mainrun.sweep.study import Outcome, Trial

Ending = Literal["running", "finished", "stopped", "failed"]

_RANKED = 10


@dataclass(frozen=True)
class Report:
    """All that is told of a sweep."""

    folder: Path
    space: SearchSpace
    status: Ending
    reason: str | None
    trials: Sequence[Trial]
    wanted: int | None
    run_dirs: Mapping[int, Path]
    """Of the trials that have one, by number."""
    resume_command: str | None
    url: str | None = None
    """Of the sweep's page at Weights & Biases."""


def best(trials: Iterable[Trial], metric: Metric) -> Trial | None:
    """The finished trial with the best value; the first of equals."""
    ranked = ranking(trials, metric)
    return ranked[0] if ranked else None


def ranking(trials: Iterable[Trial], metric: Metric) -> list[Trial]:
    """The finished trials, the best first."""
    sign = 1 if metric.goal == "minimize" else -1
    finished = [t for t in trials if t.outcome.status == "finished"]
    scored = [(sign * t.outcome.value, t) for t in finished if t.outcome.value is not None]
    return [trial for _, trial in sorted(scored, key=lambda pair: pair[0])]


def value_text(trial: Trial) -> str:
    """`1.234 ± 0.012`."""
    return sweep_details.value_text(vars(trial.outcome))


def varied_text(trial: Trial, space: SearchSpace) -> str:
    """`model.dropout=0.1 optimizer.learning_rate=0.003`: what differs from trial to trial."""
    return " ".join(as_overrides({setting: trial.values[setting] for setting in space.varied()}))


def told(
    space: SearchSpace, trials: Sequence[Trial], number: int, wanted: int | None, outcome: Outcome
) -> str:
    """`trial 3: model.dropout=0.1 → val/loss 1.23 ± 0.02 (3 of 10, best 1.2 in trial 1)`."""
    trial = trials[number - 1]
    line = f"trial {number}: {varied_text(trial, space)} → "
    done = sum(t.outcome.status not in ("running", "refused") for t in trials)
    count = f"{done} of {wanted}"
    if outcome.status != "finished":
        return f"{line}{outcome.status}: {outcome.reason} ({count})"
    winner = best(trials, space.metric)
    assert winner is not None
    others = "the best so far" if winner is trial else (
        f"best {winner.outcome.value:.4g} in trial {winner.number}"
    )  # fmt: skip
    return f"{line}{space.metric.name} {value_text(trial)} ({count}, {others})"


def write(report: Report) -> dict[str, Any]:
    """Writes all four files; what comes back is the content of `summary.json`."""
    result = _summary(report)
    folder = report.folder
    _write(folder / "trials.csv", _csv(report))
    _write(folder / "summary.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _write(folder / "summary.md", sweep_details.markdown(result))
    winner = best(report.trials, report.space.metric)
    if winner is not None:
        settings = {"extends": "base.yaml", **_nested(winner.values)}
        origin = f"# Trial {winner.number} of {report.space.name}, the best by "
        _write(
            folder / "best.yaml",
            f"{origin}{report.space.metric.name}: {value_text(winner)}\n"
            + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        )
    return result


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as the command prints it at the end."""
    done = sweep_details.counted(result["trials"])
    lines = [f"{result['status']}: {done} in {clock(result['total_seconds'])}"]
    if winner := result["best"]:
        stderr = f" ± {winner['stderr']:.2g}" if winner["stderr"] else ""
        lines.append(
            f"best: {result['metric']['name']} {winner['value']:.4g}{stderr} in trial "
            f"{winner['trial']}: {shlex.join(winner['overrides'])}"
        )
    if result["wandb"]["url"]:
        lines.append(f"Weights & Biases: {result['wandb']['url']}")
    lines.append(f"sweep folder: {result['run_dir']}")
    if result["resume_command"]:
        lines.append(f"to go on: {result['resume_command']}")
    elif result["best"]:
        lines.append(f"to train the best again: {sweep_details.train_again(result)}")
    return lines


def _summary(report: Report) -> dict[str, Any]:
    ranked = ranking(report.trials, report.space.metric)
    winner = ranked[0] if ranked else None
    counts: Counter[str] = Counter(trial.outcome.status for trial in report.trials)
    return {
        "name": report.folder.resolve().name,
        "run_dir": str(report.folder),
        "status": report.status,
        "reason": report.reason,
        "sweep": report.space.name,
        "method": report.space.method,
        "metric": vars(report.space.metric),
        "trials": {"wanted": report.wanted, **_counts(counts)},
        "best": None if winner is None else {
            "trial": winner.number,
            "value": winner.outcome.value,
            "stderr": winner.outcome.stderr,
            "step": winner.outcome.step,
            "overrides": list(as_overrides(winner.values)),
            "run_dir": _run_dir(report, winner),
        },
        "settings": list(report.space.varied()),
        "ranking": [_ranked(trial, report.space) for trial in ranked[:_RANKED]],
        "failures": [
            {"trial": t.number, "status": t.outcome.status, "reason": t.outcome.reason,
             "settings": varied_text(t, report.space)}
            for t in report.trials
            if t.outcome.status in ("failed", "refused")
        ],
        "total_seconds": round(sum(t.outcome.seconds or 0.0 for t in report.trials), 3),
        "resume_command": report.resume_command,
        "wandb": {"url": report.url},
    }  # fmt: skip


def _counts(counts: Mapping[str, int]) -> dict[str, int]:
    return {
        name: counts.get(name, 0) for name in ("finished", "pruned", "failed", "refused", "running")
    }


def _ranked(trial: Trial, space: SearchSpace) -> dict[str, Any]:
    outcome = trial.outcome
    return {
        "trial": trial.number,
        "value": outcome.value,
        "stderr": outcome.stderr,
        "step": outcome.step,
        "settings": [_short(trial.values[setting]) for setting in space.varied()],
        "seconds": outcome.seconds,
    }


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else yaml_text(value)


def _csv(report: Report) -> str:
    settings, file = list(report.space.parameters), io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    metric = report.space.metric.name
    writer.writerow(
        ["trial", "status", metric, "stderr", "step", "seconds", *settings, "run_dir", "reason"]
    )
    for trial in report.trials:
        outcome = trial.outcome
        told = (outcome.status, outcome.value, outcome.stderr, outcome.step, outcome.seconds)
        values = [yaml_text(trial.values[setting]) for setting in settings]
        writer.writerow(
            [trial.number, *told, *values, _run_dir(report, trial) or "", outcome.reason or ""]
        )
    return file.getvalue()


def _run_dir(report: Report, trial: Trial) -> str | None:
    path = report.run_dirs.get(trial.number)
    return None if path is None else str(path)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """`{"a.b": 1}` as `{"a": {"b": 1}}`."""
    tree: dict[str, Any] = {}
    for setting, value in values.items():
        *parents, name = setting.split(".")
        inside = tree
        for parent in parents:
            inside = inside.setdefault(parent, {})
        inside[name] = value
    return tree


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write it too
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
