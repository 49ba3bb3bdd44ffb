"""What a run came to, told: `summary.json` for programs, `summary.md` and some lines for people.

All of it is a view of the record and can be made again at any time; what a run did not live to say
is null, or is left out.
"""

import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mainrun.chart import loss_curve
from mainrun.console import printable
from mainrun.markdown import escaped, fenced, link, shortened, table
from mainrun.record import Number, Row, metrics, read_events
from mainrun.result import by_loss, last_event, read_result

_SHOWN_EVALUATIONS = 10
_SHOWN_SAMPLES = 20
_SHOWN_CHARACTERS = 2000  # of a sample; the record has all of it


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Writes `summary.json` and `summary.md`; what comes back is the JSON's content.

    Losses are in nats per character, times in seconds, memory in bytes, speed in tokens per
    second (the median over steps). Raises UserError where the folder has no record.
    """
    events = read_events(run_dir / "events.jsonl")
    result = read_result(run_dir, events)
    _write(run_dir / "summary.json", json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    _write(run_dir / "summary.md", _markdown(result, events))
    return result


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
        ("changed on resume", _changes(result)),
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


def _changes(result: Mapping[str, Any]) -> str:
    return "; ".join(
        f"{escaped(' '.join(change['overrides']))} from step {change['step']:,}"
        for change in result["changes"]
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
