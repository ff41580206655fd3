"""What evaluation shows the network."""

from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from cifar import evaluation
from cifar.data.augment import resize
from cifar.data.cache import open_data
from cifar.evaluation import View


def test_a_view_is_the_image_moved_and_made_smaller_and_mirrored() -> None:
    images = torch.arange(2 * 3 * 32 * 32, dtype=torch.float32).view(2, 3, 32, 32)
    assert torch.equal(evaluation.apply_view(images, View(0, 32, mirrored=False)), images)
    down_right, up_left = (evaluation.apply_view(images, View(shift, 32, mirrored=False)) for shift in (1, -1))
    assert torch.equal(down_right[..., 1:, 1:], images[..., :-1, :-1])
    assert torch.equal(up_left[..., :-1, :-1], images[..., 1:, 1:])
    assert torch.equal(down_right[..., 0, 1:], images[..., 1, :-1])  # beyond the edge lies the mirror image
    assert torch.equal(evaluation.apply_view(images, View(0, 24, mirrored=False)), resize(images, 24))
    for view in evaluation.VIEWS:
        mirrored = evaluation.apply_view(images, view._replace(mirrored=True))
        assert torch.equal(mirrored, evaluation.apply_view(images, view._replace(mirrored=False)).flip(-1))
    assert len(set(evaluation.VIEWS)) == len(evaluation.VIEWS) == 10


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
    images = torch.from_numpy(data.test_images)
    once, again = (evaluation.evaluate(accelerator, network, images, data, tta=tta) for tta in (False, True))
    assert once is not None
    assert again is not None
    assert once.accuracy_tta is None
    assert network.shown == [22, 22, *[22 // 4] * 10]
    assert np.array_equal(again.probabilities, once.probabilities)
    assert (again.loss, again.accuracy) == (once.loss, once.accuracy)
    # Mirrored, moved by a pixel or made smaller these images are as bright, so that every view says the same.
    assert again.accuracy_tta == again.accuracy
