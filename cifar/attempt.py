"""Attempts at a run: of several jobs that each believe the run to be theirs, only the newest may write (fencing).

A node that only seemed dead trains on while its job runs again elsewhere; a job is submitted twice. Each attempt makes
a file of its own, `attempts/NNNN.json`, and whoever finds a higher number than its own stops. Everything in the run
directory is written under a temporary name with the attempt's number in it and then renamed, after a look for a newer
attempt; and a new attempt first clears away the temporary files of those before it. So an old attempt that was frozen
between its look and its rename finds nothing left to rename. An attempt moves and deletes only what it wrote itself,
or what such a rename has marked before (`mark`). It needs what POSIX promises of a shared file system; where NFS caches
directories, an old attempt may notice some seconds late.
"""

import json
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from cifar import files
from cifar.errors import UserError

VISIBLE_SECONDS = 10  # NFS clients may keep a directory's listing for that long


class Attempt:
    """One attempt at the run in directory `run`. All writing there goes through it, on rank 0."""

    def __init__(self, run: Path, number: int) -> None:
        self.run, self.number = run, number

    def check(self) -> None:
        """Raises UserError if a newer attempt has taken the run over."""
        newest = max(_numbers(self.run), default=0)
        if newest > self.number:
            raise UserError(
                f"{self.run} was taken over by {described(self.run, newest)}; "
                f"this one, attempt {self.number}, ends and has written nothing since"
            )

    def temporary(self, path: Path) -> Path:
        """The name under which `path` is written first."""
        return path.with_name(f".{path.name}.{self.number}.tmp")

    def commit(self, path: Path) -> None:
        """Gives what was written and synced under `temporary(path)` its name. Raises UserError (see check), OSError.

        A directory takes no other one's name, unless that one is empty: OSError (ENOTEMPTY or EEXIST).
        """
        self._rename(self.temporary(path), path)
        files.sync(path.parent)

    def mark(self, directory: Path, name: str) -> None:
        """Replaces the file `name` in a directory by an empty one. Raises UserError (see check), OSError.

        Only the newest attempt can do this: whatever is marked may be deleted, even by an attempt that freezes now.
        """
        marker = self.temporary(directory)
        try:
            marker.touch()
            self._rename(marker, directory / name)
        finally:
            marker.unlink(missing_ok=True)

    def _rename(self, temporary: Path, path: Path) -> None:
        self.check()
        try:
            temporary.rename(path)
        except FileNotFoundError:
            self.check()  # a newer attempt began, and cleared it away, since the line above
            raise

    def replace(self, path: Path, content: str | bytes) -> None:
        """Writes a file: readers see the old content or the new. Raises UserError (see check), OSError."""
        self.begin(path, content.encode() if isinstance(content, str) else content).close()

    def begin(self, path: Path, content: bytes) -> IO[bytes]:
        """Writes a file as `replace` does, and leaves it open for more.

        What is added once a newer attempt has replaced the file reaches nobody: it has no name any more.
        """
        temporary = self.temporary(path)
        try:
            file = temporary.open("wb")  # buffered: a raw write to a nearly full disk may end early without an error
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                self.commit(path)
            except BaseException:
                with suppress(OSError):  # it would try once more to write what is left
                    file.close()
                raise
        finally:
            temporary.unlink(missing_ok=True)
        return file


def claim(run: Path, world_size: int) -> Attempt:
    """Begins an attempt at the run, which ends those before it at their next write. Raises OSError."""
    (run / "attempts").mkdir(parents=True, exist_ok=True)
    number = max(_numbers(run), default=0) + 1
    while not _register(run, number, world_size):
        number += 1  # another one began in the same moment
    _clear_before(run, number)
    return Attempt(run, number)


def claim_after(run: Path, number: int) -> Attempt | None:
    """Takes over from attempt `number`, to write down how it ended; None where another one has begun since."""
    if max(_numbers(run)) > number or not _register(run, number + 1, 0):
        return None
    _clear_before(run, number + 1)
    return Attempt(run, number + 1)


def _register(run: Path, number: int, world_size: int) -> bool:
    try:
        with _file(run, number).open("x") as file:
            json.dump(_metadata(world_size), file, indent=1)
    except FileExistsError:
        return False
    return True


def wait_until_visible(run: Path, number: int) -> None:
    """Raises UserError if this machine does not see, within some seconds, the attempt that rank 0 has just begun."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while number not in _numbers(run):
        if time.monotonic() > deadline:
            raise UserError(
                f"{socket.gethostname()} does not see {_file(run, number).absolute()}, which rank 0 has just written; "
                "give a --run on a file system that all nodes share"
            )
        time.sleep(0.2)


def described(run: Path, number: int) -> str:
    """An attempt in words."""
    try:
        found = json.loads(_file(run, number).read_bytes())
    except (OSError, ValueError):  # it is being written
        found = {}
    job = f", Slurm job {found['job']}" if found.get("job") else ""
    return f"attempt {number} (process {found.get('pid', '?')} on {found.get('host', '?')}{job})"


def _metadata(world_size: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "requeues": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "restarts_in_place": int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
        "world_size": world_size,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _file(run: Path, number: int) -> Path:
    return run / "attempts" / f"{number:04d}.json"


def _numbers(run: Path) -> list[int]:
    try:
        names = os.listdir(run / "attempts")  # noqa: PTH208 -- Path.iterdir would make an object of each
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()]


def _clear_before(run: Path, number: int) -> None:
    """Takes from the attempts before `number` what they have not renamed yet."""
    for folder in (run, run / "checkpoints"):
        for leftover in folder.glob(".*.tmp*"):
            writer = re.search(r"\.(\d+)\.tmp(-cleared-by-\d+)?$", leftover.name)
            if writer and int(writer[1]) < number:
                _clear(leftover, number)


def _clear(leftover: Path, number: int) -> None:
    """Takes a temporary file or directory from its writer at once, then deletes it."""
    aside = leftover.with_name(f"{leftover.name.partition('-cleared-by-')[0]}-cleared-by-{number}")
    try:
        leftover.rename(aside)
    except FileNotFoundError:  # its writer was just done with it
        return
    if aside.is_dir():
        shutil.rmtree(aside, ignore_errors=True)
    else:
        aside.unlink(missing_ok=True)
