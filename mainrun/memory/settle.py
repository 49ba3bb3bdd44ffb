"""`training.grad_accumulation: auto` as a number: the fewest micro-batches that fit the device."""

from dataclasses import replace

from mainrun import parts
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.memory.compiled import fits, gibibytes
from mainrun.memory.peak import estimate
from mainrun.training import backend


def settled(config: Config, vocab_size: int) -> Config:
    """The config with a number in place of `auto`; any other as it is.

    By the estimate, which takes no compilation; the compiled step is checked besides. Raises
    UserError where one sequence at a time is still too much.
    """
    if config.training.grad_accumulation != "auto":
        return config
    limit, size = backend.memory_limit_bytes(), config.training.batch_size
    needed = 0
    for count in (n for n in range(1, size + 1) if size % n == 0):
        training = replace(config.training, grad_accumulation=count)
        candidate = replace(config, training=training)
        needed = estimate(candidate, vocab_size, parts.num_micro_batches(candidate)).total_bytes
        if fits(needed, limit):
            return candidate
    assert limit is not None
    raise UserError(
        f"a training step of one sequence at a time needs {gibibytes(needed)} by estimate, the "
        f"device has {gibibytes(limit)}: make the model or data.context_length smaller"
    )
