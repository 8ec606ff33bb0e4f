"""Publishes weights beside the step: the learner goes on while a version is written."""

import concurrent.futures
from collections.abc import Callable


class Publishing:
    """One version at a time, each after the one before it, in a thread.

    What goes into the thread waits for devices and for the store. It must start no computation on
    the devices: hosts of one learner have to start all of them in the same order.
    """

    def __init__(self):
        self._pool = concurrent.futures.ThreadPoolExecutor(1, 'publish')
        self._last: concurrent.futures.Future | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Starts to publish, once the version before is out: so at most one copy is in memory.

        Raises what went wrong with the version before.
        """
        self.wait()
        self._last = self._pool.submit(write)

    def check(self) -> None:
        """Raises what went wrong, if something did by now."""
        if self._last is not None and self._last.done():
            self._last.result()

    def wait(self) -> None:
        """Returns when everything that was begun is out; raises what went wrong."""
        if self._last is not None:
            self._last.result()

    def close(self) -> None:
        """Waits, and ends the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
