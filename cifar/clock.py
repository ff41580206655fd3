"""Where a process's time goes."""

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


class Clock:
    """Wall time by activity, from the start of this process on; the first activity is `start`.

    This is host time: work on a GPU is counted wherever the host waits for it.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()  # when this clock was made
        self.seconds: Counter[str] = Counter()
        self._what = "start"
        self._since = time.perf_counter() - (time.time() - psutil.Process().create_time())

    def on(self, what: str) -> None:
        """Starts counting time for `what`."""
        now = time.perf_counter()
        self.seconds[self._what] += now - self._since
        self._what, self._since = what, now

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """Counts the block's time for `what`, then for the previous activity again."""
        before = self._what
        self.on(what)
        try:
            yield
        finally:
            self.on(before)

    def rounded(self) -> dict[str, float]:
        """Returns the seconds until now, to a hundredth."""
        self.on(self._what)
        return {what: round(seconds, 2) for what, seconds in self.seconds.items()}
