"""What the optimizers do with gradients."""

from typing import get_args

import pytest
import torch

from cifar import models, optim
from cifar.errors import UserError
from cifar.recipes import Recipe

MUON = Recipe(optimizer="muon", peak_learning_rate=0.2, bias_learning_rate=3, head_learning_rate=0.5, weight_decay=0.01)


def convolutional() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.Flatten(), torch.nn.Linear(16 * 4, 5)
    )


def after(network: torch.nn.Module, optimizer: torch.optim.Optimizer, rate: float, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optim.set_lr(optimizer, rate)
        network(torch.randn(8, 3, 4, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_muon_turns_filters_by_an_orthogonal_matrix_of_the_rates_size() -> None:
    network = convolutional()
    before = network[0].weight.detach().flatten(1).clone()
    after(network, optim.build(network, MUON), rate=0.1, steps=1)
    before *= 16**0.5 / before.norm()
    step = network[0].weight.detach().flatten(1) - before
    sizes = torch.linalg.svdvals(step) / 0.1
    assert sizes.min() > 0.5  # exactly 1 after many iterations; these are Newton-Schulz's bounds after few
    assert sizes.max() < 1.5


def test_orthogonalized_keeps_singular_vectors_and_transposes() -> None:
    torch.manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6)).Q for n in (20, 9))
    sizes = torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6, 0.5])
    matrix = u * sizes @ v.T / sizes.norm()
    found, other = optim.orthogonalized(torch.stack((matrix, -matrix)))
    torch.testing.assert_close(other, -found)
    inner = u.T @ found @ v
    torch.testing.assert_close(inner, torch.diag(inner.diagonal()), atol=1e-5, rtol=0)
    torch.testing.assert_close(u @ inner @ v.T, found, atol=1e-5, rtol=0)
    torch.testing.assert_close(optim.orthogonalized(matrix.T[None])[0], found.T, atol=1e-5, rtol=0)


def test_beside_muon_everything_else_follows_torchs_sgd_at_its_own_rate() -> None:
    ours, theirs = convolutional(), convolutional()
    for network in (ours, theirs):
        network[0].weight.requires_grad_(False)  # so that both see the same gradients
    after(ours, optim.build(ours, MUON), rate=0.1, steps=3)  # half the peak
    rates = {2: 0.25, 1: 1.5}  # by the parameter's dimensions: half of their peaks
    groups = [
        {
            "params": [p for p in theirs.parameters() if p.ndim == n],
            "lr": rate,
            "lr_scale": 1,
            "weight_decay": 0.005 / rate,
        }
        for n, rate in rates.items()
    ]
    sgd = torch.optim.SGD(groups, momentum=0.85, nesterov=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        theirs(torch.randn(8, 3, 4, 4, generator=generator)).square().sum().backward()
        sgd.step()
        sgd.zero_grad()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)


def test_the_optimizer_takes_one_step_of_adam_at_the_given_rate() -> None:
    layer = torch.nn.Linear(3, 2, bias=False)
    before = layer.weight.detach().clone()
    optimizer = optim.build(layer, Recipe(weight_decay=0))
    optim.set_lr(optimizer, 0.125)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    # Adam's first step is the rate times the gradient's sign, and every gradient here is +1.
    torch.testing.assert_close(layer.weight.detach(), before - 0.125)


OPTIMIZERS = get_args(Recipe.model_fields["optimizer"].annotation)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("network", models.names())
def test_every_parameter_that_learns_is_in_one_group(network: str, name: str) -> None:
    built = models.build(network, classes=10, dropout=0)
    groups = optim.build(built, Recipe(optimizer=name)).param_groups
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in grouped} == {id(p) for p in built.parameters() if p.requires_grad}
    assert len(grouped) == len({id(parameter) for parameter in grouped})


@pytest.mark.parametrize("shape", [(), (2, 3, 4), (2, 3, 4, 5, 6)])
def test_a_parameter_without_a_rule_is_refused_by_name_and_not_skipped(shape: tuple[int, ...]) -> None:
    network = convolutional()
    network.register_parameter("extra", torch.nn.Parameter(torch.ones(shape)))
    with pytest.raises(UserError, match=rf"dimensions, and extra has {len(shape)}; .* or use --optimizer adam"):
        optim.build(network, MUON)
    optim.build(network, Recipe())


@pytest.mark.parametrize("overflows", [(), (0,), (2,), (0, 1, 3)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_under_a_loss_scaler_steps_are_those_of_an_unscaled_run_without_those_that_overflowed(
    name: str, overflows: tuple[int, ...]
) -> None:
    def trained(scaled: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        network = convolutional()
        optimizer = optim.build(network, MUON.model_copy(update={"optimizer": name}))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, enabled=scaled)
        generator = torch.Generator().manual_seed(1)
        for step in range(5):
            optim.set_lr(optimizer, 0.1)
            logits = network(torch.randn(8, 3, 4, 4, generator=generator))
            loss = torch.nn.functional.cross_entropy(logits, torch.arange(8) % 5)
            if step not in overflows or scaled:
                scaler.scale(loss).backward()
                if step in overflows:
                    network[0].weight.grad[0, 0, 0, 0] = float("inf")
                if step % 2:
                    scaler.unscale_(optimizer)  # as for the logs of the gradients' norm
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        state = [value for p in network.parameters() for value in optimizer.state[p].values()]
        return list(network.state_dict().values()), state

    for expected, actual in zip(trained(scaled=False), trained(scaled=True), strict=True):
        assert len(actual) == len(expected) > 0
        assert all(torch.isfinite(a).all() and torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
