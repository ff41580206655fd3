"""A background thread, so that no training step waits for a disk or a plot."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

NAMES = ("writer", "drawer")  # of its threads, by which failure.py finds what the main thread waits for


class Background:
    """Runs tasks one after another in its own thread; after a failed one it runs no more.

    The thread is a daemon: a task that hangs on an unresponsive file system does not keep the process alive.
    """

    def __init__(self, name: Literal["writer", "drawer"]) -> None:
        self.name = name
        self.error: BaseException | None = None  # of the task that failed
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        with self._changed:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()

    def idle(self) -> bool:
        """Returns whether no task is running, or waiting to run; after a failed one none is."""
        return self._thread is None

    def wait(self, seconds: float | None = None) -> None:
        """Waits until it is idle, at most `seconds`. Raises the error of a failed task."""
        with self._changed:
            self._changed.wait_for(self.idle, seconds)
        if self.error is not None:
            raise self.error

    def _run(self) -> None:
        while True:
            with self._changed:
                if self.error is not None or not self._tasks:
                    self._thread = None
                    self._changed.notify_all()
                    return
                task = self._tasks.popleft()
            try:
                task()
            except BaseException as error:
                self.error = error
