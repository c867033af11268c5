"""How a program ends that was asked to: the exit status is 128 and the number of the signal, as shells report it."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(SystemExit):
    """A signal asked the program to end: exit status 130 for SIGINT, 143 for SIGTERM.

    Args:
        signum: number of the signal.
    """

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


@contextmanager
def handled(signals: tuple[int, ...], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Signals go to the handler within the block, and to what had them before after it. In the main thread only."""
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
