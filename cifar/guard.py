"""A small process beside each rank, which ends the rank when none of its threads runs any more.

Native code that never returns and holds Python's global lock (GIL) stops the watchdog's threads, too: see `failure`. So
the watchdog writes a line into this process's input every second. Time counts only while both processes may run: a job
that was suspended, or a rank that a debugger has stopped, goes on.
"""

import json
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from cifar import attempt, stop
from cifar.errors import UserError

OUTLIVES_SECONDS = 10  # how long it may take to say and record why: nobody may read, and the disk may not answer
MARGIN_SECONDS = 10  # longer than the watchdog's own limit: it says more


class RunPosition(NamedTuple):
    """Where a run is: its directory, the attempt's number and token, and the steps taken."""

    directory: str
    number: int
    token: str
    step: int


class Report(NamedTuple):
    """What the watchdog says every second."""

    limit: float  # seconds without the next report
    place: str  # who and where the main thread is
    run: RunPosition | None  # None before there is one


class Guard:
    """The rank's side. Linux only: elsewhere, and where no process can be started, nothing is guarded."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        if sys.platform != "linux":
            return
        command = [sys.executable, "-S", "-m", "cifar.guard", Path(sys.argv[0]).name]
        with suppress(OSError):
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])
            assert self._process.stdin
            os.set_blocking(self._process.stdin.fileno(), False)

    def report(self, report: Report) -> None:
        """Reports that this process runs."""
        if self._process and self._process.stdin:
            with suppress(OSError):  # a full pipe, or nobody there
                os.write(self._process.stdin.fileno(), json.dumps(report).encode() + b"\n")


def _watch(parent: int) -> Report | None:
    """Returns the last report of a rank that has sent no other for too long, None once the rank has ended."""
    last, silent, rest = None, 0, b""
    while os.getppid() == parent:
        if select.select([0], [], [], 1.0)[0]:
            read = os.read(0, 1 << 16)
            *lines, rest = (rest + read).split(b"\n")
            if not read:
                return None
            if lines:
                last, silent = Report(*json.loads(lines[-1])), 0
        elif last and not _is_stopped(parent):
            silent += 1
            if silent > last.limit + MARGIN_SECONDS:
                return last
    return None


def _is_stopped(process: int) -> bool:
    """Returns whether a signal or a debugger has stopped a process."""
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return True
    return state in "Tt"


def main() -> None:
    """Watches the process that started this one."""
    parent = os.getppid()
    stop.ignore()
    report = _watch(parent)
    if report is None:
        return
    line = f"{report.place}: native code there has let no Python thread run for {report.limit:.0f} s"
    os.kill(parent, signal.SIGKILL)
    signal.alarm(OUTLIVES_SECONDS)
    if report.run:
        directory, number, token, step = report.run  # as JSON has it, a list
        with suppress(OSError, UserError):
            if successor := attempt.claim_after(Path(directory), number, token):
                successor.write_status("failed", step, line)
    sys.stderr.write(f"{sys.argv[1]}: error: {line}\n")


if __name__ == "__main__":
    main()
