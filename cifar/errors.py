"""The one exception that a user is meant to see, a command line that raises it, and output that may be cut off."""

import argparse
import errno
import os
import sys
from contextlib import suppress
from typing import Any, TextIO


class UserError(Exception):
    """Bad input. The message is one line: the thing, what is wrong with it, the mend. The scripts exit with 2."""

    status = 2


class LostError(UserError):
    """Nothing that was asked for is wrong, but something that the run needs is gone. The scripts exit with 1."""

    status = 1


class Parser(argparse.ArgumentParser):
    """argparse, with its errors as UserErrors: one line and no usage in front of it."""

    def error(self, message: str) -> Any:
        raise UserError(f"{message}; see {self.prog} --help")


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
    """From now on nothing fails because nobody reads stdout and stderr any more, e.g. after `| head`."""
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
