"""Robustness: accuracy on corrupted test images, see corruptions.py."""

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from torch import nn

from cifar import cores, evaluation
from cifar.data.cache import Data
from cifar.data.waiting import ProgressBar
from cifar.evaluation import Evaluation
from cifar.explain import corruptions, runs
from cifar.explain.corruptions import KINDS, SEVERITIES
from cifar.explain.findings import DECIMALS, FLIPS, Flip, Float, Int64, Robustness, UInt8
from cifar.ranks import raise_on_all_ranks

PART = 250  # images that a thread corrupts at a time
AHEAD = 1  # corrupted sets that are prepared while the networks see the one before


class ComparedNetwork(NamedTuple):
    """A network, in the launcher's precision, and the images with its normalisation."""

    name: str
    network: nn.Module
    data: Data


def load(accelerator: Accelerator, others: list[runs.Run], data: Data) -> list[ComparedNetwork]:
    """Loads other runs' networks. Raises UserError where they were trained on other classes, or cannot be loaded."""
    with raise_on_all_ranks(accelerator):
        loaded = [
            ComparedNetwork(str(run.path), runs.load(run, accelerator.device), runs.as_trained(data, run))
            for run in others
        ]
    for one in loaded:
        accelerator.prepare_model(one.network, evaluation_mode=True)
    return loaded


def measure(
    accelerator: Accelerator,
    explained: ComparedNetwork,
    uncorrupted: Evaluation,
    others: list[ComparedNetwork],
    seed: int,
) -> Robustness:
    """Evaluates the explained run's network, and others, on the test images with each corruption.

    `uncorrupted` is the explained run's evaluation on clean images. Each rank corrupts only the images that it
    evaluates, so each is corrupted and evaluated once.
    """
    data, kinds, competitors = explained.data, list(KINDS), [explained, *others]
    count = len(data.test_labels)
    clean = [uncorrupted, *(_evaluate(accelerator, one, torch.from_numpy(data.test_images)) for one in others)]
    accuracy = np.zeros((len(competitors), len(kinds), SEVERITIES))
    predictions = np.zeros((len(kinds), SEVERITIES, count), np.uint8)  # of the first, as its confidences
    confidences = np.zeros(predictions.shape, np.float32)
    progress = ProgressBar("evaluating corrupted images", "images", accuracy.size * count)
    with progress, closing(_corrupted(accelerator, data, seed)) as corrupted:
        for kind, severity, images in corrupted:
            place = kinds.index(kind), severity - 1
            evaluated = [_evaluate(accelerator, one, images, progress) for one in competitors]
            accuracy[:, *place] = [of_one.accuracy for of_one in evaluated]
            predictions[place] = evaluated[0].probabilities.argmax(axis=1)
            confidences[place] = evaluated[0].probabilities.max(axis=1)
    unbroken = uncorrupted.probabilities.argmax(axis=1) == data.test_labels
    return Robustness(
        seed=seed,
        kinds=kinds,
        runs=[one.name for one in competitors],
        clean=np.array([of_one.accuracy for of_one in clean]),
        accuracy=accuracy,
        flips=[
            flip
            for kind, predicted, confident in zip(kinds, predictions, confidences, strict=True)
            for flip in flips(kind, predicted, confident, unbroken, data, seed)
        ],
    )


def flips(
    kind: str, predictions: UInt8, confidences: Float, unbroken: npt.NDArray[np.bool_], data: Data, seed: int
) -> list[Flip]:
    """Finds the images that a corruption flips first, of those [n] classified correctly without it: `unbroken`.

    `predictions` and `confidences` are [SEVERITIES, n]. The least severity comes first, then the highest confidence.
    """
    wrong = (predictions != data.test_labels) & unbroken
    severity = wrong.argmax(axis=0) + 1  # the first at which it is wrong, for those that ever are
    turned = np.flatnonzero(wrong.any(axis=0))
    confidence = confidences[severity[turned] - 1, turned].round(DECIMALS)
    found = turned[np.lexsort((turned, -confidence, severity[turned]))][:FLIPS]
    return [
        Flip(
            kind=kind,
            severity=int(severity[image]),
            image=int(image),
            picture=corruptions.corrupt(kind, int(severity[image]), clean[None], np.array([image]), seed)[0],
            clean=clean,
            predicted=int(predictions[severity[image] - 1, image]),
            confidence=float(confidences[severity[image] - 1, image]),
        )
        for image, clean in zip(found, np.array(data.test_images[found]), strict=True)
    ]


def _evaluate(
    accelerator: Accelerator, one: ComparedNetwork, images: torch.Tensor, progress: ProgressBar | None = None
) -> Evaluation:
    evaluated = evaluation.evaluate_whole(accelerator, one.network, images, one.data)
    if progress:
        progress.done += len(images)
        progress.look()
    return evaluated


def _corrupted(accelerator: Accelerator, data: Data, seed: int) -> Generator[tuple[str, int, torch.Tensor], None, None]:
    """Yields for each kind and severity the test images, corrupted only where this rank evaluates them."""
    own = evaluation.rank_indices(accelerator, len(data.test_labels))
    parts = [own[begin : begin + PART] for begin in range(0, len(own), PART)]
    threads = ThreadPoolExecutor(max(1, cores.of_job() // cores.local_processes()), "corruption")
    waiting: deque[tuple[str, int, list[Future[UInt8]]]] = deque()
    try:
        for kind, severity in product(KINDS, range(1, SEVERITIES + 1)):
            waiting.append((kind, severity, [threads.submit(_corrupt, kind, severity, data, p, seed) for p in parts]))
            if len(waiting) > AHEAD:
                yield _collected(*waiting.popleft(), data, parts)
        while waiting:
            yield _collected(*waiting.popleft(), data, parts)
    finally:
        threads.shutdown(cancel_futures=True)


def _corrupt(kind: str, severity: int, data: Data, part: Int64, seed: int) -> UInt8:
    return corruptions.corrupt(kind, severity, data.test_images[part], part, seed)


def _collected(
    kind: str, severity: int, futures: list[Future[UInt8]], data: Data, parts: list[Int64]
) -> tuple[str, int, torch.Tensor]:
    images = np.zeros(data.test_images.shape, np.uint8)
    for part, future in zip(parts, futures, strict=True):
        images[part] = future.result()
    return kind, severity, torch.from_numpy(images)
