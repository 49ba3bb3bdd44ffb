"""How the memory of a training step is shown: as plain text, as JSON, as a few lines of a run.

Plain text fits 100 columns, without colours, the same on a terminal and in a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from mainrun import parts
from mainrun.config import Config
from mainrun.memory import advice, compiled
from mainrun.memory.cards import Card
from mainrun.memory.peak import Estimate, estimate
from mainrun.memory.settle import settled
from mainrun.memory.target import Target, here, of_card
from mainrun.memory.vocabulary import Vocabulary, expected
from mainrun.training import backend

_TITLES = {
    "parameters": "parameters",
    "frozen_parameters": "frozen parameters",
    "optimizer_state": "optimizer state",
    "weight_average": "average of weights",
    "batch": "batch of tokens",
    "gradients": "gradients",
    "gradient_accumulator": "gradient accumulator",
    "rounded_weights": "weights rounded to 16 bits",
    "packed_operands": "operands laid out for products",
    "embedding": "embedding",
    "dropout_index": "dropout's index",
    "block_outputs": "blocks' outputs",
    "norms_and_residual": "norms and residual",
    "projections": "attention's projections",
    "attention_weights": "attention's weights",
    "mlp": "MLP",
    "experts": "experts",
    "skip": "skip",
    "adapters": "adapters",
    "backward_pass": "backward pass",
    "final_norm": "final norm",
    "logits": "logits and loss",
    "two_passes": "two passes compared",
    "gradient_point": "where gradients are taken",
}
_WHY = {
    "parameters": "float32, tied ones once",
    "optimizer_state": "float32, for each moment as large as the parameters",
    "gradients": "float32, their sums and their means, of which the norm is taken",
    "attention_weights": "sequences × heads × time × keys, in each block",
    "mlp": "sequences × time × hidden width, in each block",
    "experts": "sequences × time × top_k × hidden width, in each block",
    "logits": "sequences × time × vocabulary, twice",
}


@dataclass(frozen=True)
class Report:
    """What a config's training step is reckoned to take, what the compiler says, what is free."""

    estimate: Estimate
    compiled_bytes: int | None  # None: there is no compiler for that device here
    vocabulary: Vocabulary
    micro_batches: int
    config: Config
    target: Target

    @property
    def needed_bytes(self) -> int:
        """By the compiler's count, or where there is none by the estimate."""
        counted = self.compiled_bytes
        return self.estimate.total_bytes if counted is None else counted

    @property
    def ratio(self) -> float | None:
        counted = self.compiled_bytes
        return None if counted is None else self.estimate.total_bytes / counted

    @property
    def available_bytes(self) -> int | None:
        return self.target.limit_bytes

    @property
    def fits(self) -> bool:
        return compiled.fits(self.needed_bytes, self.available_bytes)


def examine(config: Config, vocab_size: int | None = None, card: Card | None = None) -> Report:
    """What a step of these settings takes on this machine, or on a card that need not be here.

    Without a size of the vocabulary, of the expected one. Neither text nor numbers are read: the
    step is compiled for shapes alone, so one that does not fit is told like any other. Raises
    UserError for settings that go with no network.
    """
    there = None if card is None else of_card(card)
    backend.prepare()
    vocabulary = expected(config) if vocab_size is None else Vocabulary(vocab_size, "as asked")
    target = there or here()
    config = settled(config, vocabulary.size, target)
    micro_batches, counted = parts.num_micro_batches(config, platform=target.platform), None
    if target.can_compile:
        counted = compiled.step_bytes(config, vocabulary.size, micro_batches, target.device)
    return Report(
        estimate=estimate(config, vocabulary.size, micro_batches, platform=target.platform),
        compiled_bytes=counted,
        vocabulary=vocabulary,
        micro_batches=micro_batches,
        config=config,
        target=target,
    )


def table(found: Report) -> str:
    """The step for a terminal."""
    training, reckoned = found.config.training, found.estimate
    time, count = found.config.data.context_length, training.batch_size // found.micro_batches
    rows = [
        *_rows(reckoned),
        ("estimate", _mebibytes(reckoned.total_bytes), "100 %"),
        ("compiler's count", _counted(found), ""),
    ]
    names = max(len(name) for name, _, _ in rows)
    facts = [
        ("vocabulary", f"{found.vocabulary.size:,} tokens, {found.vocabulary.reason}"),
        ("batch", f"{training.batch_size} × {time} tokens, of which {count} × {time} at a time"),
        ("precision", training.precision),
        ("device", found.target.title),
    ]
    verdicts = [
        ("estimate", _trust(found)),
        ("largest part", dominating(reckoned)),
        ("activations", f"{_mebibytes(reckoned.activation_bytes)} after the forward pass"),
        ("available", _verdict(found)),
    ]
    return "\n".join(
        [
            *(f"{name:14}{fact}" for name, fact in facts),
            f"\nA training step, {reckoned.moment}:",
            *(f"  {name:{names}}  {size:>13}  {share:>5}".rstrip() for name, size, share in rows),
            "",
            *(f"{name:14}{fact}" for name, fact in verdicts),
        ]
    )


def as_dict(found: Report) -> dict[str, Any]:
    """The step as JSON has it; sizes are bytes."""
    reckoned = found.estimate
    return {
        "estimated_bytes": reckoned.total_bytes,
        "compiled_bytes": found.compiled_bytes,
        "ratio": found.ratio,
        "peak_at": reckoned.moment,
        "parts_bytes": reckoned.by_part,
        "activation_bytes": reckoned.activation_bytes,
        "blocks_bytes": [dict(block) for block in reckoned.blocks],
        "dominating_part": reckoned.dominating,
        "available_bytes": found.available_bytes,
        "fits": found.fits,
        "vocab_size": found.vocabulary.size,
        "vocab_size_is": found.vocabulary.reason,
        "micro_batches": found.micro_batches,
        "device": found.target.title,
    }


def by_part(found: Estimate) -> str:
    """`460.3 MiB estimated: logits and loss 125.0 MiB, ...`, parts of less than 1 % left out."""
    parts = [
        f"{_TITLES[name]} {_mebibytes(size)}"
        for name, size in found.by_part.items()
        if size >= 0.01 * found.total_bytes
    ]
    return f"{_mebibytes(found.total_bytes)} estimated: {', '.join(parts)}"


def dominating(found: Estimate) -> str:
    """The largest part, in words: `logits and loss, 125.0 MiB, 42 % (...)`."""
    name, size = found.dominating, found.by_part[found.dominating]
    why = f" ({_WHY[name]})" if name in _WHY else ""
    return f"{_TITLES[name]}, {_mebibytes(size)}, {_share(size, found)}{why}"


def _rows(found: Estimate) -> Iterator[tuple[str, str, str]]:
    """Name, size and share of each part; like blocks are told once."""

    def row(name: str, size: int) -> tuple[str, str, str]:
        return name, _mebibytes(size), _share(size, found)

    shown = {name: size for name, size in found.parts.items() if size}
    after = {name: shown.pop(name) for name in ("final_norm", "logits") if name in shown}
    for name, size in shown.items():
        yield row(_TITLES[name], size)
    first = 1
    for block, alike in groupby(found.blocks):
        count = len(list(alike))
        named = f"block {first}" if count == 1 else f"blocks {first} to {first + count - 1}"
        each = "" if count == 1 else ", each"
        yield row(named, count * sum(block.values()))
        for name, size in block.items():
            if size:
                yield f"  {_TITLES[name]}{each}", _mebibytes(size), ""
        first += count
    for name, size in after.items():
        yield row(_TITLES[name], size)


def _verdict(found: Report) -> str:
    available = found.available_bytes
    if available is None:
        return "unknown"
    if found.fits:
        return f"{compiled.gibibytes(available)}: it fits"
    why = advice.too_large(
        found.needed_bytes,
        available,
        found.config,
        found.vocabulary.size,
        found.target.platform,
    )
    return f"too little: {why}"


def _counted(found: Report) -> str:
    counted = found.compiled_bytes
    return "none" if counted is None else _mebibytes(counted)


def _trust(found: Report) -> str:
    if found.ratio is None:
        return "no compiler for that card here (the extra cuda12 brings it); it takes less"
    return f"{found.ratio:.2f} of the compiler's count"


def _share(size: int, found: Estimate) -> str:
    return f"{100 * size / found.total_bytes:.0f} %"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"
