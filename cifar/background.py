"""Work beside the training loop: what a disk or a picture takes, no step waits for."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Literal

NAMES = ("writer", "drawer")  # of its threads, by which failure.py finds what the main thread waits for


class Background:
    """Does one task after the other in a thread of its own. After one that failed it does no more.

    The thread is a daemon: a task that hangs, in a file system that does not answer, keeps no process from ending.
    """

    def __init__(self, name: Literal["writer", "drawer"]) -> None:
        self.name = name
        self.error: BaseException | None = None  # of the task that failed
        self._tasks: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[], None]) -> None:
        """Does the task after those that were submitted before."""
        with self._changed:
            self._tasks.append(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
                self._thread.start()

    def idle(self) -> bool:
        """Whether all that was submitted has been done, or has failed."""
        return self._thread is None

    def wait(self, seconds: float | None = None) -> None:
        """Returns once all is done, or after so many seconds. Raises the error of a task that failed."""
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
