"""A comparison as JSON, which is the record, and as Markdown, which is a view of it."""

import dataclasses
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mainrun import environment as environments
from tests.bench.ratios import LOSS_TOLERANCE, Record, Row, Spread


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One device's contestants and what they did."""

    device: str
    reference: str
    drop: int  # rounds left out of the rows
    rows: Mapping[str, Row]
    records: Mapping[str, Record]
    starts: Mapping[str, Mapping[str, Sequence[float]]]
    facts: Mapping[str, Mapping[str, Any]]  # what each said of itself: versions, threads


def machine(command: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """What the numbers hold for: versions, commit, CPU. Not the machine's name."""
    return {
        **environments.environment(command, [], fingerprint),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def markdown(record: Mapping[str, Any], comparisons: Sequence[Comparison]) -> str:
    """The record as a page: a table for each device, and under it what it holds for."""
    run = record["config"]
    batch, length = run["training"]["batch_size"], run["data"]["context_length"]
    parts = [
        f"# mainrun and PyTorch, `{record['size']}`: {batch} × {length} tokens a step, "
        f"vocabulary {record['vocab_size']:,}",
        *(_table(comparison, batch * length) for comparison in comparisons),
    ]
    if all(comparison.device != "gpu" for comparison in comparisons):
        parts.append(f"GPU: {record['gpu']}.")
    dirty = " and uncommitted changes" if record["dirty"] else ""
    versions, matmul = {"python": record["python"]}, {}
    for comparison in comparisons:
        for name, facts in comparison.facts.items():
            versions |= facts["versions"]
            matmul[name.split()[0]] = facts["float32_matmul"]
    lines = [
        f"`{shlex.join(record['command'])}`",
        f"commit {record['commit'] or 'none'}{dirty}",
        f"tokens of `{run['data']['source']}`, data {record['data_fingerprint'][:12]}",
        f"{record['cpus']} CPUs, {record['cpu']}; GPU {record['gpu']}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "float32 matrix products: " + ", ".join(f"{k} `{v}`" for k, v in matmul.items()),
    ]
    parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def _table(comparison: Comparison, tokens_per_step: int) -> str:
    head = [
        comparison.device.upper(),
        "s/step",
        "tokens/s",
        f"ratio to {comparison.reference}",
        "fastest/fastest",
        "peak memory, GiB",
        "memory ratio",
        "page faults/step",
        "cold start, s",
        "warm start, s",
        "loss, first → last",
    ]
    lines = [head, ["---"] * len(head)]
    for name, row in comparison.rows.items():
        peak, starts = comparison.records[name].peak_bytes, comparison.starts[name]
        times = [
            _spread(row.seconds),
            f"{tokens_per_step / row.seconds.median:,.0f}",
            _spread(row.ratio),
            f"{row.ratio_of_best:.2f}",
        ]
        lines.append(
            [
                name,
                *(times if row.refused is None else [f"refused: {row.refused}", "", "", ""]),
                _or_dash(None if peak is None else peak / 2**30, ".2f"),
                _or_dash(row.memory_ratio, ".2f"),
                _or_dash(row.minor_faults, ",.0f"),
                *(_spread(Spread.of(starts[k])) if starts[k] else "—" for k in ("cold", "warm")),
                f"{row.first_loss:.3f} → {row.last_loss:.3f}",
            ]
        )
    counted = len(comparison.records[comparison.reference].answers) - comparison.drop
    note = (
        f"Median [smallest, largest] of {counted} rounds after {comparison.drop} dropped; a ratio "
        "is of one round's two times, memory is the peak of the process (on a GPU: of the card's "
        "allocator), a start is from the process's start to its first step done, cold with an "
        "empty compilation cache. A row whose first or last loss is more than "
        f"{LOSS_TOLERANCE} nats per token from the reference's is refused."
    )
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n" + note


def _spread(spread: Spread) -> str:
    digits = 2 if spread.median >= 0.1 else 4
    median, smallest, largest = (
        f"{x:.{digits}f}" for x in (spread.median, spread.smallest, spread.largest)
    )
    return f"{median} [{smallest}, {largest}]"


def _or_dash(number: float | None, form: str) -> str:
    return "—" if number is None else format(number, form)


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
