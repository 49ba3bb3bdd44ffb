"""The arithmetic of a comparison: rounds in, one row a contestant out. No process, no clock."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from benchmarks.worker import Answer

LOSS_TOLERANCE = 0.05
"""Nats per token. Only dropout is drawn differently: 0.001 at the first step of 1,024 tokens, 0.013
after five (measured). Other weights, tokens or steps move it by more; finer is `test_torch.py`."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a handful of numbers."""

    median: float
    smallest: float
    largest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of at least one number."""
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Record:
    """What one contestant did: its first loss, one answer a round, and its peak memory."""

    first_loss: float
    answers: Sequence[Answer]
    peak_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Row:
    """One contestant against the reference. `refused` says why its time does not count."""

    seconds: Spread  # per step
    ratio: Spread  # of the seconds of each round to the reference's of the same round
    rival_ratio: Spread | None  # to PyTorch at its best in the same precision, round by round
    ratio_of_best: float  # fastest round to fastest round, of whatever round
    memory_ratio: float | None
    minor_faults: float | None  # per step, median
    first_loss: float
    last_loss: float
    refused: str | None


def rows(
    records: Mapping[str, Record],
    reference: str,
    *,
    drop: int,
    rivals: Mapping[str, str] | None = None,
) -> dict[str, Row]:
    """A row for every contestant, without its first `drop` rounds: those warm caches.

    `rivals` names, for some, another one that they are compared with as well.
    """
    base = records[reference]
    rival_of = {name: records[rival] for name, rival in (rivals or {}).items()}
    return {name: _row(record, base, rival_of.get(name), drop) for name, record in records.items()}


def _row(record: Record, base: Record, rival: Record | None, drop: int) -> Row:
    counted, against = record.answers[drop:], base.answers[drop:]
    assert counted, f"no rounds are left after dropping {drop}"
    seconds = Spread.of([a.seconds for a in counted])
    memory = faults = None
    if record.peak_bytes is not None and base.peak_bytes:
        memory = record.peak_bytes / base.peak_bytes
    if all(a.minor_faults is not None for a in counted):
        faults = statistics.median(a.minor_faults or 0.0 for a in counted)
    return Row(
        seconds=seconds,
        ratio=_ratio(counted, against),
        rival_ratio=None if rival is None else _ratio(counted, rival.answers[drop:]),
        ratio_of_best=seconds.smallest / min(b.seconds for b in against),
        memory_ratio=memory,
        minor_faults=faults,
        first_loss=record.first_loss,
        last_loss=record.answers[-1].loss,
        refused=refusal(record, base),
    )


def _ratio(mine: Sequence[Answer], theirs: Sequence[Answer]) -> Spread:
    pairs = zip(mine, theirs, strict=True)
    return Spread.of([a.seconds / b.seconds for a, b in pairs])


def refusal(record: Record, base: Record) -> str | None:
    """Why this is not the reference's training: a loss that is not the reference's, or None."""
    mine, theirs = record.answers[-1], base.answers[-1]
    assert mine.steps == theirs.steps, "losses are compared after equally many steps"
    for place, loss, expected in (
        ("first step", record.first_loss, base.first_loss),
        (f"step {mine.steps}", mine.loss, theirs.loss),
    ):
        # Not `abs(...) > tolerance`: that is False for NaN.
        if not (math.isfinite(loss) and abs(loss - expected) <= LOSS_TOLERANCE):
            return f"loss at the {place} is {loss:.4f}, the reference's {expected:.4f}"
    return None
