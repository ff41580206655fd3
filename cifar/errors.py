"""The one exception that a user is meant to see, and a command line that raises it."""

import argparse
from typing import Any


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
