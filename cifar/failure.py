"""Failing together: when one rank raises, dies or hangs, all of them end, and soon, with the same line.

Left to itself, a rank whose peer has died gets a network error that names nobody, and one whose peer hangs waits half
an hour. Here each rank says in a store that all of them reach (the rendezvous', which belongs to the launcher) why it
ends. Whoever meets a network error finds there the error of the rank that failed first; if there is none, it names
the ranks that have said nothing: they were killed, are frozen or cut off. A thread in each rank looks whether training
still moves. If it does not, it says where in the code each rank is, so that a rank that waits for a file system can
be told from those that wait for that rank.
"""

import atexit
import json
import os
import re
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from cifar.errors import UserError

# Seconds without a step before a job counts as hung. A site whose file system is slower sets CIFAR_HANG_SECONDS.
HANG_SECONDS = 120
SETUP_SECONDS = 900  # until all ranks have come and opened their data: imports from a slow file system, a download
GRACE_SECONDS = 4  # for the other ranks to say that they are there
LAST_SECONDS = 2  # by which rank 0 leaves after the others: see `leave`

_ROOT = Path(__file__).parents[1]
_peers: "_Peers | None" = None


class _Peers:
    """The store, and what this process knows of the others. `moved` is when training last made progress."""

    def __init__(self, rank: int, ranks: int) -> None:
        from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch: not for --help

        machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on each
        self.rank, self.hosts = rank, [f"machine {other // machine}" for other in range(ranks)]  # names: `introduce`
        self.moved, self.limit, self.hang_seconds = time.monotonic(), SETUP_SECONDS, _hang_seconds()
        self.failed: tuple[str, int] | None = None
        self.record: Callable[[str], None] | None = None
        self.lock = threading.Lock()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30), wait_for_workers=False)
        # The launcher's store outlives a restart in place, and what the attempt before said must not count again.
        self.store = PrefixStore(f"failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        store.set_timeout(timedelta(seconds=GRACE_SECONDS))
        self.main_thread = threading.main_thread().ident or 0
        threading.Thread(target=self._watch, name="hang watch", daemon=True).start()

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def ask(self, question: Callable[[], tuple[str, int]], otherwise: tuple[str, int]) -> tuple[str, int]:
        """What the store answers, or `otherwise` if it does not: it is on the first node, which may be cut off."""
        answers: list[tuple[str, int]] = []

        def run() -> None:
            with suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(3 * GRACE_SECONDS)
        return answers[0] if answers else otherwise

    def settle(self, line: str, status: int) -> tuple[str, int]:
        """The line and exit status of whichever rank failed first: this one's, if it is the first to say so."""
        content = self.store.compare_set("first", "", json.dumps([line, status]))
        found: list[Any] = json.loads(content)
        return found[0], found[1]

    def missing(self, reason: str) -> tuple[str, int]:
        """Names the ranks that do not answer, or, if all do, where each of them is."""
        self.store.set(f"here/{self.rank}", self._position())
        deadline = time.monotonic() + GRACE_SECONDS
        ranks = range(len(self.hosts))
        while time.monotonic() < deadline and not all(self.store.check([f"here/{rank}"]) for rank in ranks):
            if self.store.check(["first"]):
                break
            time.sleep(0.1)
        absent = [rank for rank in ranks if not self.store.check([f"here/{rank}"])]
        if absent:
            who = ", ".join(self.name(rank) for rank in absent)
            return self.settle(f"{who}: no answer, so killed, frozen or cut off ({reason})", 1)
        places = {rank: self.store.get(f"here/{rank}").decode() for rank in ranks}
        common = Counter(places.values()).most_common(1)[0][0]
        odd = [rank for rank in ranks if places[rank] != common]
        where = "; ".join(f"{self.name(rank)} is in {places[rank]}" for rank in odd)
        return self.settle(f"{where + ', the others in' if odd else 'all ranks are in'} {common} ({reason})", 1)

    def _position(self) -> str:
        """Where the main thread is: the innermost line of this project's code."""
        frame = sys._current_frames().get(self.main_thread)
        while frame is not None:
            code = frame.f_code
            file = Path(code.co_filename)
            if file.is_relative_to(_ROOT) and file != Path(__file__):
                place = file.relative_to(_ROOT)
                if "site-packages" not in place.parts:
                    return f"{place}:{frame.f_lineno} ({code.co_name})"
            frame = frame.f_back
        return "no code of this project"

    def _watch(self) -> None:
        while True:
            time.sleep(min(1.0, self.hang_seconds / 10))
            if time.monotonic() - self.moved > self.limit:
                reason = f"no step for {self.limit} s"
                with self.lock:
                    line, status = self.ask(lambda: self.missing(reason), (_unreachable(self.name(0), reason), 1))  # noqa: B023
                if self.record:  # in a thread: a file system that does not answer may be what this rank waits for
                    record = threading.Thread(target=self.record, args=(line,), daemon=True)
                    record.start()
                    record.join(GRACE_SECONDS)
                _say_and_exit(line, status)


def start() -> None:
    """From now on this rank's failure is every rank's, and a hang, of one that never comes too, ends the job."""
    global _peers
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and "MASTER_ADDR" in os.environ:
        _peers = _Peers(int(os.environ["RANK"]), ranks)


def introduce(hosts: list[str]) -> None:
    """Once the ranks have met: the host of each."""
    if _peers is not None:
        _peers.hosts = hosts


def ready() -> None:
    """All ranks have come and opened their data: until the first step, the limit is that of a step's by default."""
    if _peers is not None:
        _peers.moved, _peers.limit = time.monotonic(), max(HANG_SECONDS, _peers.hang_seconds)


def beat() -> None:
    """Training moves: called with every step and every batch of an evaluation."""
    if _peers is not None:
        _peers.moved, _peers.limit = time.monotonic(), _peers.hang_seconds


def when_hung(record: Callable[[str], None] | None) -> None:
    """What is to be done with the line if the job is found hanging, when no code of the main thread can do it."""
    if _peers is not None:
        _peers.record = record


def end() -> None:
    """The ranks part in good order; what one of them still does, it does alone."""
    if _peers is not None:
        _peers.limit = sys.maxsize


def leave(status: int) -> NoReturn:
    """Ends this process as sys.exit does, but among ranks without taking Python down while torch's threads run.

    A thread of gloo or DDP that still gives back a Python object then is ended inside C++ that cannot be unwound: the
    rank, which had done everything, aborts with "terminate called without an active exception", and its launcher
    calls the job failed. Seen at the end of 1 of some hundred runs of two processes (torch 2.14).

    Of several machines, the first one's launcher holds the store in which the launchers wait for each other, and ends
    as soon as the last has come: one that has said so but does not wait yet finds it gone and prints 40 lines about it.
    Hence rank 0, whose launcher should come last, leaves last.
    """
    if _peers is None:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status == 0 and _peers.rank == 0 and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        time.sleep(LAST_SECONDS)
    os._exit(status)


def cause(error: BaseException) -> str:
    """Why the job fails, in one line: the same on all ranks. Takes some seconds if a rank does not answer."""
    own = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    if _peers is None:
        return own
    peers = _peers
    with peers.lock:
        if peers.failed is None and _of_the_network(error):
            reason = re.sub(r"^\[\S+\] ", "", str(error)).partition(". ")[0]  # gloo adds its source file and advice
            peers.failed = peers.ask(lambda: peers.missing(reason), (_unreachable(peers.name(0), reason), 1))
        elif peers.failed is None:
            mine = (own, 2) if isinstance(error, UserError) else (f"{peers.name(peers.rank)}: {own}", 1)
            peers.failed = peers.ask(lambda: peers.settle(*mine), mine)
        return peers.failed[0]


@contextmanager
def shared() -> Iterator[None]:
    """Around all that ranks do together: an error on one of them ends all of them with that error as their last line.

    A rank whose own error it is prints its traceback first. A user's error leaves the block as UserError.
    """
    try:
        yield
    except Exception as error:
        if _peers is None:
            raise
        line = cause(error)
        status = _peers.failed[1] if _peers.failed else 1
        if status == 2:
            raise UserError(line) from None
        if not _of_the_network(error):
            traceback.print_exception(error)
        _say_and_exit(line, status)


def _unreachable(first: str, reason: str) -> str:
    return f"{first}: its node does not answer ({reason})"


def _of_the_network(error: BaseException) -> bool:
    """Is it the kind of error that a rank gets because of another one? gloo raises plain RuntimeErrors."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def _hang_seconds() -> int:
    value = os.environ.get("CIFAR_HANG_SECONDS", str(HANG_SECONDS))
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"CIFAR_HANG_SECONDS={value} is not a number of seconds; give a whole number of at least 1")
    return int(value)


def _say_and_exit(line: str, status: int) -> NoReturn:
    # Leaving by the interpreter's ordinary end would wait for the collective that never ends.
    sys.stdout.flush()
    # One write, where print makes two: the other ranks say the same line in the same moment.
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {line}\n")
    sys.stderr.flush()
    os._exit(status)
