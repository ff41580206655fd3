"""The results of explain.py as plain arrays, shown by the figures and the report.

Shapes: n test images, m mistakes (most confident first), k companions, E epochs, C classes, h x w cells of a map.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from cifar.explain.layers import Grid

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Float = npt.NDArray[np.float32]

# Probabilities differ in their last bits between numbers of processes, batches and processors.
DECIMALS = 4


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
    votes: Float  # [m, a, a] signed, for the cells of the last stage; their sum plus `bias` is `margins`
    bias: Float  # [m] the linear layer's bias(target 0) - bias(target 1)
    margins: Float  # [m] logit(target 0) - logit(target 1)
    map_grid: Grid  # where the cells of the maps lie on the pictures
    vote_grid: Grid  # and those of the votes


# A test image has a near-duplicate if its pixels and a training image's correlate by EQUAL or more; or by ALIKE or
# more, and 1 - correlation is at most a part STANDS_OUT of that with the third nearest training image. Measured:
# different handwritings of digits correlate by up to 0.992, and none is nearer than a fifth; a copy that was coded as
# JPEG of quality 75 and brightened by a tenth correlates by 0.998 in digits, and stands out in CIFAR-10, where the rule
# leaves 25 of the 39 of 4,000 images that correlate by ALIKE.
EQUAL, ALIKE, STANDS_OUT = 0.998, 0.95, 1 / 6


@dataclass(frozen=True)
class Neighbours:
    """The nearest training images to each mistake in the network's feature space, nearest first.

    `q` are shown, as many of the predicted as of the true class; of the `v` nearest overall only the labels count.
    """

    indices: Int64  # [m, q] positions in the training set; -1 at the end where a class has too few images
    labels: UInt8  # [m, q]
    distances: Float  # [m, q] 1 - cosine similarity
    nearest_labels: UInt8  # [m, v] of the nearest training images of whatever class
    pictures: UInt8  # [m, q, 32, 32, 3]
    near_duplicates: Int64  # test images (any, not only mistakes) that have a near-duplicate in the training set
    accuracy_without_duplicates: float | None  # None if every test image has one


FLIPS = 6  # pictures of each corruption that flip first


class Flip(NamedTuple):
    """A test image that is classified correctly until it is corrupted."""

    kind: str
    severity: int  # the least at which the class changes
    image: int  # position in the test set
    picture: UInt8  # [32, 32, 3] corrupted
    clean: UInt8  # [32, 32, 3]
    predicted: int
    confidence: float


@dataclass(frozen=True)
class Robustness:
    """Accuracy on corrupted test images. Shapes: R runs, the one that is explained first; K kinds; S severities."""

    seed: int
    kinds: list[str]
    runs: list[str]  # their paths
    clean: npt.NDArray[np.float64]  # [R] without corruption
    accuracy: npt.NDArray[np.float64]  # [R, K, S]
    flips: list[Flip]  # of the first run, some for each kind: the least severity first, then the most confident

    @property
    def means(self) -> npt.NDArray[np.float64]:
        """[R, K] over the severities."""
        means: npt.NDArray[np.float64] = self.accuracy.mean(axis=2)
        return means

    @property
    def worst(self) -> int:
        """The kind that costs the first run most."""
        return int(self.means[0].argmin())

    def results(self) -> dict[str, Any]:
        """Returns its entries in result.json."""
        own, *others = [
            {**dict(zip(self.kinds, table.tolist(), strict=True)), "mean": float(table.mean())}
            for table in self.accuracy
        ]
        compared = {
            run: {"accuracy": float(clean), "corruptions": table}
            for run, clean, table in zip(self.runs[1:], self.clean[1:], others, strict=True)
        }
        return {"corruptions": own, **({"corruptions_compared": compared} if compared else {})}

    def line(self) -> str:
        of_kinds = self.means[0]
        return (
            f"under {len(self.kinds)} corruptions at {self.accuracy.shape[2]} severities: accuracy "
            f"{of_kinds.mean():.2%}, the worst kind {self.kinds[self.worst]} with {of_kinds[self.worst]:.2%}"
        )


@dataclass(frozen=True)
class Findings:
    """Everything that gallery, figures, csv and report show."""

    metadata: dict[str, str]  # name and value of each line about the run: recipe, accuracy, checkpoint hash, date, ...
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
    robustness: Robustness | None = None  # with --corruptions
    checks: dict[str, float | int] = field(default_factory=dict)  # with --check: metric -> value

    @property
    def predictions(self) -> UInt8:
        """[n] the most probable class of each test image."""
        most_probable: UInt8 = self.probabilities.argmax(axis=1).astype(np.uint8)
        return most_probable

    @property
    def accuracy(self) -> float:
        """Fraction of test images whose most probable class is the true one."""
        return float((self.predictions == self.labels).mean())
