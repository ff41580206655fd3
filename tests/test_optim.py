"""The learning rate is a function of the step; the optimizer follows it."""

import pytest
import torch

from cifar import optim
from cifar.recipes import Recipe


@pytest.mark.parametrize("total", [2344, 100])
def test_one_cycle_passes_its_corner_points(total: int) -> None:
    recipe = Recipe(epochs=24, peak_epoch=5, peak_learning_rate=0.01)
    rates = [optim.lr_at(step, total, recipe) for step in range(total + 1)]
    peak = total * 5 / 24
    assert rates[0] == pytest.approx(0.01 / 25)
    assert max(rates) == pytest.approx(0.01, rel=1 / peak)
    assert abs(rates.index(max(rates)) - peak) <= 1
    assert rates[total] == 0
    assert rates[total - 1] == pytest.approx(0.01 / (total - peak))
    middle = round((peak + total) / 2)
    assert rates[middle] == pytest.approx(0.01 * (total - middle) / (total - peak))
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_optimizer_takes_one_step_of_adam_at_the_given_rate() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = optim.build(layer, Recipe(weight_decay=0))
    optim.set_lr(optimizer, 0.125)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Adam's first step is the rate times the gradient's sign, and every gradient here is +1.
    torch.testing.assert_close(layer.weight.detach(), before - 0.125)
