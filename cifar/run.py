"""The run directory: what a run is (recipe.json), how it goes (status.json), what it measured (metrics, predictions).

Rank 0 alone writes here, as long as its attempt is the newest. Every file is replaced whole, so that a reader, and the
next attempt after a crash, finds each of them in order.
"""

import errno
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from cifar import attempt as attempts
from cifar import failure, recipes
from cifar.attempt import Attempt
from cifar.errors import UserError
from cifar.recipes import Recipe

if TYPE_CHECKING:  # torch behind it is not needed to refuse a wrong directory
    from cifar.checkpoint import Progress

VERSIONS_OF = ("torch", "torchvision", "accelerate", "albumentations", "numpy", "safetensors")


@dataclass(frozen=True)
class EpochMetrics:
    """One line of metrics.jsonl: losses are means, accuracies fractions, `seconds` since the run's start."""

    epoch: int  # epochs completed
    step: int  # optimizer steps taken
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    learning_rate: float
    images_per_second: float
    seconds: float
    test_accuracy_of_views: float | None = None  # with test-time augmentation


def read_status(directory: Path) -> dict[str, Any]:
    """status.json, or {} where there is none."""
    return _read_json(directory / "status.json")


def write_status(attempt: Attempt, state: str, step: int, reason: str = "") -> None:
    """`state` is running, finished, preempted or failed; `reason` says why in words. Raises UserError, OSError."""
    attempt.replace(attempt.run / "status.json", json.dumps({"state": state, "step": step, "reason": reason}))


def check(directory: Path, recipe: Recipe, resume: str) -> None:
    """Looks whether this directory is one that the recipe may be trained in.

    Raises UserError for a directory with other contents or another recipe, and, with --resume never, a used one.
    """
    try:
        # Attempts and half-written files are all that a crash in a run's first moments leaves.
        used = directory.exists() and any(p.name != "attempts" and p.suffix != ".tmp" for p in directory.iterdir())
    except OSError as error:
        raise UserError(f"run directory {directory}: {error.strerror}; choose another --run") from None
    if not used:
        return
    if resume == "never":
        raise UserError(f"run directory {directory} is not empty, and --resume never wants it so; choose a new --run")
    before = _read_json(directory / "recipe.json").get("recipe")
    if before is None:
        raise UserError(f"{directory} is not empty and holds no run (no readable recipe.json); choose another --run")
    different = recipes.differences(recipe, before)
    if different:
        raise UserError(f"{directory} holds a run of another recipe: {', '.join(different)}; choose another --run")


def finished(directory: Path) -> str:
    """A line that says so if the run is finished, else ''."""
    result = read_result(directory)
    if not result or read_status(directory).get("state") != "finished":
        return ""
    return f"{directory} is finished: test accuracy {result['test_accuracy']:.2%}; choose a new --run to train again"


def start(directory: Path, recipe: Recipe, fingerprint: str, world_size: int) -> Attempt:
    """Makes the directory and writes recipe.json, or compares the data with the run's, and begins an attempt at it.

    Raises UserError where the directory is not writable or its run was trained on other images.
    """
    path = directory / "recipe.json"
    before = _read_json(path)
    if before and before.get("data_fingerprint") != fingerprint:
        raise UserError(f"{directory} holds a run on other images than --data {recipe.data}; choose another --run")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(13, "not writable")
        attempt = attempts.claim(directory, world_size)
        if not before:
            facts = {
                "recipe": recipe.model_dump(),
                "data_fingerprint": fingerprint,
                "argv": sys.argv,
                "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
                "python": sys.version.split()[0],
                "git_revision": _git_revision(),
            }
            attempt.replace(path, json.dumps(facts, indent=1))
    except OSError as error:
        raise UserError(f"run directory {directory}: {error.strerror}; choose another --run") from None
    return attempt


class History:
    """What each epoch's evaluation found: metrics.jsonl and predictions.safetensors, cut back to a given step."""

    def __init__(self, attempt: Attempt, step: int, labels: npt.NDArray[np.uint8]) -> None:
        from safetensors.numpy import load_file

        self.attempt, self.labels = attempt, labels
        directory = attempt.run
        self.epochs: list[EpochMetrics] = []
        self.predictions: dict[int, npt.NDArray[np.uint8]] = {}
        path = directory / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            try:
                metrics = EpochMetrics(**json.loads(line))
            except (ValueError, TypeError):
                continue  # a line that a crash cut short: its epoch is evaluated again
            if metrics.step <= step:
                self.epochs.append(metrics)
        if len(self.epochs) < len(lines):
            self._write_metrics()
        if (directory / "predictions.safetensors").exists():
            before = load_file(directory / "predictions.safetensors")
            kept = {metrics.epoch for metrics in self.epochs}
            self.predictions = {
                int(epoch): row
                for epoch, row in zip(before["epochs"], before["predictions"], strict=True)
                if epoch in kept
            }

    def last_epoch(self) -> int:
        """The last epoch whose evaluation is recorded, 0 where there is none."""
        return self.epochs[-1].epoch if self.epochs else 0

    def record(self, metrics: EpochMetrics, probabilities: npt.NDArray[np.float32]) -> None:
        """Adds an evaluation; `probabilities` [test images, classes] replace those of the evaluation before."""
        from safetensors.numpy import save

        self.epochs.append(metrics)
        self.predictions[metrics.epoch] = probabilities.argmax(axis=1).astype(np.uint8)
        tensors: dict[str, npt.NDArray[Any]] = {
            "epochs": np.array(list(self.predictions), np.int64),
            "predictions": np.stack(list(self.predictions.values())),
            "labels": np.array(self.labels),
            "probabilities": probabilities.astype(np.float16),
        }
        # Predictions first: an epoch counts as evaluated once its line of metrics is there.
        self.attempt.replace(self.attempt.run / "predictions.safetensors", save(tensors))
        self._write_metrics()

    def _write_metrics(self) -> None:
        lines = "".join(json.dumps(asdict(metrics)) + "\n" for metrics in self.epochs)
        self.attempt.replace(self.attempt.run / "metrics.jsonl", lines)


@contextmanager
def failure_recorded(attempt: Attempt | None, progress: "Progress") -> Iterator[None]:
    """A failure within the block, of whichever rank, leaves `failed` and its words in status.json (rank 0's attempt).

    A full disk, wherever it was met, becomes a UserError.
    """

    def record(words: str) -> None:
        if attempt is not None:
            with suppress(OSError, UserError):  # the disk may be what failed, or the run be another attempt's by now
                write_status(attempt, "failed", progress.step, words)

    failure.when_hung(record)
    try:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            where = error.filename or "the run directory"
            full = f"{where}: {error.strerror}; make room there and start the same command again"
            raise UserError(full) from None
    except BaseException as error:
        record(failure.cause(error))
        raise


def read_result(directory: Path) -> dict[str, Any]:
    """result.json, or {} where there is none."""
    return _read_json(directory / "result.json")


def write_result(attempt: Attempt, result: dict[str, Any]) -> None:
    """Writes result.json. Raises UserError, OSError."""
    attempt.replace(attempt.run / "result.json", json.dumps(result, indent=1))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _git_revision() -> str | None:
    """The commit of this source tree, with '-dirty' where files differ from it; None outside a git checkout."""
    command: Sequence[str] = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
