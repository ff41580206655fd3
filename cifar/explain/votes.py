"""The vote map: how much each cell of the last stage added to the margin between two classes.

Only pooling and a linear layer lie between the last stage and the logits. Each logit is therefore a sum over cells plus
a bias, and HiResCAM (gradient times activation, Draelos and Carin, arXiv 2011.08891) with the difference of two logits
as its objective gives exactly the terms: they add up to the margin less the difference of the biases. Grad-CAM averages
gradients over cells first, so its map does not add up to anything.
"""

import numpy as np
import torch
from torch import nn

from cifar.explain import maps
from cifar.explain.findings import Float


def compute(network: nn.Module, layer: str, images: torch.Tensor, targets: torch.Tensor) -> tuple[Float, Float, Float]:
    """Returns votes [n, h, w] at the last stage `layer`, biases [n] and margins [n].

    A margin is the logit of class `targets[:, 0]` less that of `targets[:, 1]`, and the sum of votes and bias.
    """
    classes = bias(network, layer, images.new_zeros(1, *images.shape[1:]))
    objective = maps.one_hot(targets[:, :1], len(classes)) - maps.one_hot(targets[:, 1:], len(classes))
    votes, logits = maps.compute(network, layer, "hirescam", images, objective)
    numbers = targets.cpu().numpy()
    rows = np.arange(len(numbers))
    biases = classes[numbers[:, 0]] - classes[numbers[:, 1]]
    margins = logits[rows, numbers[:, 0]] - logits[rows, numbers[:, 1]]
    return votes[:, 0], biases, margins


def bias(network: nn.Module, layer: str, image: torch.Tensor) -> Float:
    """Returns the logits [C] if every activation at `layer` is zero."""
    hook = network.get_submodule(layer).register_forward_hook(lambda _module, _inputs, output: torch.zeros_like(output))
    try:
        with torch.no_grad():
            logits: Float = network(image)[0].cpu().numpy()
    finally:
        hook.remove()
    return logits
