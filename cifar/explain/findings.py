"""What an explanation pass has found, as plain arrays: made by explain.py, shown by figures and the report.

Shapes: n test images, m mistakes (most confident first), k companions, E epochs, C classes, h x w cells of a map.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ExplainedImages:
    """Some test images with their maps.

    Target 0 is the predicted class, target 1 the true one, or, for a correct image, the runner-up.
    """

    indices: Int64  # [m] positions in the test set
    pictures: UInt8  # [m, 32, 32, 3]
    files: list[str]  # [m] or empty where the source has no files
    targets: UInt8  # [m, 2] the classes that the two maps are for
    maps: Float  # [m, 2, h, w] >= 0, not rescaled
    peaks: Float  # [m, 2] the raw maximum of each map before negative evidence was cut; <= 0: no positive evidence
    votes: Float  # [m, 4, 4] signed; their sum plus `bias` is the margin logit(target 0) - logit(target 1)
    bias: Float  # [m] the linear layer's bias(target 0) - bias(target 1)
    margins: Float  # [m] logit(target 0) - logit(target 1)


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images to each mistake in the network's feature space, nearest first."""

    indices: Int64  # [m, q] positions in the training set
    labels: UInt8  # [m, q]
    distances: Float  # [m, q] 1 - cosine similarity
    pictures: UInt8  # [m, q, 32, 32, 3]
    near_duplicates: Int64  # test images (any, not only mistakes) that have a near-duplicate in the training set
    accuracy_without_duplicates: float


@dataclass(frozen=True)
class Findings:
    """Everything that gallery, figures, csv and report show."""

    facts: dict[str, str]  # name and value of each line about the run: recipe, accuracy, checkpoint hash, date, ...
    classes: list[str]
    labels: UInt8  # [n]
    probabilities: Float  # [n, C]
    epochs: Int64  # [E] the epochs that were evaluated in training
    epoch_predictions: UInt8  # [E, n]
    mistakes: ExplainedImages
    companions: ExplainedImages  # correct images, one for each mistaken pair (true, predicted)
    companion_of: Int64  # [m] row in `companions`, or -1
    method: str  # of the maps, e.g. gradcam
    layer: str  # e.g. layer2
    neighbours: Neighbours | None = None  # with --neighbours
    wrong_in: dict[str, npt.NDArray[np.bool_]] = field(default_factory=dict)  # with --compare: run -> [n] wrong there
    checks: dict[str, float | int] = field(default_factory=dict)  # with --check: figure -> value

    @property
    def predictions(self) -> UInt8:
        """[n] the most probable class of each test image."""
        most_probable: UInt8 = self.probabilities.argmax(axis=1).astype(np.uint8)
        return most_probable

    @property
    def accuracy(self) -> float:
        """Fraction of test images whose most probable class is the true one."""
        return float((self.predictions == self.labels).mean())
