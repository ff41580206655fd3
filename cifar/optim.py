"""The optimizer and the learning rate, which is a function of the step alone (law 2)."""

import torch
from torch import nn

from cifar.recipes import Recipe

WARMUP_START = 1 / 25  # of the peak rate, at step 0


def build(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Adam with an L2 penalty; fused: one kernel for all parameters, on CPUs and GPUs alike."""
    return torch.optim.Adam(
        network.parameters(), lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay, fused=True
    )


def lr_at(step: int, total_steps: int, recipe: Recipe) -> float:
    """One cycle: linear from 1/25 of the peak up to it at `peak_epoch`, and linear down to zero at the end.

    There is no annihilation phase after the cycle: the first step not taken would have rate 0.
    """
    peak_step = total_steps * recipe.peak_epoch / recipe.epochs
    if step < peak_step:
        return recipe.peak_learning_rate * (WARMUP_START + (1 - WARMUP_START) * step / peak_step)
    return recipe.peak_learning_rate * (total_steps - step) / (total_steps - peak_step)


def set_lr(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
