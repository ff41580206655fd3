"""Interleaved measurements (A B A B), each program in its own process.

Allocator and thread settings do not leak from one to the other, and a machine that slows down affects both.

A program answers each line of JSON on stdin with one line on stdout, and exits at the end of stdin.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cifar.errors import UserError

ROOT = Path(__file__).parents[2]
MARK = "@answer "  # prefix of answers; other lines of output are ignored
PATIENCE = 1_000_000  # seconds that a program may wait for its next request: CIFAR_HANG_SECONDS

Answer = dict[str, Any]


class Program:
    """One side of a comparison: a process that waits for requests."""

    def __init__(
        self, name: str, command: Sequence[str], environment: Mapping[str, str], before: Sequence[str] = ()
    ) -> None:
        """Starts Python with the arguments `command`; `before` is a command prefix."""
        self.name, self.launched = name, time.time()
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 -- until close
        inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            [*before, sys.executable, *command],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            env={**inherited, "CIFAR_HANG_SECONDS": str(PATIENCE), **environment},
        )  # fmt: skip

    def request(self, do: str, **request: Any) -> Answer:
        """Sends a request and returns its answer. Raises UserError if the program exits instead."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(MARK):
                    answer: Answer = json.loads(line.removeprefix(MARK))
                    return answer
        except BrokenPipeError:
            pass
        self.process.wait()
        self.errors.seek(0)
        sys.stderr.write(self.errors.read().decode(errors="replace"))
        raise UserError(f"{self.name} ended with exit status {self.process.returncode}; its stderr is above")

    def close(self) -> None:
        self.process.communicate()
        self.errors.close()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def alternate(
    contestants: Mapping[str, tuple[Program, Mapping[str, Any]]], repeats: int, seconds: float, least: int = 1
) -> dict[str, list[Answer]]:
    """Returns the answers of each contestant to its request, `repeats` of each, interleaved.

    A request has an `amount`. How much fits into `seconds` is found in the second of two uncounted requests: the first
    one warms up, and may take much longer. `least` is the granularity of amounts.
    """
    amounts = {}
    for name, (program, request) in contestants.items():
        program.request(**request, amount=least)
        sizing = program.request(**request, amount=least)
        amounts[name] = least * max(1, round(seconds / sizing["seconds"]))
    answers: dict[str, list[Answer]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, (program, request) in contestants.items():
            answers[name].append(program.request(**request, amount=amounts[name]))
    return answers


def rates(answers: Sequence[Answer], each: float = 1.0) -> list[float]:
    """Returns amounts per second, times `each`."""
    return [answer["amount"] * each / answer["seconds"] for answer in answers]


def quotients(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Divides measurement by measurement."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


# ---- the program's side


def ask() -> Answer | None:
    """Returns the next request, or None where there will be no more."""
    line = sys.stdin.readline()
    request: Answer | None = json.loads(line) if line else None
    return request


def answer(given: Answer) -> None:
    """Answers the current request."""
    print(MARK + json.dumps(given), flush=True)


def synchronize(device: str) -> None:
    """Waits for a GPU to finish its work; nothing to do on a CPU."""
    if device == "cuda":
        import torch  # whose import is measured

        torch.cuda.synchronize()


def serve(abilities: Mapping[str, Callable[..., Answer]]) -> None:
    """Answers requests until there are no more."""
    while request := ask():
        answer(abilities[request.pop("do")](**request))
