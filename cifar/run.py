"""The run directory: what a run is (recipe.json), how it goes (status.json), what it measured (metrics, predictions).

Rank 0 alone writes here. Every file is replaced whole or appended line by line, so that a reader, and the next
attempt after a crash, finds each of them in order.
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

from cifar import files, recipes
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


def read_status(directory: Path) -> dict[str, Any]:
    """status.json, or {} where there is none."""
    return _read_json(directory / "status.json")


def write_status(directory: Path, state: str, step: int, reason: str = "") -> None:
    """`state` is running, finished, preempted or failed; `reason` says why in words. Raises OSError."""
    files.replace(directory / "status.json", json.dumps({"state": state, "step": step, "reason": reason}))


def check(directory: Path, recipe: Recipe, resume: str) -> None:
    """Is this directory one that the recipe may be trained in? Needs no torch, so a wrong one is refused at once.

    Raises UserError for a directory with other contents or another recipe, and, with --resume never, a used one.
    """
    try:
        used = directory.exists() and any(directory.iterdir())
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


def start(directory: Path, recipe: Recipe, fingerprint: str) -> None:
    """Makes the directory and writes recipe.json, or compares the data with the run's, if it is there.

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
        if not before:
            facts = {
                "recipe": recipe.model_dump(),
                "data_fingerprint": fingerprint,
                "argv": sys.argv,
                "versions": {name: importlib.metadata.version(name) for name in VERSIONS_OF},
                "python": sys.version.split()[0],
                "git_revision": _git_revision(),
            }
            files.replace(path, json.dumps(facts, indent=1))
    except OSError as error:
        raise UserError(f"run directory {directory}: {error.strerror}; choose another --run") from None


class History:
    """What each epoch's evaluation found: metrics.jsonl and predictions.safetensors, cut back to a given step."""

    def __init__(self, directory: Path, step: int, labels: npt.NDArray[np.uint8]) -> None:
        from safetensors.numpy import load_file

        self.directory, self.labels = directory, labels
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
            files.replace(path, "".join(json.dumps(asdict(metrics)) + "\n" for metrics in self.epochs))
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
        files.replace(self.directory / "predictions.safetensors", save(tensors))
        with (self.directory / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(asdict(metrics)) + "\n")
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def failure_recorded(directory: Path | None, progress: "Progress") -> Iterator[None]:
    """An exception within the block leaves `failed` and its words in status.json, if there is a directory.

    A full disk, wherever it was met, becomes a UserError.
    """
    try:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            full = f"{error.filename or directory}: {error.strerror}; make room there and start the same command again"
            raise UserError(full) from None
    except BaseException as error:
        if directory is not None:
            words = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            with suppress(OSError):  # the disk may be what failed
                write_status(directory, "failed", progress.step, words)
        raise


def read_result(directory: Path) -> dict[str, Any]:
    """result.json, or {} where there is none."""
    return _read_json(directory / "result.json")


def write_result(directory: Path, result: dict[str, Any]) -> None:
    """Writes result.json. Raises OSError."""
    files.replace(directory / "result.json", json.dumps(result, indent=1))


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
