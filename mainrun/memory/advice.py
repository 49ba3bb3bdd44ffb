"""Whether a training step may start, and what would make it small enough, where it may not.

Each remedy is one setting, and is told with what the step would take by the estimate; only those
that would fit are told. Where the compiler has counted a step, the estimate of another is off by
the same factor as that one's.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from mainrun import parts
from mainrun.config import Config
from mainrun.errors import RunFailed, UserError, is_out_of_memory, one_line
from mainrun.memory.compiled import SPARE, abstract_state, fits, gibibytes
from mainrun.memory.peak import Estimate, estimate

_CLEARLY_LESS = 0.75
"""Of what a step took that ran out of memory although it was counted to fit."""


class Remedy(NamedTuple):
    setting: str  # as an override is written
    needed_bytes: int


def most_off(platform: str | None = None) -> float:
    """The factor by which an estimate may be wrong, so that beyond it nothing is compiled.

    The formulas are calibrated on a CPU; a GPU's compiler keeps less (docs/memory.md).
    """
    return 1.3 if (platform or jax.default_backend()) == "cpu" else 3.0


def check_possible(found: Estimate, limit: int | None, config: Config, vocab_size: int) -> None:
    """Raises UserError, with what would fit, for a step that is hopeless by its estimate alone."""
    if limit is not None and found.total_bytes > most_off() * limit:
        raise UserError(too_large(found.total_bytes, limit, config, vocab_size))


def check_fits(step_bytes: int, limit: int | None, config: Config, vocab_size: int) -> None:
    """Raises UserError, with what would fit, for a step that is larger than the device's memory."""
    if not fits(step_bytes, limit):
        assert limit is not None
        raise UserError(too_large(step_bytes, limit, config, vocab_size))


def too_large(
    step_bytes: int, limit: int, config: Config, vocab_size: int, platform: str | None = None
) -> str:
    """That it does not fit, and what would; a line for each remedy behind a first that says all."""
    first = f"a training step needs {gibibytes(step_bytes)}, the device has {gibibytes(limit)}"
    return first + _advice(step_bytes, int(SPARE * limit), config, vocab_size, platform)


@contextlib.contextmanager
def explained(step_bytes: int, config: Config, vocab_size: int) -> Iterator[None]:
    """Raises RunFailed, with what would take less, where the device's memory runs out inside."""
    try:
        yield
    except Exception as error:  # XLA's error has had several names
        if isinstance(error, (RunFailed, UserError)) or not is_out_of_memory(error):
            raise
        first = f"out of memory, a training step needs {gibibytes(step_bytes)} ({one_line(error)})"
        room = int(_CLEARLY_LESS * step_bytes)
        raise RunFailed(first + _advice(step_bytes, room, config, vocab_size)) from error


def remedies(
    config: Config,
    vocab_size: int,
    room_bytes: int,
    *,
    factor: float = 1.0,
    platform: str | None = None,
) -> list[Remedy]:
    """What brings a step into so many bytes, by `factor` times the estimate: of each kind the
    least change that does; all together where none does alone."""
    state = abstract_state(config, vocab_size)

    def needed(candidate: Config) -> int:
        count = parts.num_micro_batches(candidate, platform=platform)
        found = estimate(candidate, vocab_size, count, state, platform=platform)
        return int(factor * found.total_bytes)

    def least(way: Iterator[dict[str, Any]]) -> Iterator[Remedy]:
        for values in way:
            candidate = replace(config, training=replace(config.training, **values))
            if _can_be_shared(candidate) and (size := needed(candidate)) <= room_bytes:
                words = " ".join(f"training.{name}={value}" for name, value in values.items())
                yield Remedy(words, size)
                return

    alone, together = _ways(config, parts.num_micro_batches(config, platform=platform))
    return [r for way in alone for r in least(way)] or list(least(together))


def _can_be_shared(config: Config) -> bool:
    """Whether the mesh's devices get as many examples each, where their numbers are given."""
    count = config.training.grad_accumulation
    examples = config.training.batch_size // (1 if count == "auto" else count)
    return examples % (max(1, config.mesh.data) * max(1, config.mesh.fsdp)) == 0


def _ways(
    config: Config, now: int
) -> tuple[list[Iterator[dict[str, Any]]], Iterator[dict[str, Any]]]:
    """Changes of the training's settings, the least of each kind first; and of all kinds."""
    training, size = config.training, config.training.batch_size
    more = [n for n in range(now + 1, size + 1) if size % n == 0]
    given = 1 if training.grad_accumulation == "auto" else training.grad_accumulation
    smaller = [size // n for n in range(2, size + 1) if size % n == 0 and size // n % given == 0]
    other: list[dict[str, Any]] = []
    if training.precision == "float32":
        other.append({"precision": "bfloat16"})
    if training.remat == "none":
        other.append({"remat": "blocks"})
    accumulated = ({"grad_accumulation": n} for n in more)
    alone = [accumulated, ({"batch_size": n} for n in smaller), *(iter([way]) for way in other)]
    merged = {name: value for way in other for name, value in way.items()}
    return alone, ({"grad_accumulation": n} | merged for n in more or [given])


def _advice(
    step_bytes: int, room_bytes: int, config: Config, vocab_size: int, platform: str | None = None
) -> str:
    count = parts.num_micro_batches(config, platform=platform)
    known = estimate(config, vocab_size, count, platform=platform).total_bytes
    factor = step_bytes / known
    found = remedies(config, vocab_size, room_bytes, factor=factor, platform=platform)
    if not found:
        return ": make the model or data.context_length smaller"
    lines = (f"{remedy.setting}: {gibibytes(remedy.needed_bytes)}" for remedy in found)
    return "; by estimate it would need with\n  " + ",\n  ".join(lines)
