"""Being asked to stop: SIGTERM, SIGINT and SIGUSR1 set a number, and the training loop looks at it between steps.

A handler does nothing else. The process may be inside a collective operation when the signal comes, and a survivor of
a crashed peer gets SIGTERM too: saving or talking to other ranks from a handler would hang. Imported first by the
scripts, before torch takes its seconds, so that an early signal is not lost.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_received = 0


def _remember(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = number


def catch() -> None:
    """From now on the three signals are remembered instead of ending the process.

    The death of a launcher counts as SIGTERM: one that was killed could not pass it on, and left its ranks training.
    """
    for number in SIGNALS:
        signal.signal(number, _remember)
    if "ACCELERATE_MIXED_PRECISION" in os.environ:  # accelerate launch sets it
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


def _when_parent_dies(number: signal.Signals) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG in linux/prctl.h
