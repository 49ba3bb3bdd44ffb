"""`training.grad_accumulation: auto` as a number: the fewest micro-batches that fit the device."""

from dataclasses import replace

from mainrun import parts
from mainrun.config import Config
from mainrun.errors import UserError
from mainrun.memory.advice import most_off, too_large
from mainrun.memory.compiled import abstract_state, fits, step_bytes
from mainrun.memory.peak import estimate
from mainrun.memory.target import Target, here

_SPREAD = 0.9
"""The estimate's error differs by less than a tenth from one number of micro-batches to another."""


def settled(config: Config, vocab_size: int, target: Target | None = None) -> Config:
    """The config with a number in place of `auto`; any other as it is.

    The estimate names a number, the compiler counts its bytes, and the estimate of the others is
    off by about the same factor: so the next is named, until none fewer is left to ask for. What
    the estimate cannot be wrong about is not compiled. Raises UserError where one sequence at a
    time is still too much. `target` is another device than this machine's; where it has no
    compiler here, the estimate alone decides.
    """
    if config.training.grad_accumulation != "auto":
        return config
    target = target or here()
    limit, platform, size = target.limit_bytes, target.platform, config.training.batch_size
    state = abstract_state(config, vocab_size)

    def of(count: int) -> Config:
        return replace(config, training=replace(config.training, grad_accumulation=count))

    counts = [n for n in range(1, size + 1) if size % n == 0]
    estimated = {
        n: estimate(
            of(n),
            vocab_size,
            parts.num_micro_batches(of(n), platform=platform),
            state,
            platform=platform,
        ).total_bytes
        for n in counts
    }
    off = most_off(platform) if target.can_compile else 1.0
    if fits(int(off * estimated[1]), limit):
        return of(1)
    if not fits(int(estimated[size] / off), limit):
        assert limit is not None
        raise UserError(too_large(estimated[size], limit, of(size), vocab_size, platform))
    factor, too_few, enough = 1.0, 0, 0
    while True:
        left = [n for n in counts if too_few < n <= (enough or size)]
        count = next((n for n in left if fits(int(factor * estimated[n]), limit)), left[-1])
        if count == enough or not target.can_compile:
            return of(count)
        pieces = parts.num_micro_batches(of(count), platform=platform)
        counted = step_bytes(of(count), vocab_size, pieces, target.device)
        factor = _SPREAD * counted / estimated[count]
        if fits(counted, limit):
            enough = count
        elif count < size:
            too_few = count
        else:
            assert limit is not None
            raise UserError(too_large(counted, limit, of(count), vocab_size, platform))
