"""A step's gradients and metrics."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar import loop
from cifar.errors import UserError
from cifar.loop import StepMetrics
from cifar.recipes import Recipe


class Greedy(nn.Module):
    """Wants more memory than there is."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """As CUDA's allocator does, and as the CPU's."""
        if self.device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        return images.new_empty(1 << 50)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize(("images", "parts", "smaller"), [(64, 2, 4), (125, 5, 25)])
def test_too_little_memory_is_one_line_that_names_a_split_that_works(
    images: int, parts: int, smaller: int, device: str
) -> None:
    words = (
        rf"rank 0 on \S+ is out of memory with {images // parts} images at a time; "
        f"give --gradient-accumulation-steps {smaller}, in a new"
    )
    with pytest.raises(UserError, match=words):
        accumulate(Greedy(device), images, parts)


def test_one_value_for_batch_norm_is_one_line() -> None:
    with pytest.raises(UserError, match="has one image at a time, of which batch-norm has no statistics"):
        accumulate(nn.Sequential(nn.AvgPool2d(32), nn.BatchNorm2d(3), nn.Flatten()), 2, 2)


def test_a_fault_of_the_program_keeps_its_traceback() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        accumulate(nn.Sequential(nn.Flatten(), nn.Linear(5, 3)), 2, 1)


def accumulate(model: nn.Module, images: int, parts: int) -> None:
    recipe, accelerator = Recipe(gradient_accumulation_steps=parts), Accelerator(cpu=True)
    batch = torch.zeros(images, 3, 32, 32), torch.zeros(images, dtype=torch.int64)
    loop.accumulate_gradients(accelerator, recipe, loop.OwnWork(accelerator.device), model, *batch)


def test_metrics_are_read_after_so_many_further_steps_and_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loop.DELAY, "cpu", 3)
    delayed = loop.DelayedMetrics(Accelerator(cpu=True))
    totals = [torch.tensor([step / 2, float(step), float(step == 4), 0.0]) for step in range(8)]
    found = [delayed.add(step, totals[step]) for step in range(6)]
    assert [[each.step for each in metrics] for metrics in found] == [[], [], [], [0], [1], [2]]
    found = [delayed.read(), delayed.read(), delayed.add(6, totals[6], torch.tensor(2.5)), delayed.read()]
    assert [[each.step for each in metrics] for metrics in found] == [[3, 4, 5], [], [], [6]]
    assert found[0][1] == StepMetrics(step=4, loss=2, correct=4, stop=True, write_failed=False, gradient_norm=None)
    assert found[3][0].gradient_norm == 2.5


def test_a_step_that_compiles_the_network_is_not_timed() -> None:
    work = loop.OwnWork(torch.device("cpu"))
    for compiles in (True, False):
        for _ in range(loop.MEASURED_STEPS):
            work.begins()
            work.compiles = compiles
            work.ends()
            assert math.isnan(work.elapsed()) == compiles
        assert math.isnan(work.seconds()) == compiles


def test_on_a_cpu_metrics_are_read_at_once() -> None:
    delayed = loop.DelayedMetrics(Accelerator(cpu=True))
    for step in range(3):
        (metrics,) = delayed.add(step, torch.zeros(4))
        assert metrics.step == step
