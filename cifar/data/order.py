"""Which images make up batch k: a pure function of (seed, step), whatever the number of ranks (law 1).

The training stream is the concatenation of one permutation of the training images per epoch, and batch k is its
k-th slice of `global_batch_size` images. Every image is drawn once per epoch, every batch is full, and an epoch may
end within a batch.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from cifar.recipes import Recipe

# First element of the spawn key, so that one seed gives independent random numbers for each use (see schedule.py, too).
ORDER, AUGMENTATION = 0, 1

Sample = tuple[int, int]  # (epoch, index of the image)


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
