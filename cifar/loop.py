"""One optimizer step's gradients, and one evaluation: what every precision and world size goes through.

Precision is in `model` already: Accelerator.prepare has put the launcher's autocast around its forward.
"""

import socket
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from torch.nn import functional as F

from cifar import failure, launch, stop
from cifar.data.augment import normalize, resize
from cifar.data.cache import Data
from cifar.errors import UserError
from cifar.recipes import Recipe

EVALUATION_BATCH = 500  # images of a process at a time: little memory beside a training step's


class View(NamedTuple):
    """How a test image is shown: moved by `shift` pixels down and right, `size` pixels a side, mirrored or not."""

    shift: int
    size: int
    mirrored: bool


# Three places, as in airbench94, and two sizes below. On a held-out tenth of the training images the three places alone
# gave 0.16 points less (three runs of `speedrun`), five places without the sizes 0.11 less.
VIEWS = tuple(
    View(*place, mirrored) for place in ((0, 32), (-1, 32), (1, 32), (0, 28), (0, 24)) for mirrored in (False, True)
)


class Totals(NamedTuple):
    """A global batch's figures, the same on all ranks. `stop` is true once any rank was asked to stop."""

    loss: float  # mean over the batch
    correct: int
    stop: bool


class Evaluation(NamedTuple):
    """Probabilities float32 [n, classes] in the order of the test images, mean cross-entropy, and accuracy.

    `accuracy_of_views` is the accuracy with test-time augmentation, where that was asked for.
    """

    probabilities: npt.NDArray[np.float32]
    loss: float
    accuracy: float
    accuracy_of_views: float | None


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
) -> Totals:
    """Leaves the mean gradient of the global batch in the parameters.

    `images` and `labels` are this rank's share. It is worked through in the recipe's number of accumulation steps,
    and the ranks' gradients are averaged once, during the last one's backward pass. Raises UserError where the device
    has not enough memory.
    """
    parts = recipe.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    correct = torch.zeros((), device=accelerator.device)
    for part, (piece, piece_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
        with nullcontext() if part == parts else accelerator.no_sync(model):
            try:
                logits = model(piece)
                loss = F.cross_entropy(logits, piece_labels, label_smoothing=recipe.label_smoothing) / parts
                accelerator.backward(loss)
            except torch.OutOfMemoryError:
                who = f"rank {accelerator.process_index} on {socket.gethostname()}"
                raise UserError(
                    f"{who} is out of memory with {len(piece)} images at a time; "
                    f"give --gradient-accumulation-steps {2 * parts}, in a new --run, or more processes"
                ) from None
        loss_sum += loss.detach()
        correct += (logits.argmax(dim=1) == piece_labels).sum()
        failure.beat()

    # One small all-reduce carries the figures and the stop request, so that all ranks act on the same ones.
    asked = torch.tensor(float(bool(stop.requested())), device=accelerator.device)
    totals = accelerator.reduce(torch.stack((loss_sum, correct, asked)), reduction="sum").tolist()
    return Totals(totals[0] / accelerator.num_processes, round(totals[1]), totals[2] > 0)


def gradient_norm(accelerator: Accelerator, network: nn.Module) -> float:
    """The L2 norm of all gradients together, unscaled. Call it between backward and the optimizer's step."""
    accelerator.unscale_gradients()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients).item()


def evaluate(accelerator: Accelerator, network: nn.Module, data: Data, views: bool = False) -> Evaluation | None:
    """Judges every test image exactly once, spread over the ranks; None if any rank was asked to stop meanwhile.

    With `views`, the least sure quarter is then judged again, by the mean logits of `VIEWS`. For the other three
    quarters a second look hardly ever changes anything (github.com/hiverge/cifar10-speedrun).
    """
    labels = data.test_labels.astype(np.int64)
    log_probabilities = _judge(accelerator, network, data, np.arange(len(labels)), VIEWS[:1])
    if log_probabilities is None:
        return None
    loss = float(-log_probabilities[np.arange(len(labels)), labels].mean(dtype=np.float64))
    predicted = log_probabilities.argmax(axis=1)
    accuracy, accuracy_of_views = float((predicted == labels).mean()), None
    if views:
        unsure = np.sort(log_probabilities.max(axis=1).argsort(kind="stable")[: len(labels) // 4])
        again = _judge(accelerator, network, data, unsure, VIEWS)
        if again is None:
            return None
        predicted[unsure] = again.argmax(axis=1)
        accuracy_of_views = float((predicted == labels).mean())
    return Evaluation(np.exp(log_probabilities), loss, accuracy, accuracy_of_views)


def _judge(
    accelerator: Accelerator, network: nn.Module, data: Data, chosen: npt.NDArray[np.int64], views: Sequence[View]
) -> npt.NDArray[np.float32] | None:
    """Log-probabilities [n, classes] of the test images `chosen` [n], each judged once, by the mean over the views.

    All ranks use rank 0's batch-norm statistics, which are also the ones that are saved.
    """
    for buffer in network.buffers():
        broadcast(buffer)
    count, ranks = len(chosen), accelerator.num_processes
    mine = np.arange(accelerator.process_index, count, ranks)
    # Padded to the same number of batches on all ranks, since each batch is followed by a collective.
    batches = -(-count // (ranks * EVALUATION_BATCH))
    results = [torch.empty(0, len(data.classes), device=accelerator.device)]
    network.eval()
    try:
        for batch in range(batches):
            places = mine[batch * EVALUATION_BATCH : (batch + 1) * EVALUATION_BATCH]
            if len(places):
                bytes_ = torch.from_numpy(data.test_images[chosen[places]]).to(accelerator.device)
                images = normalize(bytes_, data.mean, data.std)
                with torch.no_grad():
                    logits = [network(seen(images, view)).float() for view in views]
                results.append(torch.stack(logits).mean(dim=0).log_softmax(dim=1))
            failure.beat()
            if launch.any_rank(accelerator, bool(stop.requested())):
                return None
    finally:
        network.train()
    places = accelerator.gather(
        accelerator.pad_across_processes(torch.from_numpy(mine).to(accelerator.device), pad_index=-1)
    )
    rows = accelerator.gather(accelerator.pad_across_processes(torch.cat(results)))
    order = places.argsort()[-count:]  # what was padded has place -1 and sorts to the front
    judged = int((places >= 0).sum())
    if judged != count or not torch.equal(places[order].cpu(), torch.arange(count)):
        raise AssertionError(f"{judged} predictions for {count} test images: not every one exactly once")
    return np.ascontiguousarray(rows[order].cpu().numpy())


def seen(images: torch.Tensor, view: View) -> torch.Tensor:
    """Normalised images [n, 3, h, w] as the view has them; what lies beyond an edge is the mirror image."""
    if view.shift:
        side = images.shape[-1]
        begin = 1 - view.shift
        images = F.pad(images, (1, 1, 1, 1), mode="reflect")[..., begin : begin + side, begin : begin + side]
    images = resize(images, view.size)
    return images.flip(-1) if view.mirrored else images
