"""The end of a program after a signal: its exit status is 128 plus the number of the signal, like in shells."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(SystemExit):
    """A signal asked the program to end: exit status 130 for SIGINT, 143 for SIGTERM.

    Args:
        signum: Number of the signal.
    """

    def __init__(self, signum: int):
        super().__init__(128 + signum)
        self.signum = signum


@contextmanager
def handled(signals: tuple[int, ...], handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Send signals to a handler within the block, and to their earlier handlers after it; in the main thread only.

    Args:
        signals: Numbers of the signals.
        handler: Function that is called with the number of the signal and the stack frame.
    """
    before = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)
