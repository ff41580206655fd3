"""Attribution maps and votes of test images, for report and figures."""

import numpy as np
import torch
from torch import nn

from cifar.data.augment import normalize
from cifar.data.cache import Data
from cifar.explain import layers, maps, votes
from cifar.explain.findings import ExplainedImages, Int64, UInt8


def tensor(data: Data, indices: Int64, device: torch.device) -> torch.Tensor:
    """Returns normalised test images, float32 [n, 3, 32, 32]."""
    return normalize(torch.from_numpy(data.test_images[indices]).to(device), data.mean, data.std)


def attributions(
    network: nn.Module, data: Data, indices: Int64, targets: UInt8, method: str, layer: str, last_stage: str
) -> ExplainedImages:
    """Returns maps at `layer` for the two classes `targets` [n, 2] of each test image, and votes at the last stage.

    The network is float32 and in evaluation mode, see maps.compute.
    """
    images = tensor(data, indices, next(network.parameters()).device)
    classes = torch.from_numpy(targets.astype(np.int64)).to(images.device)
    raw, _ = maps.compute(network, layer, method, images, maps.one_hot(classes, len(data.classes)))
    counted, biases, margins = votes.compute(network, last_stage, images, classes)
    names = data.files("test")
    return ExplainedImages(
        indices=indices,
        pictures=data.test_images[indices],
        files=[names[index] for index in indices] if names else [],
        targets=targets,
        maps=np.maximum(raw, 0),
        peaks=raw.max(axis=(2, 3)),
        votes=counted,
        bias=biases,
        margins=margins,
        map_grid=layers.grid(network, layer),
        vote_grid=layers.grid(network, last_stage),
    )
