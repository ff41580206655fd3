"""What evaluation shows the network."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from cifar import loop
from cifar.data.cache import open_data


def test_a_view_is_the_image_moved_and_mirrored() -> None:
    images = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4)
    assert torch.equal(loop.seen(images, 0, False), images)
    down_right, up_left = loop.seen(images, 1, False), loop.seen(images, -1, False)
    assert torch.equal(down_right[..., 1:, 1:], images[..., :-1, :-1])
    assert torch.equal(up_left[..., :-1, :-1], images[..., 1:, 1:])
    assert torch.equal(down_right[..., 0, 1:], images[..., 1, :-1])  # beyond the edge lies the mirror image
    for shift in (-1, 0, 1):
        assert torch.equal(loop.seen(images, shift, True), loop.seen(images, shift, False).flip(-1))
    assert len(set(loop.VIEWS)) == 6


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


def test_six_views_are_of_the_least_sure_quarter_and_change_nothing_else(shapes: Path) -> None:
    data, network = open_data(str(shapes)), Counting()
    accelerator = Accelerator(cpu=True)
    once, again = loop.evaluate(accelerator, network, data), loop.evaluate(accelerator, network, data, views=True)
    assert once is not None
    assert again is not None
    assert once.accuracy_of_views is None
    assert network.shown == [22, 22, *[22 // 4] * 6]
    assert np.array_equal(again.probabilities, once.probabilities)
    assert (again.loss, again.accuracy) == (once.loss, once.accuracy)
    # Mirrored or moved by a pixel these images are as bright as before, so that every view says the same.
    assert again.accuracy_of_views == again.accuracy
