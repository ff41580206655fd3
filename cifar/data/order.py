"""Which images make up batch k: a pure function of (seed, step), whatever the number of ranks (law 1).

The training stream is the concatenation of one permutation of the training images per epoch, and batch k is its
k-th slice of `global_batch_size` images. Every image is drawn once per epoch, every batch is full, and an epoch may
end within a batch.
"""

import copy
import math
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cifar.errors import UserError
from cifar.recipes import Recipe

# First element of the spawn key, so that one seed gives independent random numbers for each use.
ORDER, AUGMENTATION, DROPOUT = 0, 1, 2

Sample = tuple[int, int]  # (epoch, index of the image)


def total_steps(images: int, epochs: int, global_batch_size: int) -> int:
    """Optimizer steps until the stream has passed `epochs` times over all images (the last batch may begin another).

    Raises UserError where a batch would be larger than the set of images.
    """
    if global_batch_size > images:
        raise UserError(f"--global-batch-size {global_batch_size} is more than the {images} training images; lower it")
    return math.ceil(images * epochs / global_batch_size)


def epochs_completed(step: int, images: int, global_batch_size: int) -> int:
    """How many whole epochs lie within the first `step` batches."""
    return step * global_batch_size // images


@lru_cache(maxsize=2)  # an epoch's end and the next one's beginning may share a batch
def permutation(seed: int, epoch: int, images: int) -> npt.NDArray[np.int64]:
    """The order of the images in an epoch (epochs count from 0)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(ORDER, epoch)))).permutation(
        images
    )


def batch(seed: int, step: int, images: int, global_batch_size: int) -> list[Sample]:
    """The samples of global batch `step` (steps count from 0)."""
    positions = range(step * global_batch_size, (step + 1) * global_batch_size)
    return [(p // images, int(permutation(seed, p // images, images)[p % images])) for p in positions]


class RankBatches:
    """A batch sampler: this rank's contiguous share of every global batch from step `start` to step `end`."""

    def __init__(self, recipe: Recipe, images: int, start: int, end: int, rank: int, ranks: int) -> None:
        self.recipe, self.images, self.steps = recipe, images, range(start, end)
        share = recipe.global_batch_size // ranks
        self.share = slice(rank * share, (rank + 1) * share)

    def __iter__(self) -> Iterator[list[Sample]]:
        for step in self.steps:
            yield batch(self.recipe.seed, step, self.images, self.recipe.global_batch_size)[self.share]

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def size(self) -> int:
        """Images in each of the batches."""
        return self.share.stop - self.share.start

    def every(self, n: int, first: int) -> "RankBatches":
        """Each n-th of these batches, beginning with the one at place `first`."""
        part = copy.copy(self)
        part.steps = self.steps[first::n]
        return part


def image_size_at(step: int, total_steps: int, recipe: Recipe) -> int:
    """The side of the training images in a step: each of the recipe's sizes for an equal part of the steps."""
    sizes = recipe.image_sizes.split(",")
    return int(sizes[step * len(sizes) // total_steps])


def freeze_step(total_steps: int, recipe: Recipe) -> int:
    """The first step in which the network's beginning does not learn; `total_steps` where it learns to the end."""
    return math.ceil(recipe.freeze_at * total_steps)


def generator_seed(seed: int, step: int, rank: int) -> int:
    """The seed of torch's generator (dropout) for one rank's share of one step."""
    return int(np.random.SeedSequence(seed, spawn_key=(DROPOUT, step, rank)).generate_state(1, np.uint32)[0])
