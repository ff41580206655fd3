"""The optimizers, and their groups of parameters."""

from typing import Any

import torch
from torch import nn

from cifar.errors import UserError
from cifar.recipes import Recipe

# Both Nesterov's, from airbench94_muon.py (github.com/KellerJordan/cifar10-airbench).
FILTER_MOMENTUM, OTHER_MOMENTUM = 0.6, 0.85
ITERATIONS = 3  # of Newton-Schulz: 2 cost 1.8 points in airbench's runs


def build(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimizer. Each group of parameters has a share of the learning rate, see set_lr.

    Raises UserError for a parameter that muon has no rule for.
    """
    named = [(name, parameter) for name, parameter in network.named_parameters() if parameter.requires_grad]
    if recipe.optimizer == "adam":
        # An L2 penalty; fused: one kernel for all parameters, on CPUs and GPUs alike.
        parameters = [parameter for _, parameter in named]
        group = {"params": parameters, "share": 1.0}
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
    groups = [{"params": filters, "share": 1.0, "orthogonal": True, "momentum": FILTER_MOMENTUM, "weight_decay": 0.0}]
    for parameters, rate in ((heads, recipe.head_learning_rate), (others, recipe.bias_learning_rate)):
        share, decay = rate / recipe.peak_learning_rate, recipe.weight_decay / rate
        groups.append({"params": parameters, "share": share, "orthogonal": False, "weight_decay": decay})
    return Muon(groups, lr=recipe.peak_learning_rate, momentum=OTHER_MOMENTUM, nesterov=True, fused=True)


class Muon(torch.optim.SGD):
    """Nesterov SGD, which for filters (groups with `orthogonal`) takes the nearest orthogonal matrix as its step.

    A filter bank [out, in, h, w] is a matrix [out, in * h * w]; before each step it is brought to the norm sqrt(out),
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
                for filters in group["params"]:
                    if filters.grad is not None:
                        direction = self._direction(filters, filters.grad, group["momentum"])
                        filters.mul_(len(filters) ** 0.5 / torch.linalg.vector_norm(filters))
                        filters.add_(orthogonalized(direction.flatten(1)).view_as(filters), alpha=-group["lr"])
                        filters.grad = None  # nothing is left for SGD to do
        super().step(closure)

    def _direction(self, filters: torch.Tensor, gradient: torch.Tensor, momentum: float) -> torch.Tensor:
        """Nesterov's: takes the gradient up into the momentum, and looks one step ahead."""
        state = self.state[filters]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        return gradient.add(buffer, alpha=momentum)


def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` [m, n] with its singular values brought near 1 (0.5 to 1.5), by Newton-Schulz iterations.

    The coefficients are the Muon page's: the steepest quintic at 0 that stays near 1 afterwards.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (torch.linalg.vector_norm(x) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def set_lr(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every parameter group its share of the rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]
