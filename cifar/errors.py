"""The one exception that a user is meant to see, a command line that raises it, and output that may be cut off."""

import argparse
import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class UserError(Exception):
    """Bad input. The message is one line: what, what is wrong with it, how to fix it. The scripts exit with 2."""

    def __init__(self, line: str, status: int = 2) -> None:
        super().__init__(line)
        self.status = status

    @property
    def prefix(self) -> str:
        """What stands before the line; a stop request that was heard (status 0) is no error."""
        return "error: " if self.status else ""


class LostError(UserError):
    """Nothing that was asked for is wrong, but something that the run needs is gone. The scripts exit with 1."""

    def __init__(self, line: str) -> None:
        super().__init__(line, 1)


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserErrors: one line and no usage in front of it."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


@contextmanager
def command_line(program: str) -> Iterator[None]:
    """Around a program: a user's mistake ends it in one line with exit status 2, Ctrl-C with 130, as in a shell."""
    try:
        yield
    except UserError as error:
        print(f"{program}: {error.prefix}{error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt:
        sys.exit(130)


class _Output:
    """A stream that drops what it cannot write: a closed pipe, a closed terminal or a full disk."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

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

    def _dropped(self, error: OSError) -> None:
        if error.errno == errno.ENOSPC:
            return  # there may be room again
        with suppress(OSError):  # Python would try once more to write what is left, at the end
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)


def outlive_readers() -> None:
    """From now on nothing fails because of stdout and stderr: nobody reads them any more, or they know ASCII alone."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
