"""Class activation maps through the grad-cam package: batched, signed, and not rescaled.

The package's own call clips and rescales each map to 0..1, so an empty map looks like a full one and maps cannot be
compared. Here its methods get activations and gradients, and their raw output is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from cifar import failure
from cifar.explain.findings import Float

if TYPE_CHECKING:  # the command line lists the methods before torch has loaded
    import torch
    from torch import nn

# The maps' methods, and the class of the grad-cam package that makes each. A new method is one more entry.
METHODS = {
    "gradcam": "GradCAM",
    "gradcam++": "GradCAMPlusPlus",
    "hirescam": "HiResCAM",
    "layercam": "LayerCAM",
    "eigencam": "EigenCAM",
}
OF_NO_CLASS = ("eigencam",)  # the methods whose map is the same for every class
BATCH = 128  # images; more is not faster


def one_hot(targets: "torch.Tensor", classes: int) -> "torch.Tensor":
    """Returns the objectives that are the logits of classes: int64 [n, k] to float32 [n, k, classes]."""
    from torch.nn import functional as F

    return F.one_hot(targets, classes).float()


def compute(
    network: "nn.Module", layer: str, method: str, images: "torch.Tensor", objectives: "torch.Tensor"
) -> tuple[Float, Float]:
    """Returns maps [n, k, h, w] and logits [n, C] of normalised images [n, 3, 32, 32] at a layer with h x w cells.

    Map j of an image says what raised or lowered the sum of its logits weighted by `objectives` [n, k, C]: see
    `one_hot`. The network has to be float32, not compiled and without autocast; it is left as it was: modes, gradients,
    hooks. Two threads must not share one network.
    """
    import pytorch_grad_cam  # takes seconds, and loads scikit-learn and OpenCV
    import torch

    module = network.get_submodule(layer)
    maps, logits = [], []
    with _cam_mode(network, module):
        cam = getattr(pytorch_grad_cam, METHODS[method])(network, [module])
        recorder = cam.activations_and_grads
        try:
            for batch, objective in zip(torch.split(images, BATCH), torch.split(objectives, BATCH), strict=True):
                output = recorder(batch)
                activations = recorder.activations[0].numpy()
                made = []
                # A method without gradients has one map for all objectives.
                for weights in objective.unbind(dim=1)[: None if cam.uses_gradients else 1]:
                    recorder.gradients = []
                    (output * weights).sum().backward(retain_graph=True)
                    gradients = recorder.gradients[0].numpy()
                    signed = cam.get_cam_image(batch, module, None, activations, gradients, eigen_smooth=False)
                    signed = signed.reshape(len(batch), *activations.shape[2:])
                    made.append(_oriented(signed, activations) if method in OF_NO_CLASS else signed)
                maps.append(np.stack(made, axis=1).repeat(objective.shape[1] // len(made), axis=1))
                logits.append(output.detach().cpu().numpy())
                failure.report_progress()
        finally:
            recorder.release()
    return np.concatenate(maps).astype(np.float32), np.concatenate(logits)


def _oriented(maps: Float, activations: Float) -> Float:
    """Returns maps [n, h, w] with the sign that makes each correlate with its activations' [n, c, h, w] norm.

    A principal component has none of its own: the same image, with noise that cannot be seen, may have the opposite.
    """
    norms = np.linalg.norm(activations, axis=1)
    norms -= norms.mean(axis=(1, 2), keepdims=True)
    return np.where((maps * norms).sum(axis=(1, 2), keepdims=True) < 0, -maps, maps)


@contextmanager
def _cam_mode(network: "nn.Module", module: "nn.Module") -> Iterator[None]:
    """Runs the block in evaluation mode, with gradients only above `module`; restores the network afterwards.

    Gradients with respect to weights and to what is below would be computed for nothing. Layers that work in place
    would overwrite the activations that the package has stored.
    """
    import torch

    modes = [(part, part.training) for part in network.modules()]
    in_place: list[Any] = [part for part in network.modules() if getattr(part, "inplace", False)]
    frozen = [(parameter, parameter.requires_grad) for parameter in network.parameters()]
    hook = module.register_forward_hook(lambda _module, _inputs, output: output.detach().requires_grad_())
    try:
        network.eval().requires_grad_(False)
        for part in in_place:
            part.inplace = False
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for part in in_place:
            part.inplace = True
        for parameter, wanted in frozen:
            parameter.requires_grad_(wanted)
        for part, training in modes:
            part.training = training
