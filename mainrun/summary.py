"""What a run came to, read from its folder: `summary.json` and `summary.md`.

All of it is a view of the record and can be made again at any time, also of a run that was
stopped, failed, or died in its first second: what it did not live to say is null, or is left out.
"""

import json
import math
import os
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from mainrun import config
from mainrun.chart import loss_curve
from mainrun.console import printable
from mainrun.errors import UserError
from mainrun.markdown import escaped, fenced, link, shortened, table
from mainrun.record import Number, Row, metrics, read_events

_ENDINGS = ("finished", "stopped", "failed")
_NO_LAST_WORD = "the process ended without a last word: killed, or the machine went down"
_SHOWN_EVALUATIONS = 10
_SHOWN_SAMPLES = 20
_SHOWN_CHARACTERS = 2000  # of a sample; the record has all of it


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md`; what comes back is the JSON's content.

    Losses are in nats per character, times in seconds, memory in bytes, speed in tokens per
    second (the median over steps). Raises UserError where the folder has no record.
    """
    events = read_events(run_dir / "events.jsonl")
    result = summary(run_dir, events)
    _write(run_dir / "summary.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _write(run_dir / "summary.md", _markdown(result, events))
    return result


def summary(run_dir: Path, events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of `summary.json`."""
    started = last_event(events, "run_started")
    tracking = last_event(events, "tracking_started")
    rows = metrics(events)
    evaluations = [row for row in rows if "val/loss" in row]
    steps = int(rows[-1]["step"]) if rows else 0
    status, reason, again = _ending(events)
    return {
        "name": started.get("name", run_dir.resolve().name),
        "run_dir": str(run_dir),
        "status": status,
        "reason": reason,
        "steps": steps,
        "total_steps": started.get("total_steps"),
        "val/loss": {
            "first": _point(evaluations[0]) if evaluations else None,
            "last": _point(evaluations[-1]) if evaluations else None,
            "best": _point(min(evaluations, key=by_loss)) if evaluations else None,
        },
        "last": _finite(rows[-1]) if rows else {},
        "parameters": started.get("parameters"),
        "trained_parameters": started.get("trained_parameters", started.get("parameters")),
        "tokens_seen": _tokens_seen(run_dir, started, steps),
        "device": started.get("device"),
        "precision": started.get("precision"),
        "compile_seconds": started.get("compile_seconds"),
        "training_seconds": _training_seconds(rows),
        "total_seconds": _total_seconds(events),
        "noise": _noise(run_dir, rows),
        "tokens_per_second": median(warm_rows(events, rows), "perf/tokens_per_second"),
        "peak_memory_bytes": max((row.get("perf/peak_memory_bytes", 0) for row in rows), default=0)
        or None,
        "resume_command": None if status == "finished" else again or resume_command(run_dir),
        "wandb": {
            "mode": tracking.get("wandb"),
            "id": tracking.get("wandb_id"),
            "url": tracking.get("wandb_url"),
        },
    }


def resume_command(run_dir: Path, overrides: Sequence[str] = ()) -> str:
    return shlex.join(["mainrun", "resume", str(run_dir), *overrides])


def result_lines(result: Mapping[str, Any]) -> list[str]:
    """The result as the command prints it at the end."""
    lines = [f"{result['status']}: {steps_done(result)} in {duration(result['total_seconds'])}"]
    loss = result["val/loss"]
    if loss["last"]:
        lines.append(f"val/loss {_loss(loss['last'])} {_compared(loss)}")
    facts = [
        template.format(result[name])
        for name, template in (
            ("tokens_seen", "{:,} tokens seen"),
            ("tokens_per_second", "{:,.0f} tokens/s"),
        )
        if result[name] is not None
    ]
    if result["peak_memory_bytes"] is not None:
        facts.append(f"peak memory {_bytes(result['peak_memory_bytes'])}")
    if facts:
        lines.append(", ".join(facts))
    if result["wandb"]["url"]:
        lines.append(f"Weights & Biases: {result['wandb']['url']}")
    lines.append(f"run folder: {result['run_dir']}")
    if result["resume_command"]:
        lines.append(f"to go on: {result['resume_command']}")
    else:
        lines.append(f"to let it write: {shlex.join(['mainrun', 'generate', result['run_dir']])}")
    return lines


# ---------------------------------------------------------------------------------------------
# Reading the record


def last_event(events: Iterable[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The last event of that name; without fields where there is none."""
    found: Mapping[str, Any] = {}
    for event in events:
        if event["event"] == name:
            found = event
    return found


def _processes(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The events of each process that worked on the run; a process begins with tracking_started."""
    processes: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "tracking_started" or not processes:
            processes.append([])
        processes[-1].append(event)
    return processes


def _ending(events: Sequence[Mapping[str, Any]]) -> tuple[str, str | None, str | None]:
    """Status, reason and resume command, as far as the last process came to say them."""
    for event in reversed(_processes(events)[-1] if events else []):
        if event["event"] in _ENDINGS:
            return event["event"], event.get("reason"), event.get("resume_command")
    return "failed", _NO_LAST_WORD, None


def by_loss(row: Row) -> Number:
    return row["val/loss"] if math.isfinite(row["val/loss"]) else math.inf


def _point(row: Row) -> dict[str, Any]:
    finite = _finite(row)
    return {
        "step": row["step"],
        "value": finite["val/loss"],
        "stderr": finite.get("val/loss_stderr"),
    }


def _finite(row: Row) -> dict[str, Number | None]:
    """The row as JSON has it: null for what is no number."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}


def _tokens_seen(run_dir: Path, started: Mapping[str, Any], steps: int) -> int | None:
    """Training tokens read, repeated ones counted again; padding is none.

    A step reads batch × context places. Packing whole documents leaves some of them empty: an
    epoch has no more tokens than the training split.
    """
    settings = _settings(run_dir)
    if settings is None or not {"train_tokens", "steps_per_epoch"} <= started.keys():
        return None
    places = steps * settings.training.batch_size * settings.data.context_length
    return min(places, round(started["train_tokens"] * steps / started["steps_per_epoch"]))


def _noise(run_dir: Path, rows: Sequence[Row]) -> dict[str, Number] | None:
    """The gradient noise scale, and the batch of as many tokens beside the one that was.

    It grows as the loss falls, often a hundredfold: the median over the steps stands for the run.
    """
    scale, settings = median(rows, "noise/scale_tokens"), _settings(run_dir)
    if settings is None or scale is None:
        return None
    return {
        "median_scale_tokens": scale,
        "last_scale_tokens": next(
            row["noise/scale_tokens"] for row in reversed(rows) if "noise/scale_tokens" in row
        ),
        "suggested_batch_size": max(1, round(scale / settings.data.context_length)),
        "batch_size": settings.training.batch_size,
    }


def _settings(run_dir: Path) -> config.Config | None:
    try:
        return config.load(run_dir / "config.yaml")
    except (OSError, UserError):
        return None


def _training_seconds(rows: Iterable[Row]) -> Number:
    """Time in optimizer steps only; a step not recorded counts as the next one that was."""
    seconds, last = 0.0, 0.0
    for row in rows:
        if "perf/step_ms" in row:
            seconds += row["perf/step_ms"] / 1000 * (row["step"] - last)
            last = row["step"]
    return round(seconds, 3)


def _total_seconds(events: Sequence[Mapping[str, Any]]) -> float:
    """Wall time of all processes of the run, from the first to the last event of each."""
    seconds = 0.0
    for process in _processes(events):
        first, last = (datetime.fromisoformat(process[i]["timestamp"]) for i in (0, -1))
        seconds += (last - first).total_seconds()
    return round(seconds, 3)


def warm_rows(events: Iterable[Mapping[str, Any]], rows: Iterable[Row]) -> list[Row]:
    """The rows of trained steps, less the first of each process: it warms the device up."""
    cold = set()
    for process in _processes(events):
        trained = (e["step"] for e in process if e["event"] == "train_step")
        cold.update([next(trained, None)])
    return [row for row in rows if "train/loss" in row and row["step"] not in cold]


def median(rows: Iterable[Row], name: str) -> Number | None:
    values = [row[name] for row in rows if name in row]
    return statistics.median(values) if values else None


# ---------------------------------------------------------------------------------------------
# Words


def _markdown(result: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    parts = [f"# {escaped(result['name'])}: {result['status']}"]
    if result["reason"]:
        parts.append(f"**Reason:** {escaped(result['reason'])}")
    parts += [*loss_line(result), *details(result, events)]
    folder = shlex.quote(result["run_dir"])
    commands = [f"mainrun evaluate {folder}", f"mainrun generate {folder}"]
    if result["resume_command"]:
        parts += ["## To go on", fenced(printable(result["resume_command"]), "sh")]
    elif result["val/loss"]["last"] and result["status"] == "finished":
        parts += ["## To use it", fenced("\n".join(commands), "sh")]
    return "\n\n".join(parts) + "\n"


def loss_line(result: Mapping[str, Any]) -> list[str]:
    """The paragraph of Markdown with the last loss; none before the first evaluation."""
    loss = result["val/loss"]
    return [f"`val/loss` **{_loss(loss['last'])}** {_compared(loss)}."] if loss["last"] else []


def details(result: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paragraphs of Markdown between how the run ended and how to go on with it.

    Facts, curve, evaluations and samples; headings are of the second order.
    """
    rows = metrics(events)
    facts = [
        ("steps", steps_done(result).removesuffix(" steps")),
        ("parameters", _parameters(result)),
        ("tokens seen", _number(result["tokens_seen"])),
        ("tokens per second, median", _number(result["tokens_per_second"])),
        ("time training", duration(result["training_seconds"])),
        ("time in all", duration(result["total_seconds"])),
        ("peak memory", _bytes(result["peak_memory_bytes"])),
        ("gradient noise scale", _noise_words(result["noise"])),
        ("stopped early", _early(events)),
        ("steps skipped", _at_steps(events, "step_skipped")),
        ("returns to a checkpoint", _at_steps(events, "went_back")),
        ("device", escaped(result["device"])),
        ("precision", escaped(result["precision"])),
        ("Weights & Biases", _wandb(result, events)),
    ]
    header = ["run folder", escaped(result["run_dir"])]
    parts = [table(header, [fact for fact in facts if fact[1]])]
    if chart := loss_curve(rows):
        parts.append(chart)
    if evaluations := _shown([row for row in rows if "val/loss" in row]):
        header = ["step", "val/loss, nats/char", "±", "nats/token", "perplexity", "bits/byte"]
        if any("val_average/loss" in row for row in evaluations):
            header.append("val_average/loss")
        parts += [
            "## Evaluations",
            table(header, (_evaluation(r)[: len(header)] for r in evaluations)),
        ]
    return [*parts, *_samples(events)]


def _noise_words(noise: Mapping[str, Number] | None) -> str:
    """The batch at which steps and tokens are each about twice the least there could be.

    McCandlish et al. 2018 (arXiv:1812.06162), section 2.3.
    """
    if noise is None:
        return ""
    return (
        f"{noise['median_scale_tokens']:,.0f} tokens in the median, "
        f"{noise['last_scale_tokens']:,.0f} at the end: a batch of about "
        f"{noise['suggested_batch_size']:,} sequences (here {noise['batch_size']:,}); a smaller "
        "one needs more steps, a larger one more tokens"
    )


def _early(events: Sequence[Mapping[str, Any]]) -> str:
    """Where that was; nothing where a later process has gone on."""
    event = last_event(events, "stopped_early")
    later = any(e["event"] == "train_step" and e["step"] > event["step"] for e in events if event)
    if not event or later:
        return ""
    return f"at step {event['step']:,}, no better since {event['best_step']:,}"


def _at_steps(events: Iterable[Mapping[str, Any]], name: str) -> str:
    """How many steps were so; a step that was walked again after a resume counts once."""
    number = len({event["step"] for event in events if event["event"] == name})
    return f"{number:,}; events.jsonl says why" if number else ""


def _wandb(result: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> str:
    if result["wandb"]["url"]:
        return link(result["wandb"]["url"])
    upload = last_event(events, "tracking_started").get("sync_command")
    return escaped(result["wandb"]["mode"]) + (f"; to upload: {escaped(upload)}" if upload else "")


def _samples(events: Sequence[Mapping[str, Any]]) -> list[str]:
    """The newest samples; one of a page's length would hide what stands below it."""
    event = last_event(events, "samples")
    texts = event.get("texts", [])
    if not texts:
        return []
    shown = [
        shortened(printable(shortened(text, _SHOWN_CHARACTERS)), _SHOWN_CHARACTERS)
        for text in texts[:_SHOWN_SAMPLES]
    ]
    parts = [f"## Samples at step {escaped(str(event.get('step')))}", fenced("\n".join(shown))]
    if len(texts) > len(shown):
        parts.append(f"The first {len(shown)} of {len(texts):,}; events.jsonl has all.")
    return parts


def steps_done(result: Mapping[str, Any]) -> str:
    total = result["total_steps"]
    return f"{result['steps']:,} of {total:,} steps" if total else f"{result['steps']:,} steps"


def _loss(point: Mapping[str, Any]) -> str:
    if point["value"] is None:
        return "not a number"
    stderr = "" if point["stderr"] is None else f" ± {point['stderr']:.3f}"
    return f"{point['value']:.3f}{stderr} nats/char"


def _compared(loss: Mapping[str, Any]) -> str:
    """Where the last loss stands among the others."""
    first, last, best = loss["first"], loss["last"], loss["best"]
    at = f"at step {last['step']:,}"
    if first["step"] == last["step"]:
        return f"{at}, the only evaluation"
    here = "the best" if best["step"] == last["step"] else f"best {_at(best)}"
    return f"{at} ({here}); {_at(first)}"


def _at(point: Mapping[str, Any]) -> str:
    return f"{_loss(point)} at step {point['step']:,}"


def _evaluation(row: Row) -> list[str]:
    formats = {
        "val/loss": ".4f",
        "val/loss_stderr": ".4f",
        "val/nats_per_token": ".4f",
        "val/perplexity": ",.2f",
        "val/bits_per_byte": ".4f",
        "val_average/loss": ".4f",
    }
    cells = (format(row[name], spec) if name in row else "" for name, spec in formats.items())
    return [f"{row['step']:,}", *cells]


def _shown(evaluations: Sequence[Row]) -> list[Row]:
    """At most ten rows: the first, the last, the best and others at even distances."""
    count = len(evaluations)
    if count <= _SHOWN_EVALUATIONS:
        return list(evaluations)
    best = min(range(count), key=lambda i: by_loss(evaluations[i]))
    spread = _SHOWN_EVALUATIONS - 2
    chosen = {round(i * (count - 1) / spread) for i in range(spread + 1)} | {best}
    return [evaluations[i] for i in sorted(chosen)]


def _parameters(result: Mapping[str, Any]) -> str:
    total, trained = result["parameters"], result["trained_parameters"]
    return _number(total) + ("" if trained == total else f", {_number(trained)} of them trained")


def _number(value: Number | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _bytes(value: Number | None) -> str:
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def duration(seconds: Number | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole // 60 % 60:02} min"


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
