"""A trained network that can be explained: a finished run, or one checkpoint of an unfinished one.

Weights, network, classes and normalisation come from there alone (law 6).
"""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cifar import models
from cifar.errors import UserError
from cifar.explain.findings import Int64, UInt8

if TYPE_CHECKING:  # a wrong --run is refused before torch has loaded
    import torch
    from torch import nn

    from cifar.data.cache import Data

FORMAT = 1


@dataclass(frozen=True)
class Run:
    """What was trained, and where it lies. Statistics are per channel on a scale of 0 to 1."""

    path: Path  # as it was named: the run's directory or a checkpoint
    directory: Path  # the run's
    output: Path  # where an explanation goes unless it is told otherwise
    events: Path  # where its pictures go for TensorBoard
    network: str
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    recipe: dict[str, Any]
    data_fingerprint: str
    sha256: str  # of model.safetensors
    test_accuracy: float | None  # as the run measured it itself, a fraction; None for a checkpoint
    step: int  # optimizer steps taken


class Judgements(NamedTuple):
    """The predicted class of every test image at each epoch's evaluation."""

    epochs: Int64  # [E]
    predictions: UInt8  # [E, n]


def open_run(path: Path) -> Run:
    """Raises UserError where there is no run, it is not finished, or its files are not what was saved."""
    try:
        if (path / "config.json").is_file():
            config = json.loads((path / "config.json").read_bytes())
            result = json.loads((path / "result.json").read_bytes())
            run = _run(path, path, path / "explain", path, config, config["sha256"], config["test_accuracy"],
                       result["steps"])  # fmt: skip
        elif (path / "state.json").is_file():
            directory = path.absolute().parents[1]
            output = directory / f"explain-{path.name}"
            # TensorBoard reads the newest file of events in a directory and would no longer see the training's.
            config = json.loads((path / "state.json").read_bytes())
            run = _run(path, directory, output, output, config, config["sha256"]["model.safetensors"], None,
                       config["progress"]["step"])  # fmt: skip
        else:
            raise _not_finished(path)
        with (path / "model.safetensors").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; choose another --run") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); choose another --run") from None
    if found != run.sha256:
        raise UserError(f"{path / 'model.safetensors'} does not match its sha256; choose another --run or checkpoint")
    if run.network not in models.names():
        raise UserError(f"{path}: network {run.network!r} is unknown; choose a run of: {', '.join(models.names())}")
    return run


def _run(
    path: Path, directory: Path, output: Path, events: Path, config: dict[str, Any], sha256: str, accuracy: float | None,
    step: int,
) -> Run:  # fmt: skip
    if config["format"] > FORMAT:
        raise UserError(f"{path} has format {config['format']}, this version reads up to {FORMAT}; update it")
    return Run(
        path=path,
        directory=directory,
        output=output,
        events=events,
        network=config["network"],
        classes=list(config["classes"]),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        recipe=dict(config["recipe"]),
        data_fingerprint=config["data_fingerprint"],
        sha256=sha256,
        test_accuracy=accuracy,
        step=step,
    )


def _not_finished(path: Path) -> UserError:
    if not path.is_dir():
        return UserError(f"--run {path} does not exist; name the directory of a finished run")
    from cifar import checkpoint

    newest, _ = checkpoint.newest(path / "checkpoints")
    if newest is None:
        return UserError(f"--run {path} holds neither a finished run nor a complete checkpoint; choose another")
    return UserError(f"--run {path} is not finished; its newest complete checkpoint can be explained: --run {newest}")


def check_output(directory: Path) -> None:
    """Raises UserError where files could not be written into a directory, which need not exist yet."""
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"output folder {directory} is not writable; choose another --output")


def load(run: Run, device: "torch.device") -> "nn.Module":
    """The network with the run's weights, float32, in evaluation mode.

    Raises UserError where the weights are not those of the network and the classes that the run names.
    """
    import torch

    from cifar import checkpoint

    network = models.build(run.network, len(run.classes), dropout=0.0)
    checkpoint.load_weights(run.path / checkpoint.WEIGHTS, network)
    network.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()


def as_trained(run: Run, data: "Data") -> "Data":
    """The images with the normalisation that the network was trained with. Raises UserError for other classes."""
    if data.classes != run.classes:
        odd = sorted(set(data.classes) ^ set(run.classes)) or run.classes
        raise UserError(
            f"the images have other classes than {run.path} ({odd[0]!r} first); give the --data it was trained on, or "
            f"images of: {', '.join(run.classes)}"
        )
    return replace(data, mean=run.mean, std=run.std)


def judgements(directory: Path, labels: UInt8, until_step: int | None = None) -> Judgements:
    """What the run's evaluations said of these test images, up to a step; no epochs where it judged others."""
    from safetensors.numpy import load_file

    nothing = Judgements(np.empty(0, np.int64), np.empty((0, len(labels)), np.uint8))
    if not (directory / "predictions.safetensors").is_file():
        return nothing
    tensors = load_file(directory / "predictions.safetensors")
    if not np.array_equal(tensors["labels"], labels):
        return nothing
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    known = [line["epoch"] for line in lines if until_step is None or line["step"] <= until_step]
    kept = np.isin(tensors["epochs"], known)
    return Judgements(tensors["epochs"][kept], tensors["predictions"][kept])


def wrong_in(others: list[Path], labels: UInt8, fingerprint: str) -> dict[str, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
    """For each finished run, by its path: which of these test images its final network got wrong.

    Raises UserError for a run that is not finished or was trained and judged on other images.
    """
    found = {}
    for path in others:
        run = open_run(path)
        judged = judgements(run.directory, labels, run.step)
        if run.data_fingerprint != fingerprint or not len(judged.epochs):
            raise UserError(f"--compare {path} was judged on other images; name runs on the same data")
        found[str(path)] = judged.predictions[judged.epochs.argmax()] != labels
    return found
