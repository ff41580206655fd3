"""Measures how long a program's imports take. Imports nothing slow itself."""

import builtins
import time
from typing import Any

BEGAN = time.time()  # the program's first line, if it imports this first


class Imports:
    """The time spent in import statements so far; nested imports are counted once."""

    def __init__(self) -> None:
        self.seconds, self.depth, self.original = 0.0, 0, builtins.__import__
        builtins.__import__ = self

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        began, self.depth = time.perf_counter(), self.depth + 1
        try:
            return self.original(*arguments, **keywords)
        finally:
            self.depth -= 1
            if self.depth == 0:
                self.seconds += time.perf_counter() - began

    def end(self) -> None:
        """Stops measuring."""
        builtins.__import__ = self.original
