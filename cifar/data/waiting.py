"""Waiting with a time limit, a progress bar, and checks for stop requests."""

import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any, TextIO, TypeVar

from cifar import failure, stop
from cifar.errors import UserError

T = TypeVar("T")

TURN_SECONDS = 0.5  # between two looks at what is waited for
QUIET_SECONDS = 2  # before progress is shown
LINE_EVERY = 10  # seconds between lines where there is no progress bar
NARROWEST = 20  # columns of a terminal that has room for a bar


class ProgressBar:
    """Progress of long work, on stderr: a bar on a terminal, else an occasional line.

    Shown by the first process of each machine, once the work has taken QUIET_SECONDS.
    """

    def __init__(self, doing: str, unit: str, total: int | None = None) -> None:
        self.doing, self.unit, self.total, self.done = doing, unit, total, 0
        self._moved_to = 0
        self._bar: Any = None  # a tqdm
        self._show_at = time.monotonic() + QUIET_SECONDS

    def __enter__(self) -> "ProgressBar":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def look(self) -> None:
        """Shows the progress. Call it repeatedly during the work. Raises UserError on a stop request."""
        raise_if_stopped(self.doing)
        if self.done > self._moved_to:
            self._moved_to = self.done
            failure.report_progress()
        if time.monotonic() >= self._show_at and os.environ.get("LOCAL_RANK", "0") == "0":
            self._show()

    def _show(self) -> None:
        if has_room_for_a_bar(sys.stderr):
            if self._bar is None:
                self._bar = self._new_bar()
            self._bar.update(self.done - self._bar.n)
            return
        of_total = f" of {self._written(self.total)}" if self.total else ""
        unit = "MB" if self.unit == "B" else self.unit
        print(f"{self.doing}: {self._written(self.done)}{of_total} {unit}", file=sys.stderr, flush=True)
        self._show_at = time.monotonic() + LINE_EVERY

    def _written(self, amount: int) -> str:
        return f"{amount / 1e6:,.1f}" if self.unit == "B" else f"{amount:,}"

    def _new_bar(self) -> Any:
        from tqdm import tqdm  # most work is done before it would be imported

        scaled = self.unit == "B"
        unit = self.unit if scaled else f" {self.unit}"
        return tqdm(desc=self.doing, total=self.total, initial=self.done, unit=unit, unit_scale=scaled, leave=False)


def has_room_for_a_bar(stream: TextIO) -> bool:
    """Checks whether the stream is a terminal wide enough for a bar (some report 0 columns)."""
    return stream.isatty() and os.get_terminal_size(stream.fileno()).columns >= NARROWEST


def raise_if_stopped(doing: str) -> None:
    """Raises UserError where the user or the machine has asked this process to stop."""
    if stop.requested():
        raise UserError(f"{stop.name()} received while {doing}; no images were kept", 0)


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Runs `work` in a daemon thread, which does not keep the process alive: a disk may never answer."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(future: Future[T], seconds: float, progress: ProgressBar) -> T:
    """Waits for the future's result. Raises UserError after `seconds`, or on a stop request."""
    deadline = time.monotonic() + seconds
    while not future.done():
        progress.look()
        if time.monotonic() > deadline:
            raise too_long(progress.doing, seconds)
        wait([future], TURN_SECONDS)
    return future.result()


def too_long(doing: str, seconds: float) -> UserError:
    """Returns the error for a disk or network that does not deliver."""
    return UserError(f"{doing} takes more than {seconds:.0f} s; look at the disk or network, and start again")
