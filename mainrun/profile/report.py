"""How a profile is shown: as lines for a terminal, as JSON."""

from pathlib import Path
from statistics import median
from typing import Any

from mainrun import memory
from mainrun.profile.timing import WARM_UP, Measured
from mainrun.training import peaks


def table(found: Measured) -> str:
    """A config's steps for a terminal."""
    totals = [split.total for split in found.splits]
    step, parts = median(totals), found.split
    rows = [
        ("step", f"{milliseconds(step)} [{milliseconds(min(totals))}, {milliseconds(max(totals))}] "
                 f"one at a time: median of {len(totals)} after {WARM_UP} to warm up"),
        ("  input", _part(parts.input, step)),
        ("  dispatch", _part(parts.dispatch, step)),
        ("  compute", _part(parts.compute, step)),
        ("in training", f"{milliseconds(found.seconds)} a step, {found.steps_per_dispatch:.1f} "
                        f"steps a dispatch, {found.tokens_per_second:,.0f} tokens/s"),
        ("batch", f"{found.tokens_per_step:,} tokens in {found.micro_batches} micro-batches"),
        ("model", f"{found.parameters:,} parameters, {_flops(found.flops.total)} a token: weights "
                  f"{_flops(found.flops.weights)}, attention {_flops(found.flops.attention)}, "
                  f"head {_flops(found.flops.head)}"),
        ("device", f"{found.device}, {found.precision}"),
        ("utilisation", _utilisation(found)),
        ("peak memory", f"{memory.gibibytes(found.peak_memory_bytes)}; a step "
                        f"{memory.gibibytes(found.step_bytes)} by the compiler's count"),
        ("compilation", f"{found.compile_seconds:.1f} s, nothing cached"),
    ]  # fmt: skip
    if found.trace is not None:
        chosen = found.traced
        rows += [
            ("trace", f"steps {chosen.start} to {chosen.stop - 1}: {found.trace}"),
            ("  to see it", "open that file at https://ui.perfetto.dev, or: pip install xprof && "
                            f"xprof --logdir {_logdir(found.trace)}"),
        ]  # fmt: skip
    return "\n".join(f"{name:13}{value}" for name, value in rows)


def as_dict(found: Measured) -> dict[str, Any]:
    """As JSON has it; times are seconds of a step, operations those of a token."""
    totals = [split.total for split in found.splits]
    return {
        "step_seconds": median(totals),
        "input_seconds": found.split.input,
        "dispatch_seconds": found.split.dispatch,
        "compute_seconds": found.split.compute,
        "steps": [split._asdict() for split in found.splits],
        "training_step_seconds": found.seconds,
        "steps_per_dispatch": found.steps_per_dispatch,
        "tokens_per_step": found.tokens_per_step,
        "tokens_per_second": found.tokens_per_second,
        "micro_batches": found.micro_batches,
        "parameters": found.parameters,
        "flops_per_token": found.flops._asdict() | {"total": found.flops.total},
        "utilisation": found.utilisation,
        "utilisation_of": "data sheet" if found.peak_flops else "measured",
        "peak_flops": found.peak_flops,
        "measured_peak_flops": found.measured_peak_flops,
        "precision": found.precision,
        "device": found.device,
        "peak_memory_bytes": found.peak_memory_bytes,
        "step_bytes": found.step_bytes,
        "compile_seconds": found.compile_seconds,
        "traced_steps": list(found.traced),
        "trace": None if found.trace is None else str(found.trace),
    }


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def _part(seconds: float, step: float) -> str:
    return f"{milliseconds(seconds)}, {100 * seconds / step:.1f} %"


def _utilisation(found: Measured) -> str:
    measured = (
        f"{_flops(found.measured_peak_flops)}/s that a {found.precision} product of "
        f"{peaks.side()} × {peaks.side()} comes to here"
    )
    if found.peak_flops is None:
        return f"{100 * found.utilisation:.1f} % of {measured}"
    of_measured = found.utilisation * found.peak_flops / found.measured_peak_flops
    sheet = f"{100 * found.utilisation:.1f} % of {_flops(found.peak_flops)}/s by the data sheet"
    return f"{sheet}, {100 * of_measured:.1f} % of {measured}"


def _flops(count: float) -> str:
    """`1.35 TFLOP`."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.2f} {unit}FLOP"
    return f"{count / 1e3:.2f} kFLOP"


def _logdir(trace: Path) -> Path:
    """Of a file in `<it>/plugins/profile/<time>/`."""
    return trace.parents[3]
