"""Attempts at a run: of several jobs that each believe the run to be theirs, only the newest may write (fencing).

A node presumed dead may keep training while its job runs elsewhere; a job may be submitted twice; somebody may delete
the directory and begin anew. So each attempt creates `attempts/NNNN.json` with a random token, and stops once it sees a
higher number than its own, or another token there. Everything in the run directory is written under a temporary name
that contains the attempt's token and number, then renamed after that check. A new attempt first deletes the temporary
files of older ones, so an old attempt that was frozen between check and rename has nothing left to rename. An attempt
moves and deletes only what it wrote itself, or what was marked by such a rename (`mark`). This relies on POSIX
semantics of the shared file system; with NFS's directory caching, an old attempt may notice some seconds late.
"""

import json
import os
import re
import secrets
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
    """One attempt at the run in directory `run_dir`. All writing there goes through it, on rank 0."""

    def __init__(self, run_dir: Path, number: int, token: str) -> None:
        self.run_dir, self.number, self.token = run_dir, number, token

    def check(self) -> None:
        """Raises UserError if a newer attempt has taken the run over."""
        newest = max(_numbers(self.run_dir), default=0)
        if newest > self.number:
            raise UserError(
                f"{self.run_dir} was taken over by {described(self.run_dir, newest)}; "
                f"this one, attempt {self.number}, ends and has written nothing since"
            )
        if _read(self.run_dir, self.number).get("token") != self.token:  # numbers begin anew in a new directory
            raise UserError(
                f"{self.run_dir} was deleted or replaced while attempt {self.number} (process {os.getpid()} on "
                f"{socket.gethostname()}) trained there; it ends and has written nothing since"
            )

    def temporary(self, path: Path) -> Path:
        """Returns the name under which `path` is written first."""
        return path.with_name(f".{path.name}.{self.token}.{self.number}.tmp")

    def commit(self, path: Path) -> None:
        """Gives what was written and synced under `temporary(path)` its name. Raises UserError (see check), OSError.

        A directory does not replace a non-empty one: OSError (ENOTEMPTY or EEXIST).
        """
        self._rename(self.temporary(path), path)
        files.sync(path.parent)

    def mark(self, directory: Path, name: str) -> None:
        """Replaces the file `name` in a directory by an empty one. Raises UserError (see check), OSError.

        Only the newest attempt can, so a marked directory may be deleted even by an attempt that is superseded by then.
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
            self.check()  # perhaps a newer attempt has started since, and deleted it
            raise

    def replace(self, path: Path, content: str | bytes) -> None:
        """Writes a file: readers see the old content or the new. Raises UserError (see check), OSError."""
        self.begin(path, content.encode() if isinstance(content, str) else content).close()

    def write_status(self, state: str, step: int, reason: str = "") -> None:
        """Writes status.json. Raises UserError, OSError.

        `state` is running, finished, preempted or failed; `reason` says why in words.
        """
        self.replace(self.run_dir / "status.json", json.dumps({"state": state, "step": step, "reason": reason}))

    def begin(self, path: Path, content: bytes) -> IO[bytes]:
        """Writes a file as `replace` does, and leaves it open for more.

        After a newer attempt has replaced the file, additions are lost: the file is unlinked.
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


def claim(run_dir: Path, world_size: int) -> Attempt:
    """Starts a new attempt; earlier ones end at their next write. Raises OSError."""
    (run_dir / "attempts").mkdir(parents=True, exist_ok=True)
    number, token = max(_numbers(run_dir), default=0) + 1, secrets.token_hex(4)
    while not _register(run_dir, number, token, world_size):
        number += 1  # another one began in the same moment
    _clear_before(run_dir, number)
    return Attempt(run_dir, number, token)


def claim_after(run_dir: Path, number: int, token: str) -> Attempt | None:
    """Takes over from an attempt to record how it ended; None if another one has started since."""
    new = secrets.token_hex(4)
    newest = max(_numbers(run_dir), default=0) == number and _read(run_dir, number).get("token") == token
    if not newest or not _register(run_dir, number + 1, new, 0):
        return None
    _clear_before(run_dir, number + 1)
    return Attempt(run_dir, number + 1, new)


def _register(run_dir: Path, number: int, token: str, world_size: int) -> bool:
    try:
        with _file(run_dir, number).open("x") as file:
            json.dump(_metadata(token, world_size), file, indent=1)
    except FileExistsError:
        return False
    return True


def wait_until_visible(run_dir: Path, number: int) -> None:
    """Raises UserError if this machine does not see, within some seconds, the attempt that rank 0 has just begun."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while number not in _numbers(run_dir):
        if time.monotonic() > deadline:
            raise UserError(
                f"{socket.gethostname()} does not see {_file(run_dir, number).absolute()}, "
                "which rank 0 has just written; give a --run on a file system that all nodes share"
            )
        time.sleep(0.2)


def described(run_dir: Path, number: int) -> str:
    found: dict[str, Any] = {}
    with suppress(OSError):
        found = _read(run_dir, number)
    job = f", Slurm job {found['job']}" if found.get("job") else ""
    return f"attempt {number} (process {found.get('pid', '?')} on {found.get('host', '?')}{job})"


def _read(run_dir: Path, number: int) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(_file(run_dir, number).read_bytes())
    except (FileNotFoundError, ValueError):  # it is being written
        return {}
    return found


def _metadata(token: str, world_size: int) -> dict[str, Any]:
    return {
        "token": token,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "requeues": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "restarts_in_place": int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0),
        "world_size": world_size,
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _file(run_dir: Path, number: int) -> Path:
    return run_dir / "attempts" / f"{number:04d}.json"


def _numbers(run_dir: Path) -> list[int]:
    try:
        names = os.listdir(run_dir / "attempts")  # noqa: PTH208 -- Path.iterdir would make an object of each
    except FileNotFoundError:
        return []
    return [int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()]


def _clear_before(run_dir: Path, number: int) -> None:
    """Deletes the temporary files of attempts before `number`."""
    for folder in (run_dir, run_dir / "checkpoints"):
        for leftover in folder.glob(".*.tmp*"):
            writer = re.search(r"\.(\d+)\.tmp(-cleared-by-\d+)?$", leftover.name)
            if writer and int(writer[1]) < number:
                _clear(leftover, number)


def _clear(leftover: Path, number: int) -> None:
    """Renames a temporary file or directory away from its writer, atomically, then deletes it."""
    aside = leftover.with_name(f"{leftover.name.partition('-cleared-by-')[0]}-cleared-by-{number}")
    try:
        leftover.rename(aside)
    except FileNotFoundError:  # its writer was just done with it
        return
    files.remove(aside)
