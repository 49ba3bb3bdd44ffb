"""Bytes that a training step takes, known before it runs."""

import jax.stages

from mainrun.errors import UserError

_SPARE = 0.95  # of the device's memory: the runtime needs some besides the step


def executable_bytes(executable: jax.stages.Compiled) -> int:
    """By the compiler's count: arguments, results that do not reuse them, and temporaries.

    Its own `peak_memory_in_bytes` leaves the temporaries out on a CPU (SPEED section 5).
    """
    found = executable.memory_analysis()
    assert found is not None
    return int(
        found.argument_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
        + found.temp_size_in_bytes
    )


def check_fits(step_bytes: int, limit_bytes: int | None) -> None:
    """Raises UserError, naming the remedy, for a step that is larger than the device's memory."""
    if limit_bytes is not None and step_bytes > _SPARE * limit_bytes:
        raise UserError(
            f"a training step needs {gibibytes(step_bytes)}, the device has "
            f"{gibibytes(limit_bytes)}: raise training.grad_accumulation or make the model, "
            "training.batch_size or data.context_length smaller"
        )


def gibibytes(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
