"""Augmentation of training images with Albumentations, each image's randomness from (seed, epoch, index) alone.

A new augmentation is an entry of `AUGMENTATIONS`: a function from the data's mean and standard deviation to a list
of transforms that ends in normalised float32 images.
"""

import os
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar.data.order import AUGMENTATION
from cifar.errors import UserError

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # or it asks a package index for its newest version at import

import albumentations as A
import cv2

Statistics = tuple[float, float, float]


def _crop(padding: int = 4) -> list[A.BasicTransform]:
    """Shifts by up to `padding` pixels; what comes in at the border is the image's own mirror image."""
    return [A.Pad(padding=padding, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(32, 32)]


def _cutout(size: int = 8) -> list[A.BasicTransform]:
    """One square, wholly inside; on normalised images zero is the data's mean."""
    return [A.CoarseDropout(num_holes_range=(1, 1), hole_height_range=(size, size), hole_width_range=(size, size),
                            fill=0, p=1)]  # fmt: skip


def _normalize(mean: Statistics, std: Statistics) -> list[A.BasicTransform]:
    return [A.Normalize(mean, std, max_pixel_value=255)]


def crop_flip_cutout(mean: Statistics, std: Statistics) -> list[A.BasicTransform]:
    """For photographs: crop of the image padded by 4, horizontal flip, 8x8 cutout."""
    return [*_crop(), A.HorizontalFlip(p=0.5), *_normalize(mean, std), *_cutout()]


def crop_cutout(mean: Statistics, std: Statistics) -> list[A.BasicTransform]:
    """The same without the flip: a mirrored digit is another sign, or none."""
    return [*_crop(), *_normalize(mean, std), *_cutout()]


def none(mean: Statistics, std: Statistics) -> list[A.BasicTransform]:
    """Images as they are, normalised."""
    return _normalize(mean, std)


AUGMENTATIONS: dict[str, Callable[[Statistics, Statistics], list[Any]]] = {
    function.__name__: function for function in (crop_flip_cutout, crop_cutout, none)
}


class Augmentation:
    """The named pipeline: uint8 [32, 32, 3] in, normalised float32 of the same shape out.

    Raises UserError for an unknown name.
    """

    def __init__(self, name: str, mean: Statistics, std: Statistics, seed: int) -> None:
        if name not in AUGMENTATIONS:
            raise UserError(f"--augmentation {name!r} is unknown; choose one of: {', '.join(AUGMENTATIONS)}")
        self.seed = seed
        self.pipeline = A.Compose(AUGMENTATIONS[name](mean, std))

    def __call__(self, image: npt.NDArray[np.uint8], epoch: int, index: int) -> npt.NDArray[np.float32]:
        # Left to itself, Albumentations draws the same numbers in every worker and epoch. set_random_state costs
        # 17 us an image where set_random_seed costs 86.
        sequence = np.random.SeedSequence(self.seed, spawn_key=(AUGMENTATION, epoch, index))
        generator = np.random.Generator(np.random.PCG64(sequence))
        self.pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        augmented: npt.NDArray[np.float32] = self.pipeline(image=image)["image"]
        return augmented
