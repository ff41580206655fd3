"""A step's gradients and metrics."""

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

    def forward(self, _images: torch.Tensor) -> torch.Tensor:
        """As CUDA's allocator does."""
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
        )


def test_too_little_memory_is_one_line_with_the_number_of_images() -> None:
    recipe, accelerator = Recipe(gradient_accumulation_steps=2), Accelerator(cpu=True)
    images, labels = torch.zeros(64, 3, 32, 32), torch.zeros(64, dtype=torch.int64)
    words = r"rank 0 on \S+ is out of memory with 32 images at a time; give --gradient-accumulation-steps 4, in a new"
    with pytest.raises(UserError, match=words):
        loop.accumulate_gradients(accelerator, recipe, loop.OwnWork(accelerator.device), Greedy(), images, labels)


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


def test_on_a_cpu_metrics_are_read_at_once() -> None:
    delayed = loop.DelayedMetrics(Accelerator(cpu=True))
    for step in range(3):
        (metrics,) = delayed.add(step, torch.zeros(4))
        assert metrics.step == step
