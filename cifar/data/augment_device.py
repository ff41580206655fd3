"""Augmentation of whole batches on the device that trains: what augment_albumentations.py does, many times as fast.

The random numbers are drawn on the host, each image's from (seed, epoch, index) alone, so a CPU and a GPU make the
same images bit for bit.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cifar.data import philox
from cifar.data.augment import LEVELS, Pipeline, Statistics, amount, normalize
from cifar.data.order import AUGMENTATION, Sample
from cifar.data.sources import SIZE

Integers = npt.NDArray[np.int64]


class Draws(NamedTuple):
    """What was drawn for each of n images, int64 [n]."""

    top: Integers  # of the crop within the padded image: 0 to 2 * padding
    left: Integers
    mirrored: Integers  # 0 or 1
    hole_top: Integers  # within the crop: 0 to 32 - cutout
    hole_left: Integers
    brightness: Integers  # 0 to LEVELS - 1
    contrast: Integers


def draw(pipeline: Pipeline, seed: int, samples: list[Sample]) -> Draws:
    """The random numbers of the samples (epoch, index). A choice that a pipeline lacks has one value, 0."""
    offsets, sides, places = 2 * pipeline.padding + 1, 1 + (pipeline.flip == "random"), SIZE - pipeline.cutout + 1
    lights = (LEVELS if most else 1 for most in (pipeline.brightness, pipeline.contrast))
    bounds = np.array((offsets, offsets, sides, places, places, *lights), np.uint64)
    counters = np.empty((4, 2, len(samples)), np.uint64)  # two blocks of four words: seven are used
    counters[0], counters[1] = np.array(samples, np.uint64).T[::-1, None]
    counters[2], counters[3] = [[0], [1]], AUGMENTATION
    words = philox.words(seed, counters).reshape(8, -1)[: len(bounds)]
    draws = Draws(*philox.below(bounds[:, None], words))
    if pipeline.flip == "alternating":
        epochs = counters[1, 0].astype(np.int64)
        counters[1], counters[2] = 0, 2  # a word of the image's own, the same in all epochs
        first = philox.below(np.array(2, np.uint64), philox.words(seed, counters[:, :1])[0, 0])
        draws = draws._replace(mirrored=(first + epochs) % 2)
    return draws


def augment(
    images: torch.Tensor, indices: Integers, draws: Draws, pipeline: Pipeline, mean: Statistics, std: Statistics
) -> torch.Tensor:
    """The images [n] of `images` (uint8 [all, 32, 32, 3], on any device) at `indices`, as the draws have it.

    Returns normalised float32 [n, 3, 32, 32], channels-last, on the same device.
    """
    device, n = images.device, len(indices)
    places = draws.top, draws.left, draws.mirrored, draws.hole_top, draws.hole_left
    # In one piece and unwaited for: the copy goes on while a GPU still works on the step before.
    numbers = torch.from_numpy(np.stack((indices, *places))).to(device, non_blocking=True)
    index, top, left, mirrored, hole_top, hole_left = numbers[:, :, None].unbind()  # each [n, 1]

    # Which row and column of the image each row and column of the crop shows. A gather of whole rows and then of
    # single bytes within them takes half as long as a gather of pixels.
    place = torch.arange(SIZE, device=device)
    rows = _reflect(top + place - pipeline.padding)
    columns = _reflect(left + torch.where(mirrored > 0, SIZE - 1 - place, place) - pipeline.padding)
    strips = images.view(-1, SIZE * 3).index_select(0, (index * SIZE + rows).view(-1))
    channels = (columns[:, :, None] * 3 + torch.arange(3, device=device)).view(n, 1, SIZE * 3)
    crops = strips.view(n, SIZE, SIZE * 3).gather(2, channels.expand(n, SIZE, SIZE * 3))
    augmented = normalize(crops.view(n, SIZE, SIZE, 3), mean, std)

    if pipeline.brightness or pipeline.contrast:
        light = np.stack((amount(draws.brightness, pipeline.brightness), 1 + amount(draws.contrast, pipeline.contrast)))
        shift, scale = torch.from_numpy(light).to(device, non_blocking=True)[:, :, None, None, None].unbind()
        augmented.add_(shift).mul_(scale)

    hole = torch.arange(pipeline.cutout, device=device)
    hole_rows = (torch.arange(n, device=device)[:, None] * SIZE + hole_top + hole)[:, :, None]
    hole_pixels = hole_rows * SIZE + (hole_left + hole)[:, None, :]
    augmented.permute(0, 2, 3, 1).view(-1, 3).index_fill_(0, hole_pixels.view(-1), 0)
    return augmented


def _reflect(place: torch.Tensor) -> torch.Tensor:
    """Places beyond an edge as their mirror images within; the edge itself comes once (OpenCV's REFLECT_101)."""
    return SIZE - 1 - (SIZE - 1 - place.abs()).abs()
