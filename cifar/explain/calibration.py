"""Calibration: accuracy in bins of confidence, with intervals."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cifar.explain.findings import Findings, Float, Int64

BINS = 10  # equally wide; part of every figure made from them

Fractions = npt.NDArray[np.float64]


class Reliability(NamedTuple):
    """For each bin: images, their mean confidence, the fraction classified correctly, and its 95 % interval.

    An empty bin has zeros, and the interval 0 to 1.
    """

    counts: Int64
    confidence: Fractions
    accuracy: Fractions
    low: Fractions
    high: Fractions

    @property
    def error(self) -> float:
        """The expected calibration error: mean distance of accuracy and confidence, weighted by images."""
        return float(np.abs(self.accuracy - self.confidence) @ self.counts / self.counts.sum())


def measure(findings: Findings) -> Reliability:
    confidence = findings.probabilities.max(axis=1)
    right = (findings.predictions == findings.labels).astype(np.float64)
    number = bin_of(confidence)
    counts = np.bincount(number, minlength=BINS)
    divisor = np.maximum(counts, 1)
    accuracy = np.bincount(number, right, minlength=BINS) / divisor
    low, high = wilson(accuracy, counts)
    return Reliability(counts, np.bincount(number, confidence, minlength=BINS) / divisor, accuracy, low, high)


def bin_of(confidence: Float) -> Int64:
    """Returns the bin [n] that each confidence [n] falls in.

    In float32, where ten times 0.7 is 7 and not a little less.
    """
    numbers: Int64 = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    return numbers


def wilson(fraction: Fractions, counts: Int64) -> tuple[Fractions, Fractions]:
    """Returns Wilson's 95 % interval of fractions of `counts` trials; valid for few trials, and near 0 and 1."""
    z = 1.959964
    n = np.maximum(counts, 1)
    middle = (fraction + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(fraction * (1 - fraction) / n + z**2 / (4 * n**2))
    # The interval of 0 of n begins at 0, and that of n of n ends at 1, but for rounding.
    low, high = np.clip(np.minimum(middle - half, fraction), 0, 1), np.clip(np.maximum(middle + half, fraction), 0, 1)
    return np.where(counts > 0, low, 0.0), np.where(counts > 0, high, 1.0)
