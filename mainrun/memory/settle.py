"""`training.grad_accumulation: auto` as a number: the fewest micro-batches that fit the device."""

from dataclasses import replace

from mainrun import parts
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.memory.advice import check_possible, most_off, too_large
from mainrun.memory.compiled import abstract_state, fits, step_bytes
from mainrun.memory.peak import estimate
from mainrun.training import backend

_SPREAD = 0.9
"""The estimate's error differs by less than a tenth from one number of micro-batches to another."""


def settled(config: Config, vocab_size: int) -> Config:
    """The config with a number in place of `auto`; any other as it is.

    The estimate names a number, the compiler counts its bytes, and the estimate of the others is
    off by about the same factor: so the next is named, until none fewer is left to ask for. What
    the estimate cannot be wrong about is not compiled. Raises UserError where one sequence at a
    time is still too much.
    """
    if config.training.grad_accumulation != "auto":
        return config
    limit, size = backend.memory_limit_bytes(), config.training.batch_size
    state = abstract_state(config, vocab_size)

    def of(count: int) -> Config:
        return replace(config, training=replace(config.training, grad_accumulation=count))

    counts = [n for n in range(1, size + 1) if size % n == 0]
    estimates = {
        n: estimate(of(n), vocab_size, parts.num_micro_batches(of(n)), state) for n in counts
    }
    estimated = {n: found.total_bytes for n, found in estimates.items()}
    if fits(int(most_off() * estimated[1]), limit):
        return of(1)
    check_possible(estimates[size], limit, of(size), vocab_size)
    factor, too_few, enough = 1.0, 0, 0
    while True:
        left = [n for n in counts if too_few < n <= (enough or size)]
        count = next((n for n in left if fits(int(factor * estimated[n]), limit)), left[-1])
        if count == enough:
            return of(count)
        counted = step_bytes(of(count), vocab_size, parts.num_micro_batches(of(count)))
        factor = _SPREAD * counted / estimated[count]
        if fits(counted, limit):
            enough = count
        elif count < size:
            too_few = count
        else:
            assert limit is not None
            raise UserError(too_large(counted, limit, of(count), vocab_size))
