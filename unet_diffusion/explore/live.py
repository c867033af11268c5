"""Work on a model that takes long, as a generator: a page shows what the work says, and it ends when nobody listens."""

from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Event, Lock, Thread
from time import perf_counter
from typing import Any, TypeVar

Result = TypeVar("Result")
Update = dict[Any, Any]
"""The new values of some components of the page."""

MOST_OF_TIME = 0.2  # that previews may take
LEAST_WAIT = 0.15  # seconds between previews, which a browser has to fetch
_MODELS = Lock()  # models do one thing at a time; work that was left alone holds it until its next step


class StoppedError(Exception):
    """The work was stopped."""


def live(work: Callable[[Callable[[Update], None]], Result]) -> Generator[Update, None, Result]:
    """Yield the updates that the work says, merged if there are several, and return its result.

    Where the generator is closed, it does not wait for the work: `say` raises StoppedError at its next call, and other
    work begins after that.

    Args:
        work: Function that is called as work(say) in a thread of its own, while no other work runs.
    """
    said = SimpleQueue[Update | None]()  # None at the end
    results, errors = list[Result](), list[BaseException]()
    is_stopped = Event()

    def say(update: Update) -> None:
        if is_stopped.is_set():
            raise StoppedError
        said.put(update)

    def run() -> None:
        try:
            with _MODELS:
                say({})  # it may have been stopped while it waited
                results.append(work(say))
        except BaseException as error:  # it is raised where somebody listens
            errors.append(error)
        said.put(None)

    Thread(target=run, daemon=True).start()  # a process that ends waits for none
    try:
        while (update := said.get()) is not None:
            while not said.empty():
                newer = said.get()
                if newer is None:
                    said.put(None)
                    break
                update = update | newer
            yield update
    finally:
        is_stopped.set()
    if errors:
        raise errors[0]
    return results[0]


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
