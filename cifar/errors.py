"""The one exception that a user is meant to see."""


class UserError(Exception):
    """Bad input. The message is one line: the thing, what is wrong with it, the mend. The scripts exit with 2."""
