"""Augmentation with Albumentations, image by image, as a pure function of (seed, epoch, index)."""

import os
import random
from typing import Any

import numpy as np
import numpy.typing as npt

from cifar.data.augment import LEVELS, Pipeline, Statistics, uniform_offset
from cifar.data.sampler import AUGMENTATION
from cifar.data.sources import SIZE

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # else it checks a package index for updates at import

import albumentations as A
import cv2


class BrightnessContrast(A.ImageOnlyTransform):  # type: ignore[misc]  # Albumentations has no types
    """Brightness and contrast of normalised images; Albumentations' own transform clips to [0, 1]."""

    def __init__(self, brightness: float, contrast: float) -> None:
        super().__init__(p=1)
        self.brightness, self.contrast = brightness, contrast

    def get_params(self) -> dict[str, int]:
        """Draws a level for each."""
        return {"brightness": self.py_random.randrange(LEVELS), "contrast": self.py_random.randrange(LEVELS)}

    def apply(self, img: npt.NDArray[np.float32], brightness: int, contrast: int, **_: Any) -> npt.NDArray[np.float32]:
        """Returns the image with this brightness and contrast (levels)."""
        shift = uniform_offset(np.array(brightness), self.brightness)
        more = uniform_offset(np.array(contrast), self.contrast)
        return (img + shift) * (1 + more)


def _transforms(pipeline: Pipeline, mean: Statistics, std: Statistics) -> list[A.BasicTransform]:
    transforms: list[A.BasicTransform] = []
    if pipeline.padding:
        transforms += [A.Pad(pipeline.padding, border_mode=cv2.BORDER_REFLECT_101), A.RandomCrop(SIZE, SIZE)]
    if pipeline.flip == "random":
        transforms += [A.HorizontalFlip(p=0.5)]
    transforms += [A.Normalize(mean, std, max_pixel_value=255)]
    if pipeline.brightness or pipeline.contrast:
        transforms += [BrightnessContrast(pipeline.brightness, pipeline.contrast)]
    if pipeline.cutout:
        side = (pipeline.cutout, pipeline.cutout)
        transforms += [A.CoarseDropout((1, 1), hole_height_range=side, hole_width_range=side, fill=0, p=1)]
    return transforms


class Augmentation:
    """A pipeline of Albumentations: uint8 [32, 32, 3] in, normalised float32 of the same shape out."""

    def __init__(self, pipeline: Pipeline, mean: Statistics, std: Statistics, seed: int) -> None:
        self.seed, self.alternating = seed, pipeline.flip == "alternating"
        self.pipeline = A.Compose(_transforms(pipeline, mean, std))

    def __call__(self, image: npt.NDArray[np.uint8], epoch: int, index: int) -> npt.NDArray[np.float32]:
        # Left to itself, Albumentations draws the same numbers in every worker and epoch. set_random_state costs
        # 17 us an image where set_random_seed costs 86.
        sequence = np.random.SeedSequence(self.seed, spawn_key=(AUGMENTATION, epoch, index))
        generator = np.random.Generator(np.random.PCG64(sequence))
        if self.alternating:
            # Albumentations has no epochs. Flipping first changes nothing, as all else is symmetric.
            of_image = np.random.SeedSequence(self.seed, spawn_key=(AUGMENTATION, index))
            if (int(of_image.generate_state(1)[0]) + epoch) % 2:
                image = np.ascontiguousarray(image[:, ::-1])
        self.pipeline.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        augmented: npt.NDArray[np.float32] = self.pipeline(image=image)["image"]
        return augmented
