"""Muon steps all filter banks together, and does what it would do bank by bank."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from cifar import checkpoint, models, optim
from cifar.recipes import RECIPES

RECIPE = RECIPES["speedrun"]()


class OneBankAtATime(torch.optim.SGD):
    """The plain form of the optimizer, for comparison."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["orthogonal"]:
                for filters in group["params"]:
                    if filters.grad is not None:
                        self.turn(filters, filters.grad, group["lr"], group["momentum"])
                        filters.grad = None
        super().step(closure)

    def turn(self, filters: torch.Tensor, gradient: torch.Tensor, rate: float, momentum: float) -> None:
        state = self.state[filters]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        direction = gradient.add(buffer, alpha=momentum)
        filters.mul_(len(filters) ** 0.5 / torch.linalg.vector_norm(filters))
        filters.add_(self.orthogonalized(direction.flatten(1)).view_as(filters), alpha=-rate)

    @staticmethod
    def orthogonalized(matrix: torch.Tensor) -> torch.Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        tall = matrix.shape[0] > matrix.shape[1]
        x = matrix.T if tall else matrix
        x = x / (torch.linalg.vector_norm(x) + 1e-7)
        for _ in range(3):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.T if tall else x).to(matrix.dtype)


def laid_out(network: nn.Module, layout: torch.memory_format) -> nn.Module:
    for parameter in network.parameters():
        if parameter.ndim == 4:  # FakeTensorMode refuses network.to(memory_format=...)
            parameter.data = parameter.data.contiguous(memory_format=layout)
    return network


def convolutions(layout: torch.memory_format) -> nn.Module:
    """Wide, tall and square banks, three of one shape, and one whose transposed matrix has the shape of others."""
    sizes = ((3, 16, 3), (16, 16, 3), (16, 16, 3), (16, 144, 1), (144, 16, 1), (36, 4, 3), (5, 7, 2), (3, 40, 3))
    layers = [nn.Conv2d(before, after, side) for before, after, side in sizes]
    return laid_out(nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Linear(12, 5)), layout)


def contiguous() -> nn.Module:
    return convolutions(torch.contiguous_format)


def channels_last() -> nn.Module:
    return convolutions(torch.channels_last)


def in_other_orders() -> nn.Module:
    """Banks in memory orders of all sorts: by turns contiguous, channels-last, and neither."""
    network = channels_last()
    for bank in (bank for number, bank in enumerate(network.parameters()) if bank.ndim == 4 and number % 4 == 0):
        bank.data = bank.data.contiguous()
    network[1].weight.data = network[1].weight.data.permute(1, 3, 0, 2).contiguous().permute(2, 0, 3, 1)
    assert not network[1].weight.is_contiguous()
    assert not network[1].weight.is_contiguous(memory_format=torch.channels_last)
    return network


def network_of(name: str) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return laid_out(models.build(name, classes=10, dropout=0), torch.channels_last)

    build.__name__ = name  # names the test
    return build


NETWORKS = [contiguous, channels_last, in_other_orders, *map(network_of, models.names())]
Trained = tuple[nn.Module, torch.optim.Optimizer]


def trained(build: Callable[[], nn.Module], plain: bool) -> Trained:
    """A network and its optimizer, or the optimizer's plain form."""
    torch.manual_seed(0)
    network = build()
    optimizer = optim.build(network, RECIPE)
    if plain:
        optimizer = OneBankAtATime(optimizer.param_groups, lr=1.0)
    optim.set_lr(optimizer, 0.1)
    return network, optimizer


def step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int, like_parameters: bool = True) -> None:
    """A step with random gradients, which autograd lays out like their parameters."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        if parameter.requires_grad:
            numbers = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(numbers) if like_parameters else numbers
    optimizer.step()
    optimizer.zero_grad()


def freeze_some(network: nn.Module) -> None:
    if hasattr(network, "early_layers"):
        models.freeze(network)
    else:
        for number, parameter in enumerate(network.parameters()):
            parameter.requires_grad_(number % 3 > 0)


def bring_to_the_same_state(ours: Trained, theirs: Trained) -> None:
    """As restoring a checkpoint of theirs does it."""
    (network, optimizer), state = ours, checkpoint.optimizer_tensors(*theirs)
    network.load_state_dict(theirs[0].state_dict())
    for name, parameter in network.named_parameters():
        buffer = state.get(f"{name}.momentum_buffer")
        if buffer is not None:
            optimizer.state[parameter] = {"momentum_buffer": torch.empty_like(parameter).copy_(buffer)}


def assert_close(ours: Trained, theirs: Trained) -> None:
    """Weights and state, by names and shapes as they are in checkpoints."""
    for mine, other in (
        (ours[0].state_dict(), theirs[0].state_dict()),
        (checkpoint.optimizer_tensors(*ours), checkpoint.optimizer_tensors(*theirs)),
    ):
        assert mine.keys() == other.keys()
        for name, value in mine.items():
            torch.testing.assert_close(value, other[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("build", NETWORKS)
def test_a_step_is_that_of_one_bank_at_a_time(build: Callable[[], nn.Module], frozen: bool) -> None:
    ours, theirs = (trained(build, plain) for plain in (False, True))
    for number in range(2):  # the first begins the momentum
        for network, optimizer in (ours, theirs):
            if frozen:
                freeze_some(network)
            step(network, optimizer, seed=number)
        assert_close(ours, theirs)
        bring_to_the_same_state(ours, theirs)


@pytest.mark.parametrize("build", [contiguous, channels_last, in_other_orders])
def test_gradients_may_be_laid_out_otherwise_than_their_parameters(build: Callable[[], nn.Module]) -> None:
    ours, theirs = (trained(build, plain) for plain in (False, True))
    for pair in (ours, theirs):
        step(*pair, seed=0, like_parameters=False)
    assert_close(ours, theirs)


def test_when_a_beginning_freezes_the_rest_goes_on_and_the_frozen_state_stays() -> None:
    ours, theirs = (trained(network_of("whitened"), plain) for plain in (False, True))
    for pair in (ours, theirs):
        step(*pair, seed=0)
    before = checkpoint.optimizer_tensors(*ours)
    for pair in (ours, theirs):
        models.freeze(pair[0])
        step(*pair, seed=1)
    assert_close(ours, theirs)
    assert checkpoint.optimizer_tensors(*ours).keys() == before.keys()


class Products(TorchDispatchMode):
    """Records the types that matrix products take and give."""

    def __init__(self) -> None:
        super().__init__()
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            self.types |= {tensor.dtype for tensor in (*args, result) if isinstance(tensor, torch.Tensor)}
        return result


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_in_the_precision_of_the_autocast_around_the_step(precision: torch.dtype) -> None:
    ours, theirs = (trained(channels_last, plain) for plain in (False, True))
    for network, optimizer in (ours, theirs):
        with Products() as products, torch.autocast("cpu", precision, enabled=precision is not torch.float32):
            step(network, optimizer, seed=0)
        assert products.types == {precision}
    for name, value in ours[0].state_dict().items():
        assert value.dtype == theirs[0].state_dict()[name].dtype
        torch.testing.assert_close(value, theirs[0].state_dict()[name], atol=4 * torch.finfo(precision).eps, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_step_reads_nothing_from_the_device(autocast: bool) -> None:
    with FakeTensorMode():  # tensors without numbers: whatever reads one, or chooses by one, raises
        network, optimizer = trained(channels_last, plain=False)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for parameter in network.parameters():
                    parameter.grad = torch.empty_like(parameter)
                optimizer.step()
        with pytest.raises(RuntimeError):
            network[0].weight.sum().item()
