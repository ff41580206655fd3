"""Fault handling across ranks: when one rank raises, dies or hangs, all end soon, with the same message.

By default a rank whose peer died gets an anonymous network error (gloo) or waits forever inside the device (NCCL), and
one whose peer hangs waits half an hour. Here each rank reports why it ends in a key-value store that all can reach (the
rendezvous store, in the launcher's process). Two daemon threads per rank do this without the main thread:

- The heartbeat thread reports every second that the rank is alive and where its main thread is, and reads the others'
  reports.
- The watchdog thread ends the process, with a message that says why, when another rank has failed or has no heartbeat,
  when there is no progress for too long (hang timeout), or when a stop request is repeated because nothing moves.

The message of a hang says where in the code each rank is, which tells a rank that waits for a file system from those
that wait for it. A single process is watched in the same way, without a store. Where native code lets no Python thread
run, a process beside the rank ends it (`guard`).
"""

import atexit
import gc
import json
import math
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from cifar import background, device, stop
from cifar.errors import UserError, outlive_readers
from cifar.guard import Guard, Report, RunPosition

# Seconds without a step before a job counts as hung. A site whose file system is slower sets CIFAR_HANG_SECONDS.
HANG_SECONDS = 120
SETUP_SECONDS = 900  # hang timeout until all ranks have opened their data: imports from a slow disk, a download
GRACE_SECONDS = 4  # to wait for heartbeats in a roll call, and for the main thread to end by itself
SILENT_SECONDS = 5  # without a heartbeat before a roll call
SETUP_SILENT_SECONDS = 120  # the same until all have opened their data: imports and CUDA's start may stop all threads
OPENED_SILENT_SECONDS = 10  # and from then on until the first step, which loads a library or two
PATIENCE_SECONDS = 10  # without progress before a repeated stop request ends the process
TICK_SECONDS = 1.0
ENDING_SECONDS = 120  # more than the watchdog takes to end this process, its own time limits added up
LONGEST = 2_000_000  # what fits into the milliseconds of poll(), some 23 days
LAST_SECONDS = 2  # how much later than the others rank 0 exits: see `leave`

USER_ERROR = 2  # the exit status of a user's mistake, which the same command would make again
LEFT = "left"  # the heartbeat of a rank that takes part in no more collectives
_ROOT = Path(__file__).parents[1]

Record = Callable[[str, str, bool], None]  # state and reason for status.json, and whether in rank 0's place


class End(NamedTuple):
    """Why the job ends, and with which exit status; if rank 0 is gone, `successor` records it in its place."""

    line: str
    status: int
    successor: int = 0

    @property
    def state(self) -> str:
        """What status.json calls it: a user's stop request has a signal's exit status, or 0."""
        return "failed" if self.status in (1, USER_ERROR) else "preempted"


class _Watch:
    """The watchdog: this process's progress, and the thread that ends the process."""

    def __init__(self) -> None:
        self.hang_seconds = hang_seconds()
        self.tick = min(TICK_SECONDS, self.hang_seconds / 10)
        self.limit, self.silent = float(SETUP_SECONDS), SETUP_SILENT_SECONDS
        self.training, self.saving = False, False
        self.moved, self.computed = time.monotonic(), time.process_time()  # at the last progress
        self.on_cpu = False
        self.peers: _Peers | None = None
        self.failed: End | None = None
        self.record: Record | None = None
        self.run: Callable[[], RunPosition | None] = lambda: None
        self.lock = threading.Lock()  # held by the thread that finds out why the job ends
        self.asked: float | None = None  # when a stop request was first seen
        self.repeated_stop = stop.RepeatedStop(PATIENCE_SECONDS)
        self.main_thread = threading.main_thread().ident or 0
        self.guard = Guard()
        threading.Thread(target=self._run, name="hang watch", daemon=True).start()

    def _run(self) -> None:
        looked = time.monotonic()
        while True:
            time.sleep(self.tick)
            now = time.monotonic()
            if now - looked > self.tick + SILENT_SECONDS:  # this process was suspended, and the others with it
                self.moved += now - looked
                if self.peers:
                    self.peers.heard = self.peers.told = now
            looked = now
            self._report(self.limit)
            self._look(now)

    def _look(self, now: float) -> None:
        peers, repeated = self.peers, self.repeated_stop.look(self.moved)
        if stop.requested() and self.asked is None:
            self.asked = now
        still = now - self.moved
        unheard = now - max(self.moved, self.asked) if self.asked else 0.0  # of a stop request
        if repeated:
            self.end(lambda: self._stopped_again(repeated, still))
        elif peers and peers.first:
            self.end(lambda: peers.first)
        elif unheard > PATIENCE_SECONDS and not self.training:
            self.end(self._stopped_before_the_first_step)
        elif peers and (silence := peers.silence(now, still)):
            self.end(lambda: peers.roll_call(f"no heartbeat for {silence} s"))
        elif still > self.limit and not self._computes(still):
            self.end(self._hang)

    def _computes(self, still: float) -> bool:
        """Returns whether this is a single process that is still computing on its CPU: a slow step, not a hang."""
        busy = time.process_time() - self.computed > still / 10
        return self.on_cpu and self.peers is None and busy

    def _stopped_before_the_first_step(self) -> End:
        """Names a rank that died, if there is one: it is why the launcher asks the others to stop."""
        if died := _who_died(self):
            return died
        return End(f"stopped on request before the first step{self.peers.never_began() if self.peers else ''}", 0)

    def _stopped_again(self, number: int, still: float) -> End:
        line = (
            f"{signal.Signals(number).name} again, and nothing has moved for {still:.0f} s (in {self.position()}): "
            "ended without saving; the same command resumes from the last checkpoint"
        )
        return End(line, 128 + number)

    def _hang(self) -> End | None:
        reason, peers = f"no step for {self.limit:.0f} s", self.peers
        if peers is None:
            return End(f"{self._name()} is in {self.position()} ({reason})", 1)
        found = peers.roll_call(reason, late=True)
        if found is None and (still := peers.still()) < self.limit:
            # Another rank makes progress, e.g. in a download, and the others wait for it.
            self.moved = max(self.moved, time.monotonic() - still - self.tick)  # reports are up to a tick old
            return None
        return found or peers.where_all_are(reason)

    def _report(self, limit: float) -> None:
        """Tells the guard that Python threads run here, and for how long they may be silent."""
        self.guard.report(Report(limit, f"{self._name()} is in {self.position()}", self.run()))

    def _name(self) -> str:
        return self.peers.name(self.peers.rank) if self.peers else "this process"

    def end(self, why: Callable[[], End | None]) -> None:
        """Ends this process, unless `why` finds that nothing has failed."""
        self._report(ENDING_SECONDS)
        if not self.lock.acquire(timeout=4 * GRACE_SECONDS):
            return  # the main thread is finding out why
        try:
            if self.failed is None:
                found = why()
                if found is None:
                    return
                self.failed = found if self.peers is None else self.peers.first_failure(found)
            else:
                time.sleep(GRACE_SECONDS)  # the main thread knows, and is on its way out
            self.write(self.failed)
            _say_and_exit(self.failed)
        finally:
            self.lock.release()

    def write(self, end: End) -> None:
        """Records the reason in the run directory, where the file system answers: it may be the reason."""
        if self.record is not None:
            record, in_place = self.record, self._succeeds_first()
            _try_for(2 * GRACE_SECONDS, lambda: record(end.state, end.line, in_place))  # a save in progress comes first

    def _succeeds_first(self) -> bool:
        """Returns whether this rank records the failure in place of rank 0."""
        return self.peers is not None and self.failed is not None and self.failed.successor == self.peers.rank > 0

    def position(self) -> str:
        """Returns where the main thread is, or the thread that it waits for.

        It is the innermost line of this project's code.
        """
        place = _place(self.main_thread)
        if place.startswith("cifar/background.py"):
            writing = [_place(thread.ident or 0) for thread in threading.enumerate() if thread.name in background.NAMES]
            place = next((other for other in writing if not other.startswith("cifar/background.py")), place)
        return place


def _place(thread: int) -> str:
    frame = sys._current_frames().get(thread)
    while frame is not None:
        code = frame.f_code
        file = Path(code.co_filename)
        if file.is_relative_to(_ROOT) and file != Path(__file__):
            place = file.relative_to(_ROOT)
            if "site-packages" not in place.parts:
                return f"{place}:{frame.f_lineno} ({code.co_name})"
        frame = frame.f_back
    return "no code of this project"


class _Peers:
    """The shared store, and this rank's view of the others."""

    def __init__(self, watch: _Watch, rank: int, ranks: int) -> None:
        machine = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes on each
        self.watch, self.rank, self.next = watch, rank, (rank + 1) % ranks
        self.hosts = [f"machine {other // machine}" for other in range(ranks)]  # until `name_hosts`
        self.heartbeat = ""  # the next rank's
        self.heard = self.told = time.monotonic()  # when that last changed, when the store last answered
        self.first: End | None = None  # what the rank said that failed first
        self.said: list[str] = []  # what the ranks said at the last roll call that all have answered
        self.leaving = threading.Event()
        self.cut_off = False
        self.address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection serves one thread at a time. One that has timed out is of no use any more: the heartbeat's waits
        # longer, so that a launcher that stalls for a while ends no rank.
        self.store, own_store = self._connect(GRACE_SECONDS), self._connect(SETUP_SILENT_SECONDS)
        self.teller = threading.Thread(target=self._tell, args=(own_store,), name="heartbeat", daemon=True)
        self.teller.start()

    def _connect(self, seconds: int) -> Any:
        try:
            store = _connected(30)
        except RuntimeError:
            address, port = self.address
            _say_and_exit(End(f"rank {self.rank} on {socket.gethostname()} does not reach {address}, port {port}", 1))
        store.set_timeout(timedelta(seconds=seconds))
        return store

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.hosts[rank]}"

    def _tell(self, store: Any) -> None:
        """Reports this rank's position and reads the others' reports, in the heartbeat thread. Ends with the store."""
        beats = 0
        with suppress(RuntimeError):
            while not self.leaving.is_set():
                beats += 1
                still = time.monotonic() - self.watch.moved
                store.set(f"alive/{self.rank}", f"{beats} {still:.1f} {self.watch.position()}")
                heartbeat = _get(store, f"alive/{self.next}")
                if heartbeat != self.heartbeat or heartbeat == LEFT:
                    self.heartbeat, self.heard = heartbeat, time.monotonic()
                if self.first is None and (first := _get(store, "first")):
                    self.first = End(*json.loads(first))
                self.told = time.monotonic()
                self.leaving.wait(self.watch.tick)
            store.set(f"alive/{self.rank}", LEFT)

    def silence(self, now: float, still: float) -> int:
        """Returns the heartbeat limit, in seconds, that the next rank has exceeded, or 0 if it has not.

        If the store is gone as well, only once this rank makes no progress either: a killed launcher takes the store
        with it, and then the ranks are to save and stop, which takes as long as a slow disk or a step on a CPU does.
        """
        watch = self.watch
        if not self.heartbeat or now - self.heard <= watch.silent:
            return 0
        if not self.answers(now):
            if still <= PATIENCE_SECONDS:
                return 0
            slow = watch.saving or watch.on_cpu or os.getppid() != _LAUNCHER
            if slow and still <= watch.limit and self._launcher_was_killed():
                return 0
        return watch.silent

    def answers(self, now: float) -> bool:
        """Returns whether the store has answered lately."""
        return now - self.told < SILENT_SECONDS

    def _launcher_was_killed(self) -> bool:
        """Returns whether the first node answers, but not its launcher's store."""
        try:
            socket.create_connection(self.address, TICK_SECONDS).close()
        except ConnectionRefusedError:
            return True
        except OSError:
            pass
        return False

    def ask(self, question: Callable[[], End | None], otherwise: End | None) -> End | None:
        """Returns what the store answers. If it does not answer: `otherwise`, and it is never asked again.

        The store is on the first node, which may be cut off.
        """
        if self.cut_off:
            return otherwise
        answers: list[End | None] = []
        _try_for(3 * GRACE_SECONDS, lambda: answers.append(question()))
        self.cut_off = not answers
        return answers[0] if answers else otherwise

    def never_began(self) -> str:
        """Says which ranks have had no heartbeat yet, '' if there are none."""

        def find() -> End:
            absent = [self.name(rank) for rank in range(len(self.hosts)) if not _get(self.store, f"alive/{rank}")]
            return End(f" ({', '.join(absent)} had not begun)" if absent else "", 0)

        found = self.ask(find, None)
        return found.line if found else ""

    def first_failure(self, end: End) -> End:
        """Returns the failure that any rank reported first; `end`, which is then reported, if there was none before."""
        return self.ask(lambda: End(*json.loads(self.store.compare_set("first", "", json.dumps(end)))), end) or end

    def roll_call(self, reason: str, late: bool = False) -> End | None:
        """Names the ranks that have no heartbeat within GRACE_SECONDS; None if all have one."""
        unreachable = End(f"{self.name(0)}: its node does not answer ({reason})", 1, self.rank)
        found = self.ask(lambda: self._roll_call(reason, late), unreachable)
        if found is None:
            self.heard = time.monotonic()
        return found

    def _roll_call(self, reason: str, late: bool) -> End | None:
        ranks = range(len(self.hosts))
        before = [_get(self.store, f"alive/{rank}") for rank in ranks]
        deadline = time.monotonic() + GRACE_SECONDS
        while True:
            now = [_get(self.store, f"alive/{rank}") for rank in ranks]
            absent = [rank for rank in ranks if now[rank] == before[rank] != LEFT and (now[rank] or late)]
            if first := _get(self.store, "first"):
                return End(*json.loads(first))
            if not absent:
                self.said = now
                return None
            if time.monotonic() > deadline:
                break
            time.sleep(0.1)
        who = ", ".join(self.name(rank) for rank in absent)
        successor = min(set(ranks) - set(absent), default=self.rank) if absent[0] == 0 else 0
        return End(f"{who}: no answer, so killed, frozen or cut off ({reason})", 1, successor)

    def still(self) -> float:
        """Returns the seconds since any rank made progress, after a roll call that all ranks have answered."""
        return min((float(said.split(" ")[1]) for said in self.said if said != LEFT), default=math.inf)

    def where_all_are(self, reason: str) -> End:
        """Returns where each rank is, after a roll call that all ranks have answered."""
        places = [said.split(" ", 2)[2] if said != LEFT else LEFT for said in self.said]
        common = Counter(places).most_common(1)[0][0]
        odd = [rank for rank, place in enumerate(places) if place != common]
        where = "; ".join(f"{self.name(rank)} is in {places[rank]}" for rank in odd)
        return End(f"{where + ', the others in' if odd else 'all ranks are in'} {common} ({reason})", 1)


def _get(store: Any, key: str) -> str:
    """Returns what the store has under a key, '' if nothing; `get` alone would wait for it."""
    return store.get(key).decode() if store.check([key]) else ""


_watch: _Watch | None = None
_LAUNCHER = os.getppid()


def start() -> None:
    """Starts the watchdog: one rank's failure ends all; so does a hang, and a rank that never starts."""
    global _watch
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    _watch = _Watch()
    if ranks > 1 and "MASTER_ADDR" in os.environ:
        _watch.peers = _Peers(_watch, int(os.environ["RANK"]), ranks)


def computes_on_cpu() -> None:
    """Tells the watchdog that this process computes on its CPU: alone and busy, it is slow, not hung."""
    if _watch:
        _watch.on_cpu = True


def name_hosts(hosts: list[str]) -> None:
    """Sets the ranks' host names, once they are known."""
    if _watch and _watch.peers:
        _watch.peers.hosts = hosts


def name(rank: int) -> str:
    """Names a rank and its host."""
    return _watch.peers.name(rank) if _watch and _watch.peers else f"rank {rank}"


def exchange(what: str, value: str) -> list[str]:
    """Runs an all-gather through the store, before there is a process group. A missing rank ends in a hang timeout."""
    peers = _watch.peers if _watch else None
    if peers is None:
        return [value]
    peers.store.set(f"{what}/{peers.rank}", value)
    keys = [f"{what}/{rank}" for rank in range(len(peers.hosts))]
    while not all(peers.store.check([key]) for key in keys):
        time.sleep(0.05)
    return [_get(peers.store, key) for key in keys]


def shorten_hang_timeout() -> None:
    """Marks that all ranks have opened their data: until the first step the hang timeout is at least HANG_SECONDS."""
    if _watch:
        _move(_watch)
        _watch.limit, _watch.silent = max(HANG_SECONDS, _watch.hang_seconds), OPENED_SILENT_SECONDS


def allow_compilation() -> None:
    """Makes the hang timeout at least SETUP_SECONDS for good: each image size may be compiled again, for minutes."""
    if _watch:
        _watch.hang_seconds = max(_watch.hang_seconds, SETUP_SECONDS)


def step_progressed() -> None:
    """Reports progress: call it after every step, evaluation batch and checkpoint file."""
    if _watch:
        _move(_watch)
        _watch.limit, _watch.silent = _watch.hang_seconds, SILENT_SECONDS
        _watch.training, _watch.saving = True, False


def save_begins() -> None:
    """Lets a rank wait for as long as the hang timeout until the next step, even if a launcher is gone."""
    if _watch:
        _watch.saving = True


def report_progress() -> None:
    """Reports progress of a long operation, e.g. a download; the timeout stays the same."""
    if _watch:
        _move(_watch)


def _move(watch: _Watch) -> None:
    watch.moved, watch.computed = time.monotonic(), time.process_time()


def when_ended(record: Record, run: Callable[[], RunPosition]) -> None:
    """Registers what records state and reason when the watchdog ends the process, and the run for the guard."""
    if _watch:
        _watch.record, _watch.run = record, run


def first_rank_works_alone() -> None:
    """Makes the hang timeout at least HANG_SECONDS: no steps follow, but rank 0's last writes or its pictures."""
    if _watch:
        _move(_watch)
        _watch.limit = max(HANG_SECONDS, _watch.hang_seconds)


def disable_watchdog() -> None:
    """Stops watching the other ranks, once all are here: one that dies before, e.g. in its last writes, is recorded."""
    if _watch:
        with suppress(RuntimeError):  # the launcher was killed, and the store with it
            exchange("last writes", "done")
        first_rank_works_alone()
        peers, _watch.peers = _watch.peers, None
        if peers:
            peers.leaving.set()
            peers.teller.join(GRACE_SECONDS)


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Wraps a program of several ranks: a UserError becomes one line, printed by rank 0, and its exit status, mostly 2.

    An uncaught Ctrl-C exits with 130, as in a shell.
    """
    outlive_readers()
    device.quiet_nccl()
    gc.disable()  # until launch.collect_garbage: of 400,000 imported objects hardly any is garbage; looking takes 1 s
    try:
        yield
    except UserError as error:
        if _watch is None and os.environ.get("GROUP_RANK", "0") != "0":
            _tell_first_node(str(error))
        if _prints(error.status):
            print(f"{program}: {error.prefix}{error}", file=sys.stderr)
        leave(error.status)
    except KeyboardInterrupt:
        leave(130)
    leave(0)


def _tell_first_node(line: str) -> None:
    """Reports a user's error on another node than the first, before there is a watchdog: others would wait for it."""
    # The first node may have ended, with the same error, or the variables be what is wrong.
    with suppress(RuntimeError, KeyError, ValueError):
        end = End(f"rank {os.environ['RANK']} on {socket.gethostname()}: {line}", USER_ERROR)
        _connected(PATIENCE_SECONDS).compare_set("first", "", json.dumps(end))


def _connected(seconds: int) -> Any:
    """Returns a new connection to the launcher's store, which is tried for so long. Raises RuntimeError."""
    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # torch: not for --help

    address, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    store = TCPStore(address, port, is_master=False, timeout=wait, wait_for_workers=False)
    # The store outlives a restart in place, and what the attempt before said must not count again.
    return PrefixStore(f"failure/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _prints(status: int) -> bool:
    """Returns whether this process prints what all ranks know: rank 0 does, or one that is alone, whatever its RANK.

    A user's error is printed by another rank of rank 0's machine, too, if rank 0 has not done it after some seconds. A
    launcher ends the others by SIGTERM as soon as one rank has exited, so nobody would: a rank 0 that has just started
    does not catch it yet. The same signal tells the other ranks that rank 0 has exited.
    """
    if os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") in ("", "1"):
        return True
    if status != USER_ERROR or os.environ.get("GROUP_RANK") != "0":
        return False
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not stop.requested() and time.monotonic() < deadline:
        time.sleep(0.05)
    return not stop.requested()


def leave(status: int) -> NoReturn:
    """Exits like sys.exit, but with several ranks without finalising Python while torch's threads run.

    A gloo or DDP thread that releases a Python object during finalisation is terminated inside C++ code that cannot be
    unwound: a rank that had finished aborts with "terminate called without an active exception", and its launcher
    reports a failed job. Seen in 1 of some hundred runs of two processes (torch 2.14).

    With several machines, the first launcher hosts the store in which the launchers wait for each other, and exits once
    the last has reported; one that has reported but does not wait yet finds the store gone and prints 40 lines. So rank
    0, whose launcher should be last, exits last.
    """
    if status == USER_ERROR:
        _tell_the_job(status)
    if os.environ.get("WORLD_SIZE", "1") == "1" or _watch is None:
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    _outlive_the_others()
    os._exit(status)


def _outlive_the_others() -> None:
    """Waits on rank 0, with several machines, until the others have read the reason: its launcher has the store."""
    if os.environ.get("RANK") == "0" and int(os.environ.get("GROUP_WORLD_SIZE", "1")) > 1:
        time.sleep(LAST_SECONDS)


def _cause(error: BaseException) -> End:
    """Returns why the job fails: the same on all ranks. Takes some seconds if a rank does not answer."""
    own = End(" ".join(f"{type(error).__name__}: {error}".split()), 1)
    if isinstance(error, UserError):
        own = End(str(error), error.status)
    watch = _watch
    if watch is None:
        return own
    peers = watch.peers
    with watch.lock:
        if watch.failed is None and peers is None:
            watch.failed = own
        elif watch.failed is None and peers is not None:
            watch.failed = peers.first_failure(_own_end(peers, error, own))
        assert watch.failed is not None
        return watch.failed


def _own_end(peers: _Peers, error: BaseException, own: End) -> End:
    """Returns what this rank says of its error, unless another rank is the cause."""
    if isinstance(error, UserError):
        return (_who_died(peers.watch) if own.status == 0 else None) or own
    if not _caused_by_a_peer(error):
        return own._replace(line=f"{peers.name(peers.rank)}: {own.line}")
    text = str(error)
    if "Duplicate GPU detected" in text:
        return End("two processes share one GPU; set --num_processes to the number of GPUs", USER_ERROR)
    if "NCCL" in text:  # the last of its lines says most
        reason = " ".join(text.rpartition("Last error:")[2].split())
        return peers.roll_call(reason) or End(f"{peers.name(peers.rank)}: {reason}", 1)
    reason = re.sub(r"^\[\S+\] ", "", text).partition(". ")[0]  # gloo adds its source file and advice
    return peers.roll_call(reason) or peers.where_all_are(reason)


def _who_died(watch: _Watch) -> End | None:
    """Names the rank that has died, if that is why the launcher asks the others to stop, by SIGTERM."""
    peers = watch.peers
    by_launcher = stop.requested() == signal.SIGTERM and os.getppid() == _LAUNCHER
    if peers and by_launcher and peers.answers(time.monotonic()):
        return peers.roll_call("asked to stop")
    return None


@contextmanager
def fail_together() -> Iterator[None]:
    """Wraps everything that ranks do together: an error on one ends all of them, with that error as the last line.

    The rank with the error prints its traceback first. A user error leaves the block as UserError. status.json says
    `failed` or `preempted`, and why.
    """
    try:
        with _full_memory_explained():
            yield
    except BaseException as error:
        if _watch is None:
            raise
        if _watch.peers is None or not isinstance(error, Exception):
            _watch.write(_cause(error))
            raise
        if not _caused_by_a_peer(error) and not isinstance(error, UserError):
            traceback.print_exception(error)  # at once: the watch may end this process meanwhile
        end = _cause(error)
        _watch.write(end)
        if end.status == USER_ERROR:
            raise UserError(end.line) from None
        _say_and_exit(end)


@contextmanager
def _full_memory_explained() -> Iterator[None]:
    """Turns a GPU that is out of memory into a UserError. In a step, `loop` gives other advice."""
    try:
        yield
    except RuntimeError as error:
        from torch import OutOfMemoryError

        if not isinstance(error, OutOfMemoryError):
            raise
        rank, what = int(os.environ.get("RANK", "0")), str(error).partition(". GPU ")[0]
        raise UserError(
            f"{name(rank)}: {what}; end what else uses the GPU (nvidia-smi), or keep the training images off it with "
            "--augmentation-backend albumentations, in a new --run"
        ) from None


def _caused_by_a_peer(error: BaseException) -> bool:
    """Returns whether an error is the consequence of another rank's. gloo raises plain RuntimeErrors."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())


def hang_seconds() -> int:
    """Returns the seconds without a step after which a job counts as hung. Raises UserError."""
    value = os.environ.get("CIFAR_HANG_SECONDS", str(HANG_SECONDS))
    if not value.isdecimal() or int(value) < 1:
        raise UserError(f"CIFAR_HANG_SECONDS={value} is not a number of seconds; give a whole number of at least 1")
    return int(value)


def _say_and_exit(end: End) -> NoReturn:
    """Exits at once: a normal interpreter exit would wait for threads that never end."""
    _try_for(GRACE_SECONDS, sys.stdout.flush)
    _try_for(PATIENCE_SECONDS + GRACE_SECONDS, lambda: _say(end))
    if end.status not in (0, 1):
        _tell_the_job(end.status)
    _outlive_the_others()
    os._exit(end.status)


def _try_for(seconds: int, work: Callable[[], object]) -> None:
    """Does what may fail or never end: a full pipe, a file system or the store may not answer."""

    def run() -> None:
        with suppress(OSError, ValueError, RuntimeError):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)


def _say(end: End) -> None:
    """Prints why the job ends: user errors and stop requests on one rank, other failures on all."""
    line, status, _ = end
    if status in (0, USER_ERROR) and not _prints(status):
        return
    # A single write (print makes two), since all ranks print the same line at once.
    sys.stderr.write(f"{Path(sys.argv[0]).name}: {'error: ' if status else ''}{line}\n")
    sys.stderr.flush()


def _tell_the_job(status: int) -> None:
    """Prevents a useless restart: writes into the job script's file, and ends torch's launcher.

    The launcher restarts ranks whatever their exit status was (--max_restarts), and hears nothing else.
    """
    path = os.environ.get("CIFAR_USER_ERROR_FILE")
    if path and status == USER_ERROR:
        # Not created: a rank that ends after the job script has read and removed it would leave one behind. And as long
        # as what is there: the disk may be full.
        with suppress(OSError), Path(path).open("r+") as file:
            file.write("user error")
    restarts, most = (int(os.environ.get(f"TORCHELASTIC_{name}", "0")) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    if restarts < most and os.environ.get("LOCAL_RANK") == "0" and os.getppid() == _LAUNCHER:
        os.kill(_LAUNCHER, signal.SIGTERM)
