"""One optimizer step's gradients, and one evaluation: what every precision and world size goes through.

Precision is in `model` already: Accelerator.prepare has put the launcher's autocast around its forward.
"""

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
from cifar.data.augment import normalize
from cifar.data.cache import Data
from cifar.recipes import Recipe

EVALUATION_BATCH = 500  # images of a process at a time: little memory beside a training step's


class Totals(NamedTuple):
    """A global batch's figures, the same on all ranks. `stop` is true once any rank was asked to stop."""

    loss: float  # mean over the batch
    correct: int
    stop: bool


class Evaluation(NamedTuple):
    """Probabilities float32 [n, classes] in the order of the test images, mean cross-entropy, and accuracy."""

    probabilities: npt.NDArray[np.float32]
    loss: float
    accuracy: float


def accumulate_gradients(
    accelerator: Accelerator,
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    recipe: Recipe,
) -> Totals:
    """Leaves the mean gradient of the global batch in the parameters.

    `images` and `labels` are this rank's share. It is worked through in the recipe's number of accumulation steps,
    and the ranks' gradients are averaged once, during the last one's backward pass.
    """
    parts = recipe.gradient_accumulation_steps
    loss_sum = torch.zeros((), device=accelerator.device)
    correct = torch.zeros((), device=accelerator.device)
    for part, (piece, piece_labels) in enumerate(zip(images.chunk(parts), labels.chunk(parts), strict=True), start=1):
        with nullcontext() if part == parts else accelerator.no_sync(model):
            logits = model(piece)
            loss = F.cross_entropy(logits, piece_labels, label_smoothing=recipe.label_smoothing) / parts
            accelerator.backward(loss)
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


def evaluate(accelerator: Accelerator, network: nn.Module, data: Data) -> Evaluation | None:
    """Judges every test image exactly once, spread over the ranks; None if any rank was asked to stop meanwhile.

    All ranks use rank 0's batch-norm statistics, which are also the ones that are saved.
    """
    for buffer in network.buffers():
        broadcast(buffer)
    count, ranks = len(data.test_labels), accelerator.num_processes
    mine = np.arange(accelerator.process_index, count, ranks)
    # Padded to the same number of batches on all ranks, since each batch is followed by a collective.
    batches = -(-count // (ranks * EVALUATION_BATCH))
    results = [torch.empty(0, len(data.classes) + 1, device=accelerator.device)]
    network.eval()
    try:
        for batch in range(batches):
            indices = mine[batch * EVALUATION_BATCH : (batch + 1) * EVALUATION_BATCH]
            if len(indices):
                images = torch.from_numpy(data.test_images[indices]).to(accelerator.device)
                labels = torch.from_numpy(data.test_labels[indices].astype(np.int64)).to(accelerator.device)
                with torch.no_grad():
                    log_probabilities = network(normalize(images, data.mean, data.std)).float().log_softmax(dim=1)
                losses = F.nll_loss(log_probabilities, labels, reduction="none")
                results.append(torch.cat((losses[:, None], log_probabilities.exp()), dim=1))
            failure.beat()
            if launch.any_rank(accelerator, bool(stop.requested())):
                return None
    finally:
        network.train()
    indices = accelerator.gather(
        accelerator.pad_across_processes(torch.from_numpy(mine).to(accelerator.device), pad_index=-1)
    )
    rows = accelerator.gather(accelerator.pad_across_processes(torch.cat(results)))
    order = indices.argsort()[-count:]  # what was padded has index -1 and sorts to the front
    judged = int((indices >= 0).sum())
    if judged != count or not torch.equal(indices[order].cpu(), torch.arange(count)):
        raise AssertionError(f"{judged} predictions for {count} test images: not every one exactly once")
    losses_and_probabilities = rows[order].cpu().numpy()
    probabilities = np.ascontiguousarray(losses_and_probabilities[:, 1:])
    accuracy = float((probabilities.argmax(axis=1) == data.test_labels).mean())
    return Evaluation(probabilities, float(losses_and_probabilities[:, 0].mean(dtype=np.float64)), accuracy)
