"""Stop signals as a question: `requested()`. The first is remembered, later ones change nothing.

GitHub sends SIGINT and, 7.5 s later, SIGTERM for one and the same cancellation; a terminal that
closes sends SIGHUP. A second signal therefore must not break the saving that the first began.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType

from mainrun.errors import Stopped

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignal:
    reason: None = None  # it needs none

    def __init__(self, *, with_parent: bool = False) -> None:
        self.received: signal.Signals | None = None
        self._parent = os.getppid() if with_parent else None

    def requested(self) -> bool:
        return self.received is not None or self._parent not in (None, os.getppid())

    def check(self) -> None:
        """Raises Stopped when a stop was requested."""
        if self.requested():
            raise Stopped

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number)


@contextlib.contextmanager
def listening(*, with_parent: bool = False) -> Iterator[StopSignal]:
    """Stop signals are remembered in this block instead of ending the process.

    `with_parent`: the end of the parent process is a stop request too. Nobody signals a step whose
    runner is killed, and it would go on unseen.
    """
    stop = StopSignal(with_parent=with_parent)
    before = {number: signal.signal(number, stop._remember) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
