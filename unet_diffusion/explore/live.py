"""Work that takes long, as a generator: a page shows what the work says, and the work ends when nobody listens."""

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from threading import Event
from time import perf_counter
from typing import TypeVar

Said = TypeVar("Said")
Result = TypeVar("Result")

MOST_OF_TIME = 0.2  # that previews may take
LEAST_WAIT = 0.15  # seconds between previews, which a browser has to fetch


class StoppedError(Exception):
    """The work was stopped."""


def live(work: Callable[[Callable[[Said], None]], Result]) -> Generator[Said, None, Result]:
    """Yield what the work says, the latest only if there is more than one, and return its result.

    Where the generator is closed, `say` raises StoppedError at its next call, and the work ends with it.

    Args:
        work: Function that is called as work(say) in a thread of its own.
    """
    said = SimpleQueue[list[Said]]()  # a list of one thing, or an empty one at the end
    is_stopped = Event()

    def say(thing: Said) -> None:
        if is_stopped.is_set():
            raise StoppedError
        said.put([thing])

    with ThreadPoolExecutor(max_workers=1) as pool:  # it waits for the thread
        future = pool.submit(work, say)
        future.add_done_callback(lambda _: said.put([]))
        try:
            while latest := said.get():
                while not said.empty():
                    newer = said.get()
                    if not newer:
                        return future.result()
                    latest = newer
                yield latest[0]
            return future.result()
        finally:
            is_stopped.set()


class Previews:
    """Decides when a preview is made, so that previews take at most a fifth of the time."""

    def __init__(self) -> None:
        self._next = 0.0

    def make(self, preview: Callable[[], Result]) -> Result | None:
        """A preview, or None if the last one was made too short a time ago.

        Args:
            preview: Function that makes it.
        """
        began = perf_counter()
        if began < self._next:
            return None
        made = preview()
        now = perf_counter()
        self._next = now + max(LEAST_WAIT, (now - began) / MOST_OF_TIME)
        return made
