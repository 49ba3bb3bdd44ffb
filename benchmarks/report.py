"""A comparison as JSON, which is the record, and as Markdown, which is a view of the record."""

import dataclasses
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.ratios import LOSS_TOLERANCE, Record, Row, Spread
from mainrun import environment as environments
from mainrun.markdown import table

RUN_STEPS = 938
"""Of the original assessment's run."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One device's contestants and what they did."""

    device: str
    reference: str
    drop: int  # rounds left out of the rows
    rows: Mapping[str, Row]
    records: Mapping[str, Record]
    starts: Mapping[str, Mapping[str, Sequence[Any]]]  # of `race.Start`
    facts: Mapping[str, Mapping[str, Any]]  # what each said of itself: versions, threads
    peaks: Mapping[str, Any]  # of the device: see `peaks`
    flops_per_step: float
    bytes_per_step: float  # of ours, see `sizes.bytes_per_step`


def machine(command: Sequence[str], fingerprint: str) -> dict[str, Any]:
    """What the numbers hold for: versions, commit, CPU. Not the machine's name."""
    return {
        **environments.environment(command, [], fingerprint),
        "cpu": _cpu_model(),
        "cpus": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
    }


def markdown(record: Mapping[str, Any]) -> str:
    """The record, as it was read from JSON, as a section: its tables, and what they hold for."""
    run = record["config"]
    batch, length = run["training"]["batch_size"], run["data"]["context_length"]
    comparisons = record["comparisons"]
    some = next(iter(comparisons[0]["facts"].values())) if comparisons else {"parameters": 0}
    dirty = " and uncommitted changes" if record["dirty"] else ""
    lines = [
        f"`{shlex.join(record['command'])}`",
        f"commit {record['commit'] or 'none'}{dirty}",
        f"tokens of `{run['data']['source']}`, data {record['data_fingerprint'][:12]}",
        f"{record['cpus']} CPUs, {record['cpu']}; GPU {record['gpu']}",
        *_versions(record),
    ]
    parts = [
        f"## `{record['size']}`: {some['parameters']:,} parameters, {batch} × {length} tokens a "
        f"step, vocabulary {record['vocab_size']:,}",
        *(_tables(comparison, batch * length) for comparison in comparisons),
    ]
    run_on = {comparison["device"] for comparison in comparisons}
    parts += [f"{d.upper()}: not run." for d in record["devices"] if d not in run_on]
    parts += [f"{d.upper()}, bfloat16: not run, {why}." for d, why in record["left_out"].items()]
    parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts) + "\n"


def legend() -> str:
    """What the columns of `markdown` mean."""
    return (
        "Median [smallest, largest] of the rounds that count. A ratio is of the tokens per second "
        "of one round to the reference's of the same round, or to PyTorch's at its best in the "
        "same precision (on a CPU with allocation tuned, on a GPU compiled, with fused attention). "
        "Memory is the peak of the process; on a GPU, of the card's allocator. A start is from the "
        "process's start until its first step begins, and until it is done; cold with an empty "
        f"compilation cache. {RUN_STEPS} steps are a start and that many median steps. Utilisation "
        "is of the arithmetic that a step cannot do without (6 a weight and token, attention's "
        "causal half), at the device's measured and, where it is known, the datasheet's peak; the "
        "floor is the longer of arithmetic and of moving state and gradient once. A row whose "
        f"first or last loss is more than {LOSS_TOLERANCE} nats per token from the reference's is "
        "refused."
    )


def _versions(record: Mapping[str, Any]) -> list[str]:
    versions, matmul = {"python": record["python"]}, {}
    for comparison in record["comparisons"]:
        for name, facts in comparison["facts"].items():
            versions |= facts["versions"]
            matmul[name] = facts["float32_matmul"]
    return [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        "float32 matrix products: " + ", ".join(f"{k} `{v}`" for k, v in matmul.items()),
    ]


def _tables(comparison: Mapping[str, Any], tokens_per_step: int) -> str:
    rounds = len(comparison["records"][comparison["reference"]]["answers"]) - comparison["drop"]
    device = f"{comparison['device'].upper()}, {rounds} rounds after {comparison['drop']} dropped"
    steps, starts = [], []
    for name, row in comparison["rows"].items():
        peak = comparison["records"][name]["peak_bytes"]
        seconds = Spread(**row["seconds"])
        times = [
            _spread(seconds),
            f"{tokens_per_step / seconds.median:,.0f}",
            _spread(_inverse(row["ratio"])),
            "—" if row["rival_ratio"] is None else _spread(_inverse(row["rival_ratio"])),
            *_floors(comparison, name, seconds.median),
        ]
        refused = row["refused"]
        steps.append(
            [
                name,
                *(times if refused is None else [f"refused: {refused}", *[""] * 6]),
                _or_dash(None if peak is None else peak / 2**30, ".2f"),
                _or_dash(row["memory_ratio"], ".2f"),
                _or_dash(row["minor_faults"], ",.0f"),
                f"{row['first_loss']:.3f} → {row['last_loss']:.3f}",
            ]
        )
        starts.append([name, *_starts(comparison["starts"][name], seconds.median)])
    head = [
        device, "s/step", "tokens/s", f"ratio to {comparison['reference']}", "ratio to its best",
        "utilisation of measured peak", "of datasheet's", "times the floor", "peak memory, GiB",
        "memory ratio", "page faults/step", "loss, first → last",
    ]  # fmt: skip
    start_head = [
        "seconds until", "first step begins, cold", "warm", "is done, cold", "warm",
        f"{RUN_STEPS} steps, cold", "warm",
    ]  # fmt: skip
    return table(head, steps) + "\n\n" + table(start_head, starts)


def _floors(comparison: Mapping[str, Any], name: str, seconds: float) -> list[str]:
    """Utilisation of the measured and the datasheet's peak, and seconds in terms of the floor."""
    peaks = comparison["peaks"]
    precision = "bfloat16" if " bf16" in name else "float32"
    peak = peaks["flops_per_second"].get(precision)
    if peak is None:
        return ["—", "—", "—"]
    flops = comparison["flops_per_step"]
    sheet = peaks["datasheet"] if precision == "bfloat16" else None
    floor = max(flops / peak, comparison["bytes_per_step"] / peaks["bytes_per_second"])
    return [
        f"{flops / seconds / peak:.0%}",
        f"{flops / seconds / sheet:.0%}" if sheet else "—",
        f"{seconds / floor:.2f}",
    ]


def _starts(starts: Mapping[str, Sequence[Sequence[float]]], step_seconds: float) -> list[str]:
    if not starts["cold"]:
        return ["—"] * 6
    begin, done = (
        [Spread.of([start[place] for start in starts[kind]]) for kind in ("cold", "warm")]
        for place in (0, 1)
    )
    whole = [f"{spread.median + (RUN_STEPS - 1) * step_seconds:,.0f}" for spread in done]
    return [*map(_spread, [*begin, *done]), *whole]


def _inverse(spread: Mapping[str, float]) -> Spread:
    """Of a ratio of seconds, that of speeds."""
    return Spread(1 / spread["median"], 1 / spread["largest"], 1 / spread["smallest"])


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
