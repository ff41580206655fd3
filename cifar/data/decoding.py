"""Reads and decodes image files in parts, with one process per core.

Workers write the images of a part to their place in a common file, so only descriptions of parts pass through the
parent. They are started, not forked: forking a process that has threads, a GPU or RDMA memory is not safe.
"""

import io
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from itertools import islice
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from cifar import cores, stop
from cifar.data import image_files, pictures
from cifar.data.image_files import SIZE
from cifar.data.waiting import TURN_SECONDS, ProgressBar, in_thread, too_long
from cifar.errors import LostError, UserError, end_of

PART = 256  # files that a process reads and decodes at a time
FIT = 8  # a picture that is resized takes about as long as this many 32x32 images
PART_SECONDS = 300  # time limit of a part; a busy network disk opens some 10 files a second
WORTH_A_PROCESS = 1000  # files: decoding these takes about as long as starting a process
FIRST, SLOW, AT_ONCE = 8, 0.002, 8  # files read one by one; if each takes more seconds than this, so many at once
END_SECONDS = 5  # to wait for a killed process
NO_ENTRIES = b"PK\5\6" + bytes(18)  # an empty zip

Read = Callable[[str], bytes]


class Reader(Protocol):
    """A folder or archive, in a form that a worker process can read files from."""

    def only(self, names: Sequence[str]) -> "Reader":
        """Returns the same, restricted to these files."""

    def opened(self) -> AbstractContextManager[Read]:
        """Opens it; yields a function that returns a file's content. Raises OSError."""


class InFolder(NamedTuple):
    """Files on a disk."""

    root: Path

    def only(self, names: Sequence[str]) -> "InFolder":  # noqa: ARG002
        return self

    @contextmanager
    def opened(self) -> Iterator[Read]:
        yield lambda name: (self.root / name).read_bytes()


class InZip(NamedTuple):
    """Files in a zip, with the entry of each."""

    path: Path
    entries: dict[str, zipfile.ZipInfo]

    def only(self, names: Sequence[str]) -> "InZip":
        return InZip(self.path, {name: self.entries[name] for name in names})

    @contextmanager
    def opened(self) -> Iterator[Read]:
        with self.path.open("rb") as file, zipfile.ZipFile(io.BytesIO(NO_ENTRIES)) as archive:
            archive.fp = file  # the entries are known, and to read all of them again may take half a second
            yield lambda name: _content(archive, self.entries[name])


def _content(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    """Reads a file in a zip, unpacking no more than its declared size plus one byte."""
    with archive.open(entry) as file:
        return file.read(entry.file_size + 1)  # one more than there is, so that the checksum is compared


class InMemory(NamedTuple):
    """Files that have been read."""

    contents: dict[str, bytes]

    def only(self, names: Sequence[str]) -> "InMemory":
        return InMemory({name: self.contents[name] for name in names})

    @contextmanager
    def opened(self) -> Iterator[Read]:
        yield self.contents.__getitem__


class Part(NamedTuple):
    """Some files of a folder or archive `where`, and the place of their images in the array's file."""

    where: str
    reader: Reader
    names: Sequence[str]
    array: Path
    start: int  # bytes
    fit: bool  # pictures of any size and kind, instead of images that need nothing but to be read

    @property
    def work(self) -> int:
        """The cost, roughly, in units of one 32x32 image."""
        return len(self.names) * (FIT if self.fit else 1)


def parts(where: str, reader: Reader, names: Sequence[str], array: Path, *, fit: bool = False) -> list[Part]:
    """Makes the file of an array uint8 [n, 32, 32, 3]; says what goes where in it. Raises OSError."""
    size = PART // FIT if fit else PART
    with array.open("xb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(names), SIZE, SIZE, 3)}
        np.lib.format.write_array_header_1_0(file, header)
        begin = file.tell()
    return [
        Part(where, reader.only(some), some, array, begin + start * SIZE * SIZE * 3, fit)
        for start in range(0, len(names), size)
        for some in [names[start : start + size]]
    ]


def decode_part(part: Part) -> None:
    """Reads and decodes the files, and writes their images. Raises UserError for a file, OSError for the writing."""
    images = np.empty((len(part.names), SIZE, SIZE, 3), np.uint8)
    try:
        with part.reader.opened() as read:
            contents = _contents(partial(_read_or_say, part.where, read), part.names)
            for image, name, content in zip(images, part.names, contents, strict=True):
                image[:] = (_fitted if part.fit else image_files.decode_image)(content, f"{part.where}: {name}")
    except OSError as error:
        wrong = f"cannot be read any more ({error.strerror}); start again when it is back"
        raise UserError(f"{part.where} {wrong}") from None
    with part.array.open("r+b") as file:
        file.seek(part.start)
        file.write(images.data)


def _fitted(content: bytes, name: str) -> pictures.UInt8:
    try:
        return pictures.read(content)
    except UserError as error:
        raise UserError(f"{name} cannot be used: {error}") from None


def _read_or_say(where: str, read: Read, name: str) -> bytes:
    try:
        return read(name)
    except Exception as error:  # decompression of damaged data raises nearly anything
        reason = f"{error}" or type(error).__name__
        raise UserError(f"{where}: {name} cannot be read ({reason}); repair or remove it") from None


def _contents(read: Read, names: Sequence[str]) -> Iterator[bytes]:
    """Yields the files' contents in order.

    A network disk is slow, but not if many files are requested at once; on a local disk threads cost time. Read-ahead
    is limited, since each file may be a photograph.
    """
    began = time.monotonic()
    yield from [read(name) for name in names[:FIRST]]
    names = names[FIRST:]
    if time.monotonic() - began < FIRST * SLOW:
        yield from map(read, names)
        return
    waiting, ahead = iter(names), deque[Future[bytes]]()
    while True:
        ahead.extend(in_thread(partial(read, name)) for name in islice(waiting, AT_ONCE - len(ahead)))
        if not ahead:
            return
        yield ahead.popleft().result()


# ---- by processes


def decode_all(everything: Sequence[Part]) -> None:
    """Decodes all parts. Raises UserError for the first file in order that is wrong, OSError for the writing."""
    count = sum(len(part.names) for part in everything)
    work = sum(part.work for part in everything)
    with ProgressBar("decoding the images", "images", count) as progress, _decoders(work) as decoders:
        _share(everything, decoders, progress)


Decoder = Callable[[Part], None]


class _Running(NamedTuple):
    number: int
    part: Part
    decoder: Decoder
    deadline: float


def _share(everything: Sequence[Part], decoders: Sequence[Decoder], progress: ProgressBar) -> None:
    """Hands each decoder its next part as soon as it is free."""
    waiting, running = deque(enumerate(everything)), dict[Future[None], _Running]()
    failed: list[tuple[int, BaseException]] = []

    def begin(decoder: Decoder) -> None:
        if waiting and not failed:  # all parts before one that failed have begun
            number, part = waiting.popleft()
            future = in_thread(partial(decoder, part))
            running[future] = _Running(number, part, decoder, time.monotonic() + PART_SECONDS)

    for decoder in decoders:
        begin(decoder)
    while running:
        progress.look()
        for future in wait(running, TURN_SECONDS, FIRST_COMPLETED).done:
            done = running.pop(future)
            if error := future.exception():
                failed.append((done.number, error))
            progress.done += len(done.part.names)
            begin(done.decoder)
        if any(time.monotonic() > late.deadline for late in running.values()):
            raise too_long(f"reading {len(everything[0].names)} files of {everything[0].where}", PART_SECONDS)
    if failed:
        raise min(failed, key=lambda failure: failure[0])[1]


@contextmanager
def _decoders(work: int) -> Iterator[list[Decoder]]:
    """Yields what decodes parts in parallel: processes, or, where they are not worth it or cannot start, this one."""
    processes: list[_Process] = []
    wanted = min(cores.of_job(), work // WORTH_A_PROCESS)
    try:
        with suppress(OSError):  # a limit on processes, open files or memory: fewer will do
            processes.extend(_Process() for _ in range(wanted if wanted > 1 else 0))
        yield [process.decode for process in processes] or [decode_part]
    finally:
        for process in processes:
            process.process.kill()
        for process in processes:
            process.end()


# The worker's program; it gets this process's sys.path.
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path = connection.recv()
from cifar.data.decoding import serve
serve(connection)
"""


class _Process:
    """A process that decodes parts, one after the other."""

    def __init__(self) -> None:
        """Raises OSError where it cannot be started."""
        self.connection, theirs = Pipe()
        command = [sys.executable, "-P", "-c", _PROGRAM, str(theirs.fileno())]
        one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # or numpy would start one more for each core
        # Blocked signals are inherited: Ctrl-C reaches all processes of a terminal, but only the parent handles it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, stop.SIGNALS)
        try:
            self.process = subprocess.Popen(
                command, env=one_thread, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()]
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.connection.send(sys.path)

    def decode(self, part: Part) -> None:
        """Decodes a part as `decode_part` does. Raises LostError where the process has ended."""
        try:
            self.connection.send(part)
            error = self.connection.recv()
        except (EOFError, ConnectionError):
            raise self._lost(part) from None
        if error is not None:
            raise error

    def _lost(self, part: Part) -> LostError:
        self.end()
        which = f"the process that decoded {part.names[0]} to {part.names[-1]}"
        return LostError(f"{part.where}: {which} {end_of(self.process.returncode)}; start the same command again")

    def end(self) -> None:
        """Waits for the process to exit, but not forever: a disk may not let it go."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)


def serve(connection: Connection) -> None:
    """Runs the worker's main loop."""
    stop.obey_parent()
    with suppress(EOFError, ConnectionError):  # the parent is gone
        while True:
            connection.send(_error_in(connection.recv()))


def _error_in(part: Part) -> Exception | None:
    try:
        decode_part(part)
    except (UserError, OSError) as error:
        return error
    return None
