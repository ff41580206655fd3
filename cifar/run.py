"""The run directory: what a run is (recipe.json), how it goes (status.json), what it measured (metrics, predictions).

Rank 0 alone writes here, as long as its attempt is the newest. Files are replaced whole, so that a reader, and the next
attempt after a crash, finds each of them intact. Three files are appended to instead: metrics.jsonl and
predictions.log, which each attempt starts as new files (see History), and TensorBoard's, one per attempt, which first
purges what earlier attempts logged beyond the step that it resumes from.
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
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar import attempt as attempts
from cifar import recipes
from cifar.attempt import Attempt
from cifar.data.cache import open_data
from cifar.errors import FULL, LOST, UserError, disk_error
from cifar.recipes import Recipe, RunOptions

# Restart counters of the launcher and of Slurm: `--resume never` only applies to the first start.
RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
VERSIONS_OF = ("torch", "torchvision", "accelerate", "albumentations", "numpy", "safetensors")
EARLIER_NAMES = {"test_accuracy_of_views": "test_accuracy_tta"}  # in metrics.jsonl


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
    test_accuracy_tta: float | None = None  # with test-time augmentation (TTA)


def check(directory: Path, recipe: Recipe, resume: str) -> None:
    """Checks that the recipe may be trained in this directory.

    Raises UserError for a directory with other contents or another recipe, and, with --resume never, a used one.
    """
    try:
        # Attempts and half-written files are all that a crash in a run's first moments leaves.
        used = directory.exists() and any(p.name != "attempts" and ".tmp" not in p.name for p in directory.iterdir())
    except OSError as error:
        raise UserError(f"run directory {directory}: {error.strerror}; choose another --run") from None
    if not used:
        return
    restarted = any(os.environ.get(name, "0") not in ("", "0") for name in RESTARTS)
    if resume == "never" and not restarted:
        raise UserError(
            f"run directory {directory} is not empty, and --resume never needs an empty one; choose a new --run"
        )
    before = _read_json(directory / "recipe.json").get("recipe")
    if before is None:
        raise UserError(f"{directory} is not empty and holds no run (no readable recipe.json); choose another --run")
    different = recipes.differences(recipe, before)
    if different:
        raise UserError(f"{directory} holds a run with another recipe: {', '.join(different)}; choose another --run")


def finished(directory: Path, recipe: Recipe) -> str:
    """Returns a message if the run is finished, else ''. Raises UserError if it was trained on other images.

    They are opened, and thus compared, only where --data has changed.
    """
    result = _read_json(directory / "result.json")
    if not result or _read_json(directory / "status.json").get("state") != "finished":
        return ""
    before = _read_json(directory / "recipe.json")
    if before["recipe"]["data"] != recipe.data:
        _check_images(directory, before, recipe, open_data(recipe.data, fit=recipe.fit > 0).fingerprint)
    return f"{directory} is finished: test accuracy {result['test_accuracy']:.2%}; choose a new --run to train again"


def _check_images(directory: Path, before: dict[str, Any], recipe: Recipe, fingerprint: str) -> None:
    """Raises UserError where the run, whose recipe.json is `before`, was trained on other images."""
    if before.get("data_fingerprint") != fingerprint:
        raise UserError(f"{directory} holds a run on other images than --data {recipe.data}; choose another --run")


def start(options: RunOptions, recipe: Recipe, fingerprint: str, world_size: int) -> Attempt:
    """Creates the directory and recipe.json, or checks the data against the run's, and starts an attempt.

    Raises UserError where the directory is not writable or its run was trained on other images.
    """
    directory = options.run_dir
    path = directory / "recipe.json"
    before = _read_json(path)
    if before:
        _check_images(directory, before, recipe, fingerprint)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        attempt = attempts.claim(directory, world_size)
        if not before:
            metadata = {
                "name": options.recipe_name,  # as asked for, before any of its fields was changed
                "recipe": recipe.model_dump(),
                "data_fingerprint": fingerprint,
                "argv": sys.argv,
                "versions": {name: _version(name) for name in VERSIONS_OF},
                "python": sys.version.split()[0],
                "git_revision": _git_revision(),
            }
            attempt.replace(path, json.dumps(metadata, indent=1))
    except OSError as error:
        raise disk_error(error, f"run directory {directory} cannot be written to", "choose another --run") from None
    return attempt


class History:
    """The evaluations of all epochs up to a given step: metrics.jsonl and predictions.safetensors.

    An epoch appends a line to metrics.jsonl and its predictions to predictions.log, so that its cost does not grow with
    the number of epochs. predictions.safetensors, meant for other programs, is rewritten when a tenth has been added,
    and at the end. Each attempt starts with copies under the same names: an older attempt then appends to files that
    are no longer linked, since appends cannot be fenced.
    """

    def __init__(self, attempt: Attempt, step: int, labels: npt.NDArray[np.uint8]) -> None:
        self.attempt, self.labels = attempt, labels
        rows, exported = read_predictions(attempt.run_dir, len(labels))
        # Probabilities are in predictions.safetensors alone: an evaluation that can be made again must be there, too.
        self.epochs = [
            metrics
            for metrics in _read_metrics(attempt.run_dir)
            if metrics.epoch in rows and (metrics.step < step or (metrics.step == step and metrics.epoch in exported))
        ]
        self.predictions = {metrics.epoch: rows[metrics.epoch] for metrics in self.epochs}
        self.probabilities: npt.NDArray[np.float32] | None = None  # of the last epoch that this attempt evaluated
        kept = {metrics.epoch for metrics in self.epochs}
        self.exported = len(kept) if exported == kept else 0  # epochs in predictions.safetensors
        self._metrics = attempt.begin(attempt.run_dir / "metrics.jsonl", "".join(map(_line, self.epochs)).encode())
        log = b"".join(_row(*entry) for entry in self.predictions.items())
        self._log = attempt.begin(attempt.run_dir / "predictions.log", log)

    def last_epoch(self) -> int:
        """Returns the last epoch whose evaluation is recorded, 0 where there is none."""
        return self.epochs[-1].epoch if self.epochs else 0

    def record(self, metrics: EpochMetrics, probabilities: npt.NDArray[np.float32]) -> None:
        """Adds an evaluation; `probabilities` [test images, classes] replace those of the evaluation before."""
        self.epochs.append(metrics)
        self.predictions[metrics.epoch] = probabilities.argmax(axis=1).astype(np.uint8)
        self.probabilities = probabilities
        # Predictions first: an epoch counts as evaluated once its line of metrics is there.
        try:
            for file, content in (
                (self._log, _row(metrics.epoch, self.predictions[metrics.epoch])),
                (self._metrics, _line(metrics).encode()),
            ):
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        finally:
            self.attempt.check()  # a newer attempt may have replaced these files
        if 10 * (len(self.epochs) - self.exported) >= len(self.epochs):
            self.export()

    def export(self) -> None:
        """Writes predictions.safetensors, unless it has all that is recorded. Raises UserError, OSError."""
        from safetensors.numpy import save

        if self.probabilities is None or self.exported == len(self.epochs):
            return
        tensors: dict[str, npt.NDArray[Any]] = {
            "epochs": np.array(list(self.predictions), np.int64),
            "predictions": np.stack(list(self.predictions.values())),
            "labels": np.array(self.labels),
            "probabilities": self.probabilities.astype(np.float16),
        }
        self.attempt.replace(self.attempt.run_dir / "predictions.safetensors", save(tensors))
        self.exported = len(self.epochs)

    def close(self) -> None:
        """Closes the two files that grow."""
        self._metrics.close()
        self._log.close()


def _line(metrics: EpochMetrics) -> str:
    return json.dumps(asdict(metrics)) + "\n"


def _row(epoch: int, predictions: npt.NDArray[np.uint8]) -> bytes:
    return epoch.to_bytes(8, "little") + predictions.tobytes()


def _read_metrics(directory: Path) -> list[EpochMetrics]:
    path = directory / "metrics.jsonl"
    found = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError, TypeError):  # a line that a crash cut short: its epoch is evaluated again
            found.append(
                EpochMetrics(**{EARLIER_NAMES.get(name, name): value for name, value in json.loads(line).items()})
            )
    return found


def read_predictions(directory: Path, images: int) -> tuple[dict[int, npt.NDArray[np.uint8]], set[int]]:
    """Returns the class predicted for each test image [images], by epoch; and which epochs have been exported.

    Those are in predictions.safetensors; predictions.log has those of a run that is not finished, too.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found: dict[int, npt.NDArray[np.uint8]] = {}
    with suppress(OSError, SafetensorError):
        tensors = load_file(directory / "predictions.safetensors")
        if tensors["predictions"].shape[1:] == (images,):
            found = dict(zip(tensors["epochs"].tolist(), tensors["predictions"], strict=True))
    exported = set(found)
    with suppress(OSError):
        content = (directory / "predictions.log").read_bytes()
        record = np.dtype([("epoch", "<i8"), ("predictions", np.uint8, (images,))])
        rows = np.frombuffer(content, record, count=len(content) // record.itemsize)  # a crash may cut the last short
        found |= dict(zip(rows["epoch"].tolist(), rows["predictions"], strict=True))
    return found, exported


@contextmanager
def disk_errors_named(attempt: Attempt | None = None) -> Iterator[None]:
    """Turns a full disk and a failing file server within the block into a UserError.

    A file is also missing where a newer attempt has taken the run over, or somebody has deleted it: `attempt` says so.
    """
    try:
        yield
    except OSError as error:
        if attempt:
            attempt.check()
        if error.errno not in (*FULL, *LOST):
            raise
        where = str(error.filename or "the run directory")
        raise disk_error(error, where, "make room there and start the same command again") from None


def write_result(attempt: Attempt, result: dict[str, Any]) -> None:
    """Writes result.json. Raises UserError, OSError."""
    attempt.replace(attempt.run_dir / "result.json", json.dumps(result, indent=1))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _version(package: str) -> str | None:
    with suppress(importlib.metadata.PackageNotFoundError):  # torchvision, which training does not import
        return importlib.metadata.version(package)
    return None


def _git_revision() -> str | None:
    """Returns the commit of this source tree, with '-dirty' where files differ from it; None outside a git checkout."""
    command: Sequence[str] = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
