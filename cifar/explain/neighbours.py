"""The nearest training images of each mistake, to spot label errors and gaps in the training set.

And, from pixels alone: test images that have a near-duplicate among the training images (ciFAIR, arXiv 1902.00423,
found one for 3.25 % of CIFAR-10's), and the accuracy without them.
"""

import numpy as np
import torch
from torch import nn

from cifar.data.augment import normalize
from cifar.data.cache import Data
from cifar.explain.findings import ALIKE, EQUAL, STANDS_OUT, Float, Int64, Neighbours, UInt8

OF_EACH = 2  # nearest training images of the predicted class, and as many of the true class
NONE = -1  # where a class has fewer
NEAREST = 10  # training images, of whatever class, whose labels are compared with the mistake's
BATCH = 500


def find(network: nn.Module, data: Data, wrong: Int64, predictions: UInt8) -> Neighbours:
    """Goes once over the training images. The network is in evaluation mode; `predictions` [n] are of the test."""
    training, test = (_features(network, images, data) for images in (data.train_images, data.test_images))
    labels = torch.from_numpy(data.train_labels.astype(np.int64)).to(training.device)

    nearest, distances, nearest_labels = [], [], []
    for image in wrong:
        similar = training @ test[image]
        nearest_labels.append(data.train_labels[similar.topk(min(NEAREST, len(training))).indices.cpu().numpy()])
        picked = []
        for name in (int(predictions[image]), int(data.test_labels[image])):
            of_class = (labels == name).nonzero()[:, 0]
            picked.append(of_class[similar[of_class].topk(min(OF_EACH, len(of_class))).indices])
        rows = torch.cat(picked)
        rows = rows[similar[rows].argsort(descending=True)]
        missing = (0, 2 * OF_EACH - len(rows))
        nearest.append(np.pad(rows.cpu().numpy(), missing, constant_values=NONE))
        distances.append(np.pad((1 - similar[rows]).cpu().numpy(), missing))
    indices = np.array(nearest, np.int64).reshape(len(wrong), 2 * OF_EACH)

    duplicates = near_duplicates(data, training.device)
    others = np.setdiff1d(np.arange(len(test)), duplicates)
    return Neighbours(
        indices=indices,
        labels=data.train_labels[indices],
        distances=np.array(distances, np.float32).reshape(indices.shape),
        nearest_labels=np.array(nearest_labels, np.uint8).reshape(len(wrong), min(NEAREST, len(training))),
        pictures=data.train_images[indices],
        near_duplicates=duplicates,
        accuracy_without_duplicates=(
            float((predictions[others] == data.test_labels[others]).mean()) if len(others) else None
        ),
    )


def _features(network: nn.Module, images: UInt8, data: Data) -> torch.Tensor:
    """Returns the input of the linear head for each image, [n, features], scaled to length 1."""
    head = [part for part in network.modules() if isinstance(part, nn.Linear)][-1]
    seen: list[torch.Tensor] = []
    hook = head.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].float()))
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            for start in range(0, len(images), BATCH):
                batch = torch.from_numpy(np.array(images[start : start + BATCH])).to(device)
                network(normalize(batch, data.mean, data.std))
    finally:
        hook.remove()
    return nn.functional.normalize(torch.cat(seen))


def near_duplicates(data: Data, device: torch.device) -> Int64:
    """Returns the test images whose pixels are nearly those of a training image, see ALIKE."""
    test = torch.from_numpy(_centred(data.test_images)).to(device)
    nearest = test.new_empty(len(test), 0)  # the three greatest correlations so far
    for start in range(0, len(data.train_images), BATCH):
        training = torch.from_numpy(_centred(data.train_images[start : start + BATCH])).to(device)
        nearest = torch.cat((nearest, test @ training.T), dim=1)
        nearest = nearest.topk(min(3, nearest.shape[1])).values
    distances = 1 - nearest
    limits = (distances[:, -1] * STANDS_OUT).clamp(1 - EQUAL, 1 - ALIKE)
    return (distances[:, 0] <= limits).nonzero()[:, 0].cpu().numpy()


def _centred(images: UInt8) -> Float:
    """Returns pixels [n, values], centred and scaled to length 1: dot products are correlations."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    flat /= np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)
    return flat
