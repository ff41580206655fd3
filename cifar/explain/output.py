"""Writes an explanation: its folder never holds a mix of two, even after a crash or with two processes at once."""

import errno
import fcntl
import io
import json
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from cifar import files
from cifar.errors import UserError
from cifar.explain import label_quality, mistakes, report
from cifar.explain.findings import Findings, UInt8
from cifar.explain.runs import STAGING
from cifar.figures import png

LOCK_SECONDS = 60  # to wait for another process that is renaming its files into the same folder
MAPS = "maps"
ON_REQUEST = ("corruptions.png",)  # optional files: a stale one must be deleted


def contents(
    findings: Findings, pictures: Mapping[str, UInt8], maps: Iterable[tuple[int, UInt8]]
) -> Iterator[tuple[str, bytes]]:
    """Yields name and content of each file of an explanation; `maps` are test images with pictures of their maps."""
    for name, picture in pictures.items():
        yield f"{name}.png", png(picture)
    for image, picture in maps:
        yield f"{MAPS}/{image:05}.png", png(picture)
    yield "misclassified.csv", mistakes.table(findings)
    yield "report.html", report.render(findings).encode()
    result = {
        "images": len(findings.labels),
        "mistakes": len(findings.mistakes.indices),
        "labels_in_doubt": int((label_quality.measure(findings).rank > 0).sum()),
        "accuracy": findings.accuracy,
        "method": findings.method,
        "layer": findings.layer,
        **({"checks": findings.checks} if findings.checks else {}),
        **(findings.robustness.results() if findings.robustness else {}),
    }
    yield "result.json", json.dumps(result, indent=1).encode()


def publish(folder: Path, contents: Iterable[tuple[str, bytes]]) -> None:
    """Replaces the explanation in a folder, which need not exist, by files with these names and contents.

    All are written and synced next to the old ones, which stay untouched if that fails. Then the old ones are removed
    and the new ones renamed, the last of `contents` last: its presence means that the others belong to it. Other files
    in the folder stay. Raises OSError, UserError.
    """
    (folder / MAPS).mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _clear_abandoned(folder)
        prefix, suffix = STAGING.split("*")
        staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=folder))
        lock = os.open(staging, os.O_RDONLY)
        _taken(lock)  # marks it as in use for as long as the descriptor is open, or this process lives
    whole = True
    try:
        names = []
        for name, content in contents:
            (staging / name).parent.mkdir(exist_ok=True)
            files.write(staging / name, content)
            names.append(name)
        with _locked(folder):
            old = [folder / name for name in reversed(names)]
            old += [folder / name for name in ON_REQUEST if name not in names]
            old += [path for path in (folder / MAPS).iterdir() if re.fullmatch(r"\d{5,}\.png", path.name)]
            whole = False
            for path in old:
                path.unlink(missing_ok=True)
            for name in names:
                (staging / name).rename(folder / name)
            whole = True
            for place in (folder / MAPS, folder):
                files.sync(place)
    finally:
        if whole:  # else it stays, as a sign that the rest are not a user's own files: see runs.check_output
            shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def write_events(directory: Path, pictures: Mapping[str, UInt8], step: int) -> None:
    """Writes pictures [h, w, 3] for TensorBoard, in a file of their own in place of earlier ones. Raises OSError.

    A SummaryWriter would write in a thread, which prints a traceback where the disk is full.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard.summary import image

    now, content = time.time(), io.BytesIO()
    records = RecordWriter(content)
    records.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
    for name, picture in pictures.items():
        summary = image(f"explain/{name}", picture, dataformats="HWC")  # type: ignore[no-untyped-call]
        records.write(Event(wall_time=now, step=step, summary=summary).SerializeToString())
    earlier = list(directory.glob("events.out.tfevents.*.explain"))
    name = f"events.out.tfevents.{now:.0f}.{socket.gethostname()}.{os.getpid()}.explain"
    files.write(directory / name, content.getvalue())
    for path in earlier:
        if path.name != name:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Locks a folder for publishing. Raises UserError if another process does not release it."""
    deadline = time.monotonic() + LOCK_SECONDS
    lock = os.open(folder, os.O_RDONLY)
    try:
        while not _taken(lock):
            if time.monotonic() > deadline:
                raise UserError(f"another process has been writing to {folder} for {LOCK_SECONDS} s; end it")
            time.sleep(0.05)
        yield
    finally:
        os.close(lock)


def _taken(lock: int) -> bool:
    """Returns whether the lock is this process's now.

    Where the file system has no locks there is nothing to wait for.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _clear_abandoned(folder: Path) -> None:
    """Removes what killed processes have left: staging folders whose lock is free."""
    for leftover in folder.glob(STAGING):
        with suppress(OSError):  # another one has removed it, or it is somebody else's
            lock = os.open(leftover, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(leftover, ignore_errors=True)
            finally:
                os.close(lock)
