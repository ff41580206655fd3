"""Which labels are in doubt: network, nearest training images and other runs together contradict them most.

After confident learning (C. Northcutt and others, arXiv 1911.00068), which measures for each class how sure a network
usually is: a class's threshold is the mean probability that images labelled so get. The paper needs predictions on
images that were not trained on, and test images are. It counts a label as an issue where another class passes its own
threshold. Here the label's probability falls short of its threshold: a network that is nearly always certain has
thresholds that many of its certain mistakes miss. Of labels exchanged in digits the former found 70 %, the latter 90 %,
with no other labels by good networks, and by weak ones with some more (27 against 18 % of what was found).

Only mistakes have a rank: where the network predicts the label, nothing contradicts it enough.
"""

from typing import NamedTuple

import numpy as np

from cifar.explain.findings import DECIMALS, Findings, Float, Int64, UInt8

LEAST = 0.9  # doubt from which on a label counts as in doubt


class Doubts(NamedTuple):
    """How much each mistake's label is contradicted: 0 not at all, 1 by all."""

    parts: dict[str, Float]  # network, and with the flags neighbours, runs -> [m]
    doubt: Float  # [m] the mean of the parts
    rank: Int64  # [m] 1 for the label most in doubt; 0 where it is not in doubt


def measure(findings: Findings) -> Doubts:
    """For all mistakes, in their order."""
    mistakes = findings.mistakes.indices
    labels = findings.labels[mistakes]
    parts = {"network": shortfall(findings.probabilities, findings.labels)[mistakes]}
    if findings.neighbours:
        parts["neighbours"] = contradicting(findings.neighbours.nearest_labels, labels)
    if findings.wrong_in:
        others = np.stack([wrong[mistakes] for wrong in findings.wrong_in.values()])
        parts["runs"] = np.asarray(others.mean(axis=0), np.float32)
    doubt = np.asarray(np.stack(list(parts.values())).mean(axis=0).round(DECIMALS), np.float32)
    return Doubts(parts, doubt, rank(doubt))


def thresholds(probabilities: Float, labels: UInt8) -> Float:
    """For each class the mean probability [C] that images labelled so get; 0 for a class without images."""
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=classes)
    means: Float = (np.bincount(labels, own, minlength=classes) / np.maximum(counts, 1)).astype(np.float32)
    return means


def shortfall(probabilities: Float, labels: UInt8) -> Float:
    """By what part each label's probability falls short of its class's threshold [n]: 0 where it reaches it."""
    own = probabilities[np.arange(len(labels)), labels]
    usual = thresholds(probabilities, labels)[labels]
    return np.asarray(1 - np.minimum(1, own / np.maximum(usual, np.finfo(np.float32).tiny)), np.float32)


def contradicting(nearest_labels: UInt8, labels: UInt8) -> Float:
    """The share [m] of each image's nearest training images, with labels [m, v], that have another label than it."""
    return np.asarray((nearest_labels != labels[:, None]).mean(axis=1), np.float32)


def rank(doubt: Float) -> Int64:
    """Counted from 1, the greatest doubt [m] first, then in their order; 0 for what is less than LEAST."""
    order = np.argsort(-doubt, kind="stable")
    places = np.empty(len(doubt), np.int64)
    places[order] = np.arange(1, len(doubt) + 1)
    return np.where(doubt >= np.float32(LEAST), places, 0)
