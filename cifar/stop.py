"""Stop requests: handlers of SIGTERM, SIGINT and others only set a number, which training checks between steps.

The process may be inside a collective when the signal comes, and a survivor of a crashed peer gets SIGTERM too: saving
or talking to other ranks from a handler would hang. The scripts import this module first, before torch, which takes
seconds, so that an early signal is not lost.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Container
from pathlib import Path
from types import FrameType

# SIGTERM and SIGINT, a job script's warning (SIGUSR1 here, SIGUSR2 from submitit), a closed terminal, and the soft
# limit on CPU time, which the hard one may soon follow.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGXCPU)
INSISTING = (signal.SIGTERM, signal.SIGINT)  # signals that people repeat; job scripts repeat SIGUSR1
SET_BY_LAUNCHERS = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_BACKEND", "TORCHELASTIC_RUN_ID")
_received = 0
_wakeup: int | None = None  # the end of a pipe into which Python writes each signal's number


class RepeatedStop:
    """Whether a stop request was repeated after `patience` seconds without progress.

    Ctrl-C in a terminal reaches a rank twice at the same moment, from the terminal and from its launcher; that does not
    count. Checked by a thread, since the main thread may be inside a library that lets no handler run.
    """

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.first: float | None = None

    def look(self, moved: float) -> int:
        """Returns the number of the repeated signal, or 0.

        `moved` is the time of the last progress (time.monotonic).
        """
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
    """Catches these signals instead of letting them end the process; SIGHUP only unless `nohup` ignores it.

    A launcher's death counts as SIGTERM: a killed launcher forwards nothing, and its ranks would keep training.
    """
    global _wakeup
    _wakeup, write = os.pipe()
    os.set_blocking(_wakeup, False)
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN or number != signal.SIGHUP:
            signal.signal(number, _remember)
    if launched(_parents_variables()):
        _when_parent_dies(signal.SIGTERM)


def launched(before: Container[str]) -> bool:
    """Returns whether the parent is a launcher: it has set variables that are not in its own environment, `before`.

    Somebody may have exported one of them, and a shell is no launcher.
    """
    return any(name in os.environ and name not in before for name in SET_BY_LAUNCHERS)


def _parents_variables() -> set[str]:
    try:
        entries = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:  # it is gone, or another user's
        return set()
    return {os.fsdecode(entry.partition(b"=")[0]) for entry in entries}


def ignore() -> None:
    """Ignores stop signals from now on.

    Python restores the default handlers before a process has ended; a repeated warning, as job scripts send it, would
    then kill one that has just saved everything.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def obey_parent() -> None:
    """Makes a helper process ignore stop signals, and die with the training process.

    Helpers hold copies of its connections: while they live, other ranks do not notice its death.
    """
    ignore()
    _when_parent_dies(signal.SIGKILL)


def requested() -> int:
    """Returns the number of the last signal received, or 0."""
    return _received


def name() -> str:
    """Returns the last signal received by its name, e.g. SIGTERM, or ''."""
    return signal.Signals(_received).name if _received else ""


def _new_signals() -> bytes:
    """Returns the numbers of the signals that have come since the last call."""
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
