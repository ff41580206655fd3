"""The optimizers, and their groups of parameters."""

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from cifar.errors import UserError
from cifar.recipes import Recipe

# Nesterov momentum, both from airbench94_muon.py (github.com/KellerJordan/cifar10-airbench).
FILTER_MOMENTUM, OTHER_MOMENTUM = 0.6, 0.85
ITERATIONS = 3  # of Newton-Schulz: 2 cost 1.8 points in airbench's runs


def build(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Builds the recipe's optimizer. Each group of parameters has a factor `lr_scale` of the learning rate, see set_lr.

    Raises UserError for a parameter that muon has no rule for.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if recipe.optimizer == "adam":
        # An L2 penalty; fused: one kernel for all parameters, on CPUs and GPUs alike.
        parameters = [parameter for _, parameter in named]
        group = {"params": parameters, "lr_scale": 1.0}
        return torch.optim.Adam([group], lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay, fused=True)
    for name, parameter in named:
        if parameter.ndim not in (1, 2, 4):
            raise UserError(
                f"--optimizer muon has rules for parameters of 1, 2 and 4 dimensions, and {name} has {parameter.ndim}; "
                "add one to cifar/optim.py, or use --optimizer adam"
            )
    filters = [parameter for _, parameter in named if parameter.ndim == 4]
    heads = [parameter for _, parameter in named if parameter.ndim == 2]
    others = [parameter for _, parameter in named if parameter.ndim == 1]
    groups = [
        {"params": filters, "lr_scale": 1.0, "orthogonal": True, "momentum": FILTER_MOMENTUM, "weight_decay": 0.0}
    ]
    for parameters, rate in ((heads, recipe.head_learning_rate), (others, recipe.bias_learning_rate)):
        lr_scale, decay = rate / recipe.peak_learning_rate, recipe.weight_decay / rate
        groups.append({"params": parameters, "lr_scale": lr_scale, "orthogonal": False, "weight_decay": decay})
    return Muon(groups, lr=recipe.peak_learning_rate, momentum=OTHER_MOMENTUM, nesterov=True, fused=True)


class Muon(torch.optim.SGD):
    """Nesterov SGD that orthogonalises the updates of convolution filters (groups with `orthogonal`).

    A filter bank [out, in, h, w] is a matrix [out, in * h * w]; before each step it is scaled to the norm sqrt(out),
    so that the learning rate alone says how far it turns. K. Jordan and others, kellerjordan.github.io/posts/muon.
    torch.optim.Muon takes two-dimensional parameters alone and always computes in bf16, which processors without
    native bf16 only emulate: here the precision is that of the autocast around the step.
    """

    def __init__(self, groups: list[dict[str, Any]], **defaults: Any) -> None:
        super().__init__(groups, **defaults)
        # float16's loss scaler leaves it to torch's fused optimizers to divide gradients by its factor and to skip a
        # step that overflowed. It has to do both for this one, since the filters are stepped here.
        self._step_supports_amp_scaling = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["orthogonal"]:
                banks = [bank for bank in group["params"] if bank.grad is not None]
                if banks:
                    self._step_banks(banks, group["lr"], group["momentum"])
                for bank in banks:
                    bank.grad = None  # nothing is left for SGD to do
        super().step(closure)

    def _step_banks(self, banks: list[torch.Tensor], rate: float, momentum: float) -> None:
        """Steps all filter banks together: on a GPU, launching kernels bank by bank takes longer than they run.

        Columns of the matrices are in the order in which a bank lies in memory, so that nothing is copied to flatten
        it: permuted columns of a matrix permute those of the nearest orthogonal one, and change nothing else.
        """
        banks = sorted(banks, key=_matrix_shape)  # banks of one shape become neighbours
        for bank in banks:
            if "momentum_buffer" not in self.state[bank]:
                self.state[bank]["momentum_buffer"] = torch.zeros_like(bank)
        filters = [_in_memory_order(bank, bank) for bank in banks]
        gradients = [_in_memory_order(bank.grad, bank) for bank in banks if bank.grad is not None]
        buffers = [_in_memory_order(self.state[bank]["momentum_buffer"], bank) for bank in banks]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, gradients)
        directions = torch._foreach_add(gradients, buffers, alpha=momentum)  # Nesterov's: one step ahead
        updates = _orthogonalized_banks(directions, [_matrix_shape(bank) for bank in banks])
        norms = torch._foreach_norm(filters)
        torch._foreach_div_(norms, [len(bank) ** 0.5 for bank in banks])
        torch._foreach_div_(filters, norms)
        updates = [update.view(bank.shape) for update, bank in zip(updates, filters, strict=True)]
        torch._foreach_add_(filters, updates, alpha=-rate)


def _matrix_shape(bank: torch.Tensor) -> tuple[int, int]:
    return len(bank), math.prod(bank.shape[1:])


def _in_memory_order(tensor: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Returns a view of `tensor` [out, in, h, w] with its dimensions in the order that `bank` has them in memory."""
    return tensor.permute(0, 2, 3, 1) if bank.is_contiguous(memory_format=torch.channels_last) else tensor


def _orthogonalized_banks(
    directions: tuple[torch.Tensor, ...], shapes: Sequence[tuple[int, int]]
) -> list[torch.Tensor]:
    """Returns each direction as a matrix [m, n] of its shape, orthogonalized; equal shapes are neighbours.

    Overwrites the directions.
    """
    norms = torch._foreach_norm(directions)
    torch._foreach_add_(norms, 1e-7)
    torch._foreach_div_(directions, norms)
    flat = torch.cat([direction.flatten() for direction in directions])
    device_type = flat.device.type
    if torch.is_autocast_enabled(device_type):
        flat = flat.to(torch.get_autocast_dtype(device_type))  # once; autocast would do it before each product
    counts = [(shape, len(list(equal))) for shape, equal in groupby(shapes)]
    pieces = flat.split_with_sizes([count * math.prod(shape) for shape, count in counts])
    batches = [piece.view(count, *shape) for piece, (shape, count) in zip(pieces, counts, strict=True)]
    return [matrix for batch in batches for matrix in orthogonalized(batch).unbind()]


def orthogonalized(matrices: torch.Tensor) -> torch.Tensor:
    """Returns `matrices` [k, m, n] of norm 1 with their singular values brought near 1 (0.5 to 1.5), by Newton-Schulz.

    The coefficients are the Muon page's: the steepest quintic at 0 that stays near 1 afterwards.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    for _ in range(ITERATIONS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def set_lr(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets each group's learning rate: `learning_rate` times its `lr_scale`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
