"""Run and sweep folders as `mainrun report` reads them, written without training anything.

A run's losses are given; the rest of its record is made up around them, in the form of real ones.
"""

import base64
import csv
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from mainrun import config
from mainrun.sweep.search_space import yaml_text

A_PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
"""Of one dot: for tests that need no picture rendered, which takes most of a report's time."""

START = datetime(2026, 3, 1, 12, tzinfo=UTC)


def make_run(
    folder: Path,
    losses: Mapping[int, float] | None = None,
    *,
    overrides: Sequence[str] = (),
    ending: str | None = "finished",
    name: str | None = None,
    reason: str = "",
    stderr: float = 0.01,
    steps: int = 40,
    samples: Sequence[str] = (),
    peak_bytes: int = 2**28,
    fingerprint: str = "f" * 64,
    begin: datetime = START,
    more: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """A run whose evaluations gave `losses` by step; `more` are events before its end."""
    folder.mkdir(parents=True)
    text = config.to_yaml(config.load(None, overrides))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    environment = {
        "command": ["mainrun", "train", *overrides], "commit": "a" * 40, "dirty": False,
        "data_fingerprint": fingerprint, "devices": ["cpu (made up)"], "python": "3.13.0",
        "platform": "Linux", "packages": {"mainrun": "0.1.0", "jax": "0.12"},
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    losses = {0: 4.0, steps // 2: 2.0, steps: 1.5} if losses is None else losses
    events: list[dict[str, Any]] = [
        {"event": "tracking_started", "wandb": "disabled"},
        {"event": "run_started", "step": 0, "name": name or folder.name, "parameters": 1000,
         "trained_parameters": 1000, "vocab_size": 320, "total_steps": steps,
         "steps_per_epoch": max(steps, 1), "train_documents": 90, "val_documents": 10,
         "train_tokens": 100_000, "val_tokens": 900, "device": "cpu (made up)",
         "precision": "float32", "micro_batches": 1, "compile_seconds": 1.5,
         "step_bytes": 2**27, "estimated_step_bytes": 2**27,
         "memory_bytes": {"mlp": 2**26, "logits": 2**25, "optimizer_state": 2**25}},
    ]  # fmt: skip
    for step in range(steps + 1):
        if step > 0:
            events.append(
                {"event": "train_step", "step": step, "train/loss": 5.0 - 3.0 * step / steps,
                 "optimizer/learning_rate": 1e-3 * (1 - step / (steps + 1)),
                 "optimizer/grad_norm": 1.0 + 1 / step, "perf/step_ms": 10.0 + step % 3,
                 "perf/tokens_per_second": 1000.0 + step, "elapsed_seconds": step / 100,
                 "perf/peak_memory_bytes": peak_bytes}
            )  # fmt: skip
        if step in losses:
            events.append(
                {"event": "evaluation", "step": step, "val/loss": losses[step],
                 "val/loss_stderr": stderr, "val/nats_per_token": 3 * losses[step],
                 "val/perplexity": 9.0, "val/bits_per_byte": 2.0}
            )  # fmt: skip
    if samples:
        events.append({"event": "samples", "step": steps, "texts": list(samples)})
    events += [dict(event) for event in more]
    if ending is not None:
        events.append({"event": ending, **({"reason": reason} if reason else {})})
    lines = []
    for number, event in enumerate(events):
        at = (begin + timedelta(seconds=number)).isoformat().replace("+00:00", "Z")
        named = {k: _named(v) for k, v in event.items()}
        lines.append(json.dumps({"event": named.pop("event"), "timestamp": at, **named}))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def _named(value: Any) -> Any:
    """What JSON has no number for, as the record writes it."""
    if isinstance(value, float) and value != value:
        return "NaN"
    return {float("inf"): "Infinity", float("-inf"): "-Infinity"}.get(value, value) if isinstance(
        value, float
    ) else value  # fmt: skip


def make_sweep(
    folder: Path,
    parameters: Mapping[str, Any],
    trials: Sequence[Mapping[str, Any]],
    *,
    metric: Mapping[str, str] = {"name": "val/loss", "goal": "minimize"},
    method: str = "random",
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """A sweep folder; a trial has `values`, and as far as there are: status, value, run_dir, ..."""
    folder.mkdir(parents=True)
    definition = {
        "method": method, "metric": dict(metric), "parameters": dict(parameters),
        "command": ["mainrun", "train", "${args_no_hyphens}"],
    }  # fmt: skip
    (folder / "sweep.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")
    (folder / "base.yaml").write_text(config.to_yaml(config.Config()), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    if not trials:
        return folder
    names = list(parameters)
    columns = ["trial", "status", metric["name"], "stderr", "step", "seconds", *names,
               "run_dir", "reason"]  # fmt: skip
    with (folder / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for number, trial in enumerate(trials, start=1):
            told = [trial.get(name) for name in ("value", "stderr", "step", "seconds")]
            written = [yaml_text(trial["values"][name]) for name in names]
            writer.writerow(
                [number, trial.get("status", "finished"), *told, *written,
                 trial.get("run_dir") or "", trial.get("reason") or ""]
            )  # fmt: skip
    return folder
