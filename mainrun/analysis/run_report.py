"""The report of one run: how it ended, curves, settings, speed, memory, samples, how to go on."""

import itertools
import math
import shlex
from collections.abc import Iterator, Sequence

from mainrun import config
from mainrun.analysis import run_plots
from mainrun.analysis.document import (
    Block,
    Code,
    Details,
    Document,
    Heading,
    Link,
    Listing,
    Paragraph,
    Strong,
    Table,
    Text,
    facts,
)
from mainrun.analysis.quantities import bytes_text, loss, number, setting
from mainrun.analysis.run_folder import Run, percentiles
from mainrun.record import Number
from mainrun.summary import duration, steps_done

_TELLING = {
    "warning": "message", "step_skipped": "reason", "went_back": "reason", "resumed": "overrides",
    "stopped_early": "best_step", "stopped": "resume_command", "failed": "reason",
}  # fmt: skip
"""Events that a reader of the curves should know of, and the field that says why."""
_SHOWN_EVENTS = 50
_SHOWN_SAMPLES = 20
_SHOWN_CHARACTERS = 2000  # of a sample; the record has all of it


def report(run: Run) -> Document:
    parts = (
        _headline, _curves, _facts, _evaluations, _speed, _memory, _happenings, _samples,
        _settings, _environment, _commands,
    )  # fmt: skip
    blocks = itertools.chain.from_iterable(part(run) for part in parts)
    return Document(f"{run.name}: {run.status}", tuple(blocks))


def _headline(run: Run) -> Iterator[Block]:
    if run.result["reason"]:
        yield Paragraph((Strong("Reason:"), f" {run.result['reason']}"))
    best, last = run.best, run.last
    if best is None or last is None:
        yield Paragraph("No evaluation has been recorded.")
        return
    told = f" nats per character, the best, at step {best['step']:,}"
    if last["step"] != best["step"]:
        told += f"; {loss(last['value'], last['stderr'])} at the last, step {last['step']:,}"
    value = Strong(loss(best["value"], best["stderr"]))
    yield Paragraph((Code("val/loss"), " ", value, f"{told}."))


def _curves(run: Run) -> Iterator[Block]:
    drawn = run_plots.curves(run)
    if drawn:
        yield Heading("Curves")
        yield from drawn


def _facts(run: Run) -> Iterator[Block]:
    result = run.result
    parameters = number(result["parameters"])
    if result["trained_parameters"] != result["parameters"]:
        parameters += f", {number(result['trained_parameters'])} of them trained"
    noise = result["noise"]
    address = result["wandb"]["url"]
    yield Heading("Facts")
    yield facts(
        [
            ("run folder", Code(str(run.folder))),
            ("steps", steps_done(result).removesuffix(" steps")),
            ("parameters", parameters),
            ("vocabulary", number(run.started.get("vocab_size"))),
            ("training text", _text_size(run, "train")),
            ("validation text", _text_size(run, "val")),
            ("tokens seen", number(result["tokens_seen"])),
            ("time training", duration(result["training_seconds"])),
            ("time in all", duration(result["total_seconds"])),
            ("device", str(result["device"] or "")),
            ("precision", str(result["precision"] or "")),
            ("gradient noise scale", "" if noise is None else (
                f"{noise['median_scale_tokens']:,.0f} tokens in the median: a batch of about "
                f"{noise['suggested_batch_size']:,} sequences (here {noise['batch_size']:,})"
            )),
            ("Weights & Biases", Link(str(address)) if address else ""),
        ]
    )  # fmt: skip


def _text_size(run: Run, split: str) -> str:
    documents, tokens = (run.started.get(f"{split}_{unit}") for unit in ("documents", "tokens"))
    if documents is None or tokens is None:
        return ""
    return f"{documents:,} documents, {tokens:,} tokens"


def _evaluations(run: Run) -> Iterator[Block]:
    columns = {
        "val/loss": "val/loss, nats/char", "val/loss_stderr": "±",
        "val/nats_per_token": "nats/token", "val/perplexity": "perplexity",
        "val/bits_per_byte": "bits/byte", "val_average/loss": "val_average/loss",
    }  # fmt: skip
    evaluated = [row for row in run.rows if "val/loss" in row]
    names = [name for name in columns if any(name in row for row in evaluated)]
    if not evaluated:
        return
    header = ["step", *(columns[name] for name in names)]
    rows = [[f"{row['step']:,}", *(_cell(row.get(n)) for n in names)] for row in evaluated]
    yield Details(f"All evaluations ({len(evaluated):,})", (Table(header, rows),))


def _cell(value: Number | None) -> str:
    return "" if value is None else number(value, 5)


def _speed(run: Run) -> Iterator[Block]:
    speeds = percentiles(run.warm, "perf/tokens_per_second")
    steps = percentiles(run.warm, "perf/step_ms")
    if speeds is None or steps is None:
        return
    yield Heading("Speed")
    if use := percentiles(run.warm, "perf/mfu"):
        utilisation = f"{100 * use[1]:.1f} % in the median"
    else:
        utilisation = ""
    seconds = run.result["compile_seconds"]
    yield facts(
        [
            ("tokens per second", f"{speeds[1]:,.0f} in the median, "
                                  f"{speeds[0]:,.0f} to {speeds[2]:,.0f} in nine of ten steps"),
            ("time of a step", f"{steps[1]:,.1f} ms in the median, "
                               f"{steps[0]:,.1f} to {steps[2]:,.1f} ms in nine of ten steps"),
            ("use of the device's peak", utilisation),
            ("compilation", "" if seconds is None else duration(seconds)),
        ]
    )  # fmt: skip
    yield Paragraph("Without the first step of each process, which warms the device up.")


def _memory(run: Run) -> Iterator[Block]:
    estimated = run.started.get("estimated_step_bytes")
    compiled, peak = run.started.get("step_bytes"), run.result["peak_memory_bytes"]
    parts = run.started.get("memory_bytes") or {}
    if not any((estimated, compiled, peak)):
        return
    yield Heading("Memory")
    yield facts(
        [
            ("a training step, as estimated", bytes_text(estimated)),
            ("by the compiler's count", bytes_text(compiled)),
            ("peak of the device (on a CPU: of the process)", bytes_text(peak)),
        ]
    )
    total = sum(parts.values())
    ordered = sorted(parts.items(), key=lambda part: -part[1])
    if total:
        yield Table(
            ["part of the estimate", "memory", "share"],
            [[name.replace("_", " "), bytes_text(size), f"{100 * size / total:.0f} %"]
             for name, size in ordered],
        )  # fmt: skip


def _happenings(run: Run) -> Iterator[Block]:
    told = [event for event in run.events if event["event"] in _TELLING]
    if not told:
        return
    yield Heading("What happened on the way")
    rows = []
    for event in told[-_SHOWN_EVENTS:]:
        why = event.get(_TELLING[event["event"]])
        said = " ".join(map(str, why)) if isinstance(why, list) else str("" if why is None else why)
        if event["event"] == "stopped_early":
            said = f"no better since step {said}"
        at = "" if event.get("step") is None else f"{event['step']:,}"
        when = str(event["timestamp"])[:19].replace("T", " ")
        rows.append([event["event"].replace("_", " "), at, said, when])
    if len(told) > len(rows):
        yield Paragraph(f"The last {len(rows)} of {len(told):,}; events.jsonl has all.")
    yield Table(["what", "step", "why", "when (UTC)"], rows)


def _samples(run: Run) -> Iterator[Block]:
    drawn = [event for event in run.events if event["event"] == "samples" and event.get("texts")]
    if not drawn:
        return
    first, last = drawn[0], drawn[-1]
    yield Heading("Samples")
    yield Paragraph(f"At step {last.get('step')}, the last:")
    yield Listing(_sample_text(last["texts"]))
    if first is not last:
        earlier = Listing(_sample_text(first["texts"]))
        yield Details(f"At step {first.get('step')}, the first", (earlier,))


def _sample_text(texts: Sequence[str]) -> str:
    shown = [str(text) for text in texts[:_SHOWN_SAMPLES]]
    short = (t if len(t) <= _SHOWN_CHARACTERS else f"{t[:_SHOWN_CHARACTERS]}…" for t in shown)
    return "\n".join(" ".join(text.splitlines()) for text in short)


def _settings(run: Run) -> Iterator[Block]:
    if not run.settings:
        return
    defaults = config.leaves(config.as_dict(config.Config()))
    rows: list[list[Text]] = [
        [Code(path), setting(value), setting(defaults[path]) if path in defaults else ""]
        for path, value in run.settings.items()
        if path not in defaults or not same(value, defaults[path])
    ]
    yield Heading("Settings")
    if rows:
        yield Paragraph(("What differs from ", Code("config/base.yaml"), ":"))
        yield Table(["setting", "here", "there"], rows)
    else:
        yield Paragraph(("All as in ", Code("config/base.yaml"), "."))
    try:
        text = (run.folder / "config.yaml").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    yield Details(
        "All settings, as on the first day (config.yaml)", (Listing(text.rstrip("\n"), "yaml"),)
    )


def same(one: object, other: object) -> bool:
    """Whether they are the same setting: true is not 1, and nan is itself."""
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _environment(run: Run) -> Iterator[Block]:
    found = run.environment
    if not found:
        return
    commit = str(found.get("commit") or "")
    words = found.get("command")
    packages = found.get("packages")
    yield Heading("Environment")
    yield facts(
        [
            ("command", Code(shlex.join(map(str, words))) if isinstance(words, list) else ""),
            ("commit", commit + (" and changes to it" if commit and found.get("dirty") else "")),
            ("devices", ", ".join(map(str, found.get("devices") or []))),
            ("Python", str(found.get("python") or "")),
            ("platform", str(found.get("platform") or "")),
            ("fingerprint of the data", str(found.get("data_fingerprint") or "")),
        ]
    )
    if isinstance(packages, dict):
        rows = [[str(name), str(version)] for name, version in packages.items()]
        yield Details("Packages", (Table(["package", "version"], rows),))


def _commands(run: Run) -> Iterator[Block]:
    folder = str(run.folder)
    changed = [word for change in run.result["changes"] for word in change["overrides"]]
    anew = "with what resumes changed, from the start" if changed else "the same anew"
    lines = [shlex.join(["mainrun", "train", f"{folder}/config.yaml", *changed]) + f"  # {anew}"]
    if run.result["resume_command"]:
        lines.insert(0, f"{run.result['resume_command']}  # go on")
    if run.best is not None:
        lines += [shlex.join(["mainrun", what, folder]) for what in ("evaluate", "generate")]
    yield Heading("Commands")
    yield Listing("\n".join(lines), "sh")
