"""The app's data besides the network: test images and the metadata of the About tab.

Built from a run and its test set, or read from a folder that `save` wrote, without the data set.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cifar import files
from cifar.errors import UserError
from cifar.explain import calibration, mistakes, runs
from cifar.explain.findings import Float, Int64, UInt8
from cifar.explain.runs import Run
from cifar.figures import png

LIST = "pictures.json"


@dataclass(frozen=True)
class EvaluatedImages:
    """Some test images with the run's final predictions."""

    indices: Int64  # [m] positions in the test set
    pixels: UInt8  # [m, 32, 32, 3]
    labels: UInt8  # [m]
    probabilities: Float  # [m, C]

    @property
    def predictions(self) -> UInt8:
        """[m] the most probable class."""
        most_probable: UInt8 = self.probabilities.argmax(axis=1).astype(np.uint8)
        return most_probable

    def row(self, row: int) -> tuple[int, UInt8, int, int, Float]:
        """Returns index, pixels [32, 32, 3], true and predicted class, probabilities [C] of one of them."""
        index, label, predicted = (int(array[row]) for array in (self.indices, self.labels, self.predictions))
        return index, self.pixels[row], label, predicted, self.probabilities[row]


@dataclass(frozen=True)
class AppContent:
    """Everything that the app shows besides the network."""

    examples: EvaluatedImages  # the first test image of each class
    mistakes: EvaluatedImages  # all of them, the most confident first
    images: int  # in the test set
    right: list[tuple[int, int]]  # for each class: images that were classified correctly, and images
    metadata: dict[str, str]  # how it was trained and how good it is: name and value of each line


def of_run(run: Run, source: str | None) -> AppContent:
    """Builds it from the run's last evaluation and its test images, or those at `source` (as --data).

    Raises UserError where the images are missing, or are not those that the run evaluated.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    data = runs.images(run, source)
    try:
        epochs, history = runs.prediction_history(run, data)
        probabilities = load_file(run.directory / "predictions.safetensors")["probabilities"].astype(np.float32)
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{run.path / 'predictions.safetensors'} cannot be read ({error}); choose another --run"
        ) from None
    if not len(epochs):
        named = source or run.recipe["data"]
        raise UserError(f"{named} does not hold the test images that {run.path} evaluated; name them with --data")
    labels, predictions = np.array(data.test_labels), history[epochs.argmax()]
    # float16 creates ties that the run did not have: break them in favour of the predicted class.
    tied = np.flatnonzero(probabilities.argmax(axis=1) != predictions)
    probabilities[tied, predictions[tied]] = np.nextafter(probabilities[tied].max(axis=1), np.float32(2))

    def take(indices: Int64) -> EvaluatedImages:
        return EvaluatedImages(indices, data.test_images[indices], labels[indices], probabilities[indices])

    first = [positions[0] for number in range(len(run.classes)) if len(positions := np.flatnonzero(labels == number))]
    correct = predictions == labels
    return AppContent(
        examples=take(np.array(first, np.int64)),
        mistakes=take(mistakes.find(probabilities, labels)),
        images=len(labels),
        right=[
            (int(correct[labels == number].sum()), int((labels == number).sum())) for number in range(len(run.classes))
        ],
        metadata=_metadata(run, correct, probabilities),
    )


def _metadata(run: Run, correct: np.ndarray[Any, np.dtype[np.bool_]], probabilities: Float) -> dict[str, str]:
    result = _result(run)
    low, high = calibration.wilson(np.array([correct.mean()]), np.array([len(correct)]))
    hours, minutes = divmod(round(result["seconds"] / 60), 60)
    processes = "1 process" if result["world_size"] == 1 else f"{result['world_size']:,} processes"
    return {
        "accuracy": f"{correct.mean():.2%} of {len(correct):,} test images "
        f"(95 % interval {low[0]:.2%} to {high[0]:.2%})",
        "confidence": f"{probabilities.max(axis=1).mean():.2%} on average",
        "network": f"{run.network}, {result['parameters']:,} parameters",
        "training": f"{run.step:,} steps in {hours} h {minutes:02} min, {processes}, precision {result['precision']}",
        **({"finished": run.end} if run.end else {}),
        "weights": f"sha256 {run.sha256}",
    }


def _result(run: Run) -> dict[str, Any]:
    """Returns the run's result.json. Raises UserError if a field is missing."""
    path = run.path / "result.json"
    result: dict[str, Any] = json.loads(path.read_bytes())  # it could be read when the run was opened
    if missing := [name for name in ("seconds", "world_size", "parameters", "precision") if name not in result]:
        raise UserError(f"{path} does not say: {', '.join(missing)}; choose another --run")
    return result


def save(content: AppContent, folder: Path) -> None:
    """Writes a PNG of each picture, examples/ and mistakes/, and a list of them. Raises OSError."""
    listed: dict[str, Any] = {"images": content.images, "right": content.right, "facts": content.metadata}
    for name, evaluated in (("examples", content.examples), ("mistakes", content.mistakes)):
        (folder / name).mkdir()
        listed[name] = []
        for index, pixels, label, row in zip(*vars(evaluated).values(), strict=True):
            file = f"{name}/{index:05}.png"
            files.write(folder / file, png(pixels))
            entry = {"file": file, "index": int(index), "true": int(label), "probabilities": row.tolist()}
            listed[name].append(entry)
    files.write(folder / LIST, json.dumps(listed, indent=1).encode())


def read(folder: Path) -> AppContent:
    """Reads what `save` wrote."""
    listed = json.loads((folder / LIST).read_bytes())

    def evaluated(rows: list[dict[str, Any]]) -> EvaluatedImages:
        pixels = [np.asarray(Image.open(folder / row["file"])) for row in rows]
        return EvaluatedImages(
            np.array([row["index"] for row in rows], np.int64),
            np.stack(pixels) if pixels else np.empty((0, 32, 32, 3), np.uint8),
            np.array([row["true"] for row in rows], np.uint8),
            np.array([row["probabilities"] for row in rows], np.float32).reshape(len(rows), len(listed["right"])),
        )

    return AppContent(
        evaluated(listed["examples"]),
        evaluated(listed["mistakes"]),
        listed["images"],
        [(right, count) for right, count in listed["right"]],
        listed["facts"],
    )
