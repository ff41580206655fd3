"""What evaluation shows the network."""

from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from cifar import loop
from cifar.data.augment import resize
from cifar.data.cache import open_data
from cifar.errors import UserError
from cifar.loop import View
from cifar.recipes import Recipe


def test_a_view_is_the_image_moved_and_made_smaller_and_mirrored() -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32)
    assert torch.equal(loop.seen(images, View(0, 32, mirrored=False)), images)
    down_right, up_left = (loop.seen(images, View(shift, 32, mirrored=False)) for shift in (1, -1))
    assert torch.equal(down_right[..., 1:, 1:], images[..., :-1, :-1])
    assert torch.equal(up_left[..., :-1, :-1], images[..., 1:, 1:])
    assert torch.equal(down_right[..., 0, 1:], images[..., 1, :-1])  # beyond the edge lies the mirror image
    assert torch.equal(loop.seen(images, View(0, 24, mirrored=False)), resize(images, 24))
    for view in loop.VIEWS:
        mirrored = loop.seen(images, view._replace(mirrored=True))
        assert torch.equal(mirrored, loop.seen(images, view._replace(mirrored=False)).flip(-1))
    assert len(set(loop.VIEWS)) == len(loop.VIEWS) == 10


class Counting(nn.Module):
    """Tells classes by an image's brightness, and notes how many images it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[int] = []
        self.scale = nn.Parameter(torch.tensor(4.0))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        self.shown.append(len(images))
        brightness = images.mean(dim=(1, 2, 3))
        return self.scale * torch.stack([brightness, -brightness, brightness * 0, brightness * 0 - 1], dim=1)


def test_views_are_of_the_least_sure_quarter_and_change_nothing_else(shapes: Path) -> None:
    data, network = open_data(str(shapes)), Counting()
    accelerator = Accelerator(cpu=True)
    once, again = loop.evaluate(accelerator, network, data), loop.evaluate(accelerator, network, data, views=True)
    assert once is not None
    assert again is not None
    assert once.accuracy_of_views is None
    assert network.shown == [22, 22, *[22 // 4] * 10]
    assert np.array_equal(again.probabilities, once.probabilities)
    assert (again.loss, again.accuracy) == (once.loss, once.accuracy)
    # Mirrored, moved by a pixel or made smaller these images are as bright, so that every view says the same.
    assert again.accuracy_of_views == again.accuracy


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
        loop.accumulate_gradients(accelerator, Greedy(), images, labels, recipe)
