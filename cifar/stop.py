"""Stop requests: SIGTERM, SIGINT and others set a number, and the training loop looks at it between steps.

A handler does nothing else. The process may be inside a collective operation when the signal comes, and a survivor of
a crashed peer gets SIGTERM too: saving or talking to other ranks from a handler would hang. Imported first by the
scripts, before torch takes its seconds, so that an early signal is not lost.
"""

import ctypes
import os
import signal
import sys
import time
from types import FrameType

# Beside what a person sends: a job script's warning (SIGUSR1 here, SIGUSR2 from submitit), the end of a terminal, and a
# limit on CPU time, the hard one of which may lie a little later.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
INSISTING = (signal.SIGTERM, signal.SIGINT)  # what a person sends again; job scripts repeat SIGUSR1
SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")  # accelerate launch; torchrun
_received = 0
_wakeup: int | None = None  # the end of a pipe into which Python writes each signal's number


class RepeatedStop:
    """Whether a stop request was repeated after `patience` seconds in which nothing moved.

    Ctrl-C in a terminal reaches a rank twice, from the terminal and from its launcher: in the same moment, which does
    not count. Looked at by a thread, since the main one may be inside a library that lets no handler run.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.first: float | None = None

    def look(self, moved: float) -> int:
        """The number of the signal that is repeated, or 0. `moved` is when training last moved (time.monotonic)."""
        now = time.monotonic()
        for number in _new_signals():
            if number not in INSISTING:
                continue
            if self.first is not None and now - max(self.first, moved) > self.patience:
                return number
            self.first = self.first or now
        return 0


def _remember(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = number


def catch() -> None:
    """From now on these signals are remembered instead of ending the process; SIGHUP unless `nohup` ignores it.

    The death of a launcher counts as SIGTERM: one that was killed could not pass it on, and left its ranks training.
    """
    global _wakeup
    _wakeup, write = os.pipe()
    os.set_blocking(_wakeup, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
            signal.signal(number, _remember)
    if any(name in os.environ for name in SET_BY_LAUNCHERS):
        _when_parent_dies(signal.SIGTERM)


def ignore() -> None:
    """From now on there is nothing left to stop.

    Python gives the handlers back before a process has ended, and a warning that is repeated, as job scripts do, would
    then kill one that had just saved everything.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def obey_parent() -> None:
    """For helper processes: the training process decides when they end, and they end with it.

    They hold copies of its connections: while they live, other ranks do not see that it has died.
    """
    ignore()
    _when_parent_dies(signal.SIGKILL)


def requested() -> int:
    """The number of the last signal received, or 0."""
    return _received


def name() -> str:
    """The last signal received by its name, e.g. SIGTERM, or ''."""
    return signal.Signals(_received).name if _received else ""


def _new_signals() -> bytes:
    """The numbers of the signals that have come since the last call."""
    global _received
    if _wakeup is None:
        return b""
    try:
        numbers = os.read(_wakeup, 4096)
    except BlockingIOError:
        return b""
    caught = [number for number in numbers if number in SIGNALS]
    if caught:
        _received = caught[-1]  # the main thread may not have run the handler
    return bytes(caught)


def _when_parent_dies(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG in linux/prctl.h
