"""Distributed evaluation: every test image is evaluated exactly once, over all ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F
from torch.profiler import record_function

from cifar import failure, profiling, ranks, stop
from cifar.data.augment import normalize, resize
from cifar.data.cache import Data

EVALUATION_BATCH = 500  # images per process and forward pass: needs little memory beside a training step's
# Batches between checks for stop requests, by device type: about one check per second.
STOP_EVERY = {"cpu": 1, "cuda": 64}


class View(NamedTuple):
    """A view for TTA: shifted by `shift` pixels down and right, resized to `size` pixels a side, mirrored or not."""

    shift: int
    size: int
    mirrored: bool


# Three shifts, as in airbench94, and two smaller sizes. On a held-out tenth of the training images the three shifts
# alone scored 0.16 points less (three runs of `speedrun`), five shifts without the sizes 0.11 less.
VIEWS = tuple(
    View(*place, mirrored) for place in ((0, 32), (-1, 32), (1, 32), (0, 28), (0, 24)) for mirrored in (False, True)
)


class Evaluation(NamedTuple):
    """Probabilities float32 [n, classes] in the order of the test images, mean cross-entropy, and accuracy.

    `accuracy_tta` is the accuracy with test-time augmentation, where that was asked for.
    """

    probabilities: npt.NDArray[np.float32]
    loss: float
    accuracy: float
    accuracy_tta: float | None


@record_function(profiling.EVALUATION)
def evaluate(
    accelerator: Accelerator, network: nn.Module, images: torch.Tensor, data: Data, tta: bool = False
) -> Evaluation | None:
    """Evaluates every test image exactly once, spread over the ranks; None if any rank was asked to stop meanwhile.

    `images` are the test images, uint8 [n, 32, 32, 3], ideally on the device already. With `tta`, the least confident
    quarter is then evaluated again, by the mean logits of `VIEWS`. For the other three quarters test-time augmentation
    hardly ever changes anything (github.com/hiverge/cifar10-speedrun).
    """
    labels = data.test_labels.astype(np.int64)
    log_probabilities = _predict(accelerator, network, images, data, np.arange(len(labels)), VIEWS[:1])
    if log_probabilities is None:
        return None
    loss = float(-log_probabilities[np.arange(len(labels)), labels].mean(dtype=np.float64))
    predicted = log_probabilities.argmax(axis=1)
    accuracy, accuracy_tta = float((predicted == labels).mean()), None
    if tta:
        unsure = np.sort(log_probabilities.max(axis=1).argsort(kind="stable")[: len(labels) // 4])
        again = _predict(accelerator, network, images, data, unsure, VIEWS)
        if again is None:
            return None
        predicted[unsure] = again.argmax(axis=1)
        accuracy_tta = float((predicted == labels).mean())
    return Evaluation(np.exp(log_probabilities), loss, accuracy, accuracy_tta)


def evaluate_whole(accelerator: Accelerator, network: nn.Module, images: torch.Tensor, data: Data) -> Evaluation:
    """Evaluates like `evaluate`, but never returns None.

    It is for programs that a stop signal ends at once, as explain.py.
    """
    evaluated = evaluate(accelerator, network, images, data)
    if evaluated is None:
        raise AssertionError("an evaluation ends early only where stop requests are caught")
    return evaluated


def rank_indices(accelerator: Accelerator, count: int) -> npt.NDArray[np.int64]:
    """Returns the indices, out of `count`, of the images that this rank evaluates."""
    return np.arange(accelerator.process_index, count, accelerator.num_processes)


def _predict(
    accelerator: Accelerator,
    network: nn.Module,
    images: torch.Tensor,
    data: Data,
    chosen: npt.NDArray[np.int64],
    views: Sequence[View],
) -> npt.NDArray[np.float32] | None:
    """Returns log-probabilities [n, classes] of the test images `chosen` [n], by the mean over the views.

    Each image is evaluated once. All ranks use rank 0's batch-norm statistics, which are also the ones that are saved.
    Only the stop requests and the results are read from the device.
    """
    for buffer in network.buffers():
        broadcast(buffer)
    count, own = len(chosen), rank_indices(accelerator, len(chosen))
    # Padded with -1 to the same length on all ranks.
    mine = np.full(-(-count // accelerator.num_processes), -1)
    mine[: len(own)] = own
    index = torch.from_numpy(chosen[own]).to(images.device)
    rows = torch.zeros(len(mine), len(data.classes), device=accelerator.device)
    batches = range(0, len(mine), EVALUATION_BATCH)
    network.eval()
    try:
        for number, begin in enumerate(batches, start=1):
            part = index[begin : begin + EVALUATION_BATCH]
            if len(part):
                normalized = normalize(images[part].to(accelerator.device), data.mean, data.std)
                with torch.no_grad():
                    logits = [network(apply_view(normalized, view)).float() for view in views]
                rows[begin : begin + len(part)] = torch.stack(logits).mean(dim=0).log_softmax(dim=1)
            failure.step_progressed()
            look = number % STOP_EVERY[accelerator.device.type] == 0 or number == len(batches)
            if look and ranks.any_rank(accelerator, bool(stop.requested())):
                return None
    finally:
        network.train()
    # Each row carries its image's index, so that completeness can be checked.
    places = torch.from_numpy(mine).to(rows)[:, None]
    gathered = accelerator.gather(torch.cat((places, rows), dim=1)).cpu().numpy()
    gathered = gathered[gathered[:, 0] >= 0]
    gathered = gathered[gathered[:, 0].argsort()]
    if not np.array_equal(gathered[:, 0], np.arange(count)):
        raise AssertionError(f"{len(gathered)} predictions for {count} test images: not every one exactly once")
    return np.ascontiguousarray(gathered[:, 1:])


def apply_view(images: torch.Tensor, view: View) -> torch.Tensor:
    """Applies a view to normalised images [n, 3, h, w]; shifts reflect at the edges."""
    if view.shift:
        side = images.shape[-1]
        begin = 1 - view.shift
        images = F.pad(images, (1, 1, 1, 1), mode="reflect")[..., begin : begin + side, begin : begin + side]
    images = resize(images, view.size)
    return images.flip(-1) if view.mirrored else images
