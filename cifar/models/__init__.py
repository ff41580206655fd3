"""Networks, one per file, found by name: `cifar/models/<name>.py` has `build(classes, dropout)`.

A network has `early_layers` (see `freeze`) and `explainable_layers` (see explain/layers.py). One whose initial weights
depend on the images has a method `init_from_data` (see `create`).
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from cifar.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


def names() -> list[str]:
    """Lists the networks there are, without importing any of them (nor torch)."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(name: str, classes: int, dropout: float) -> "nn.Module":
    """Builds the named network, freshly initialised from torch's global generator.

    Raises UserError for an unknown name.
    """
    if name not in names():
        raise UserError(f"network {name!r} is unknown; choose one of: {', '.join(names())}")
    network: nn.Module = importlib.import_module(f"{__name__}.{name}").build(classes, dropout)
    return network


def create(name: str, classes: int, dropout: float, seed: int, images: "torch.Tensor") -> "nn.Module":
    """Builds the named network on the images' device, channels-last, initialised from the seed.

    One that depends on the data is also initialised from the images: normalised training images [n, 3, h, w].
    """
    import torch

    torch.manual_seed(seed)
    network = build(name, classes, dropout)
    network.to(device=images.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    initialise = getattr(network, "init_from_data", None)
    if initialise is not None:
        initialise(images)
    return network


def freeze(network: "nn.Module") -> None:
    """Freezes the early layers, so that the backward pass ends above them.

    Early layers converge first (A. Brock and others, FreezeOut, arXiv 1706.04983). `whitened` then needs 0.81 of the
    multiply-adds per step.
    """
    for name in network.early_layers:  # type: ignore[union-attr]
        network.get_submodule(name).requires_grad_(False)
