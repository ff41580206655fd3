"""The augmentations, and what both implementations share: normalisation and resizing.

A new augmentation is an entry of `AUGMENTATIONS`: augment_albumentations.py and augment_device.py both make it, one
image at a time and a whole batch at once, with the same distribution.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from cifar.data.sources import SIZE
from cifar.errors import UserError

Statistics = tuple[float, float, float]  # per channel, on a scale of 0 to 1


LEVELS = 256  # values of brightness and of contrast, uniformly distributed


class Pipeline(NamedTuple):
    """A crop, then a flip, then normalisation, then brightness and contrast, then a cutout. Every choice is uniform."""

    # Random 32x32 crop after reflection padding by this many pixels on each side.
    padding: int = 0
    # Horizontal flip: drawn anew in each epoch (random), or drawn once and then in every second epoch (alternating).
    flip: Literal["never", "random", "alternating"] = "never"
    # Random offset of the whole normalised image, within +- this many standard deviations of the data.
    brightness: float = 0.0
    # Random factor of the result, within 1 +- this.
    contrast: float = 0.0
    # Side of one square, entirely inside the image, that is set to zero: the data's mean after normalisation.
    cutout: int = 0


AUGMENTATIONS = {
    # For photographs.
    "crop_flip_cutout": Pipeline(padding=4, flip="random", cutout=8),
    # For few epochs: weaker, and two epochs show each image from both sides (K. Jordan, arXiv 2404.00498).
    "crop_alternating_flip": Pipeline(padding=2, flip="alternating"),
    # With random brightness and contrast, as in github.com/hiverge/cifar10-speedrun (0.1399 and 0.1308).
    "crop_alternating_flip_light": Pipeline(padding=2, flip="alternating", brightness=0.14, contrast=0.13),
    # The first without the flip: a mirrored digit is another character, or none.
    "crop_cutout": Pipeline(padding=4, cutout=8),
    "none": Pipeline(),
}


def find(name: str) -> Pipeline:
    """Returns the augmentation of that name. Raises UserError for an unknown one."""
    if name not in AUGMENTATIONS:
        raise UserError(f"--augmentation {name!r} is unknown; choose one of: {', '.join(AUGMENTATIONS)}")
    return AUGMENTATIONS[name]


def normalize(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Normalises uint8 [n, 32, 32, 3] to float32 [n, 3, 32, 32], channels-last: bit for bit Albumentations' Normalize.

    Works on whole rows of pixels: broadcasting over three channels takes 40 times as long on a CPU.
    """
    shift, scale = _rows(tuple(mean), tuple(std), images.device)  # lists, where they come from JSON
    normalised = images.reshape(-1, SIZE, SIZE * 3).float().sub_(shift).mul_(scale)
    return normalised.view(-1, SIZE, SIZE, 3).permute(0, 3, 1, 2)


def uniform_offset(level: npt.NDArray[np.int64], most: float) -> npt.NDArray[np.float32]:
    """Maps levels from 0 to LEVELS - 1 to numbers from -most to most, evenly spaced."""
    return np.float32(most) * (np.float32(2 / (LEVELS - 1)) * np.asarray(level, np.float32) - np.float32(1))


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """Resizes images [n, 3, h, w] to `size` pixels a side, without cropping (bilinear)."""
    if images.shape[-1] == size:
        return images
    # F.interpolate's own kernel. With --deterministic, F.interpolate would choose 40 others on a GPU instead, for the
    # sake of a backward pass that images have not.
    resized: torch.Tensor = torch.ops.aten.upsample_bilinear2d(images, (size, size), False)
    return resized


@lru_cache  # once per device: even a small upload waits for the GPU
def _rows(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    shift, deviation = (np.tile(np.array(values, np.float32) * np.float32(255), SIZE) for values in (mean, std))
    return torch.from_numpy(shift).to(device), torch.from_numpy(np.reciprocal(deviation)).to(device)
