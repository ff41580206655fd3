"""Networks, one per file, found by name: `cifar/models/<name>.py` has `build(classes, dropout)`.

A network names the modules that it begins with in `beginning` (see `freeze` below); one whose beginning depends on the
images has a method `fit` (see `fit` below).
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from cifar.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn


def names() -> list[str]:
    """The networks there are, without importing any of them (nor torch)."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def build(name: str, classes: int, dropout: float) -> "nn.Module":
    """The named network, freshly initialised from torch's global generator. Raises UserError for an unknown name."""
    if name not in names():
        raise UserError(f"network {name!r} is unknown; choose one of: {', '.join(names())}")
    network: nn.Module = importlib.import_module(f"{__name__}.{name}").build(classes, dropout)
    return network


def fit(network: "nn.Module", images: "torch.Tensor") -> None:
    """Before training, shows some normalised training images [n, 3, h, w] to a network that wants to see them."""
    wanted = getattr(network, "fit", None)
    if wanted is not None:
        wanted(images)


def freeze(network: "nn.Module") -> None:
    """From now on the network's beginning no longer learns, and the way back ends behind it.

    What is learnt first is settled first (A. Brock and others, FreezeOut, arXiv 1706.04983). A step of `whitened` then
    makes 0.81 of its multiply-adds.
    """
    for name in network.beginning:  # type: ignore[union-attr]
        network.get_submodule(name).requires_grad_(False)
