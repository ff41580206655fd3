"""User-facing errors, a command-line parser that raises them, and output that survives closed streams."""

import argparse
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO


class UserError(Exception):
    """Bad input. The message is one line: what, what is wrong with it, how to fix it. The scripts exit with 2."""

    def __init__(self, line: str, status: int = 2) -> None:
        super().__init__(line)
        self.status = status

    @property
    def prefix(self) -> str:
        """The prefix of the message; empty for a handled stop request (status 0)."""
        return "error: " if self.status else ""


class LostError(UserError):
    """The input is fine, but something that the run needs was lost. The scripts exit with 1."""

    def __init__(self, line: str) -> None:
        super().__init__(line, 1)


def end_of(code: int | None) -> str:
    """Says how a process that was lost has ended, by its exit status."""
    how = f"was ended by {signal.Signals(-code).name}" if code and code < 0 else "ended"
    return f"{how}, most likely out of memory: request more for the job" if code == -signal.SIGKILL else how


# What a file server answers that is restarted or unreachable for a while.
LOST = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENOTCONN)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def disk_error(error: OSError, what: str, advice: str) -> UserError:
    """Returns a file system's error in one line.

    It is LostError where a later attempt may succeed, else UserError with `advice`.
    """
    if error.errno in LOST:
        return LostError(f"{what} ({error.strerror}); the file system fails, start the same command again")
    return UserError(f"{what} ({error.strerror}); {advice}")


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserErrors: one line and no usage in front of it."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Wraps a program: a UserError becomes one line and its exit status, Ctrl-C exits with 130, as in a shell.

    So does a disk without room for stdout. A closed pipe (`| head`) is no error: exit status 141, no message.
    """
    before = sys.stdout, sys.stderr
    _prepare_streams()
    sys.stdout, sys.stderr = _NeededOutput(sys.stdout), _Output(sys.stderr)
    try:
        try:
            yield
            sys.stdout.flush()
        except _OutputError as lost:
            if lost.error.errno == errno.EPIPE:
                sys.exit(128 + signal.SIGPIPE)
            raise disk_error(lost.error, "stdout cannot be written", "make room, or write it to another disk") from None
    except UserError as error:
        print(f"{program}: {error.prefix}{error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Output):
                stream.end()
        sys.stdout, sys.stderr = before


class _OutputError(Exception):
    """stdout cannot be written; what is still written to it is dropped."""

    def __init__(self, error: OSError) -> None:
        super().__init__(f"{error}")
        self.error = error


class _Output:
    """A stream that drops what it cannot write: a closed pipe, a closed terminal or a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO = stream._stream if isinstance(stream, _Output) else stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._dropped(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._dropped(error)

    def end(self) -> None:
        """Writes what is left, or drops it: Python would try once more at its exit, and fail."""
        try:
            self._stream.flush()
        except OSError:
            self._close()

    def _dropped(self, error: OSError) -> None:
        if error.errno != errno.ENOSPC:  # there may be room again
            self._close()

    def _close(self) -> None:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


class _NeededOutput(_Output):
    """A stream that is what the program is for: it raises _OutputError when it cannot write."""

    def _dropped(self, error: OSError) -> None:
        self._close()
        raise _OutputError(error) from None


def outlive_readers() -> None:
    """Keeps the program alive when stdout or stderr is closed, full or limited to ASCII."""
    _prepare_streams()
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)


def _prepare_streams() -> None:
    """Replaces closed streams, and lets one that is limited to ASCII take any text."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
