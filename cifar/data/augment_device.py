"""Augmentation of whole batches on the training device: as augment_albumentations.py, many times as fast.

Random numbers are drawn on the host, for many batches at once, as a function of (seed, epoch, index), so a CPU and a
GPU make bit-identical images.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from cifar.data import philox
from cifar.data.augment import LEVELS, Pipeline, Statistics, normalize, uniform_offset
from cifar.data.sampler import AUGMENTATION, Integers, Samples
from cifar.data.sources import SIZE


class Draws(NamedTuple):
    """The random draws for each image, int64, in the shape of the samples."""

    top: Integers  # of the crop within the padded image: 0 to 2 * padding
    left: Integers
    mirrored: Integers  # 0 or 1
    hole_top: Integers  # within the crop: 0 to 32 - cutout
    hole_left: Integers
    brightness: Integers  # 0 to LEVELS - 1
    contrast: Integers


def draw(pipeline: Pipeline, seed: int, samples: Samples) -> Draws:
    """Returns the draws for samples of any shape. Those for transforms that the pipeline lacks are 0."""
    offsets, sides, places = 2 * pipeline.padding + 1, 1 + (pipeline.flip == "random"), SIZE - pipeline.cutout + 1
    lights = (LEVELS if most else 1 for most in (pipeline.brightness, pipeline.contrast))
    bounds = np.array((offsets, offsets, sides, places, places, *lights), np.uint64)
    epochs, indices = (part.reshape(-1).astype(np.uint64) for part in samples)
    use, blocks = np.uint64(AUGMENTATION), np.array([[0], [1]], np.uint64)  # of four words: seven of eight are used
    words = philox.words(seed, indices, epochs, blocks, use).reshape(8, -1)[: len(bounds)]
    draws = Draws(*philox.below(bounds[:, None], words).reshape(-1, *samples.indices.shape))
    if pipeline.flip == "alternating":
        # One word per image, the same in all epochs.
        own = philox.words(seed, indices, np.uint64(0), np.uint64(2), use)[0].reshape(samples.indices.shape)
        draws = draws._replace(mirrored=(philox.below(np.uint64(2), own) + samples.epochs) % 2)
    return draws


class Plan(NamedTuple):
    """Indices from which a batch [n], or several [k, n], is made: int64 tensors, uploaded together."""

    image: torch.Tensor  # its place within the training images
    rows: torch.Tensor  # of the crop: its place in the first of `_crops`
    columns: torch.Tensor  # in the second
    hole: torch.Tensor  # its first pixel, among all pixels of the batch
    brightness: torch.Tensor  # its place in `_brightness_contrast`
    contrast: torch.Tensor


def plan(indices: Integers, draws: Draws, device: torch.device) -> Plan:
    """Uploads the draws for the images at `indices` [..., n], in one asynchronous copy."""
    numbers = torch.empty((len(Plan._fields), *indices.shape), dtype=torch.int64, pin_memory=device.type == "cuda")
    columns = 2 * draws.left + draws.mirrored
    hole = (np.arange(indices.shape[-1]) * SIZE + draws.hole_top) * SIZE + draws.hole_left
    np.stack((indices, draws.top, columns, hole, draws.brightness, draws.contrast), out=numbers.numpy())
    return Plan(*numbers.to(device, non_blocking=True))


def augment(images: torch.Tensor, batch: Plan, pipeline: Pipeline, mean: Statistics, std: Statistics) -> torch.Tensor:
    """Makes a batch [n] from `images` (uint8 [all, 32, 32, 3], on the device of the plan).

    Returns normalised float32 [n, 3, 32, 32], channels-last, on the same device.
    """
    n, device = len(batch.image), images.device
    # A gather of whole rows and then of single bytes within them takes half as long as a gather of pixels.
    rows, columns = _crops(pipeline.padding, device)
    places = rows.index_select(0, batch.rows).add_(batch.image[:, None], alpha=SIZE)
    strips = images.view(-1, SIZE * 3).index_select(0, places.view(-1)).view(n, SIZE, SIZE * 3)
    shown = columns.index_select(0, batch.columns)[:, None].expand(n, SIZE, SIZE * 3)
    augmented = normalize(strips.gather(2, shown).view(n, SIZE, SIZE, 3), mean, std)

    if pipeline.brightness or pipeline.contrast:
        shift, scale = _brightness_contrast(pipeline.brightness, pipeline.contrast, device)
        augmented.add_(shift.index_select(0, batch.brightness)[:, None, None, None])
        augmented.mul_(scale.index_select(0, batch.contrast)[:, None, None, None])

    if pipeline.cutout:
        hole = batch.hole[:, None] + _hole(pipeline.cutout, device)
        augmented.permute(0, 2, 3, 1).view(-1, 3).index_fill_(0, hole.view(-1), 0)
    return augmented


# Lookup tables, uploaded to each device once.


@lru_cache
def _crops(padding: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns lookup tables of crops: source rows [2 * padding + 1, 32], bytes of a row [2 * (2 * padding + 1), 96].

    The first is indexed by the crop's top; the second by twice its left edge, plus 1 if mirrored. Padding reflects
    without repeating the edge (OpenCV's REFLECT_101).
    """
    place = np.arange(-padding, padding + 1)[:, None] + np.arange(SIZE)
    rows = SIZE - 1 - abs(SIZE - 1 - abs(place))
    columns = np.stack((rows, rows[:, ::-1]), axis=1).reshape(-1, SIZE, 1) * 3 + np.arange(3)
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns.reshape(-1, SIZE * 3)).to(device)


@lru_cache
def _brightness_contrast(brightness: float, contrast: float, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the offset of each brightness level and factor of each contrast level, float32 [LEVELS]."""
    levels = np.arange(LEVELS)
    shift, scale = uniform_offset(levels, brightness), 1 + uniform_offset(levels, contrast)
    return torch.from_numpy(shift).to(device), torch.from_numpy(scale).to(device)


@lru_cache
def _hole(cutout: int, device: torch.device) -> torch.Tensor:
    """Returns the pixels of a cutout, counted from its first: int64 [cutout * cutout]."""
    side = np.arange(cutout)
    return torch.from_numpy((side[:, None] * SIZE + side).reshape(-1)).to(device)
