"""Which images make up batch k: a pure function of (seed, step), whatever the number of ranks.

The training stream is the concatenation of one permutation of the training images per epoch, and batch k is its
k-th slice of `global_batch_size` images. Every image is drawn once per epoch, every batch is full, and an epoch may
end within a batch. Each rank computes only its own share, as arrays.
"""

import copy
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cifar.recipes import Recipe

Integers = npt.NDArray[np.int64]

# First element of the spawn key, so that one seed gives independent random numbers for each use.
ORDER, AUGMENTATION = 0, 1

# Samples computed at once, for several steps if batches are small: hides numpy's call overhead, and fits the
# processor's cache.
BLOCK = 8192


class Samples(NamedTuple):
    """The images of one batch [n], or of several [k, n]."""

    epochs: Integers  # from 0
    indices: Integers  # within the training images


@lru_cache(maxsize=2)  # an epoch's end and the next one's beginning may share a batch
def permutation(seed: int, epoch: int, images: int) -> Integers:
    """Returns the order of the images in an epoch (epochs count from 0)."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(ORDER, epoch)))).permutation(
        images
    )


def batches(seed: int, steps: range, images: int, global_batch_size: int, rank: int = 0, ranks: int = 1) -> Samples:
    """Returns the samples [k, n] of k steps (counted from 0): each a rank's contiguous share of the global batch."""
    share = global_batch_size // ranks
    begins = np.array(steps, np.int64)[:, None] * global_batch_size + rank * share
    epochs, places = np.divmod(begins + np.arange(share), images)
    indices = np.empty_like(places)
    for epoch in range(epochs[0, 0], epochs[-1, -1] + 1):
        here = epochs == epoch
        indices[here] = permutation(seed, epoch, images)[places[here]]
    return Samples(epochs, indices)


def batch(seed: int, step: int, images: int, global_batch_size: int) -> Samples:
    """Returns the samples [n] of one step, for all ranks together."""
    epochs, indices = batches(seed, range(step, step + 1), images, global_batch_size)
    return Samples(epochs[0], indices[0])


class DistributedBatchSampler:
    """A batch sampler: this rank's contiguous share of every global batch from step `start` to step `end`."""

    def __init__(self, recipe: Recipe, images: int, start: int, end: int, rank: int, ranks: int) -> None:
        self.recipe, self.images, self.steps = recipe, images, range(start, end)
        self.rank, self.ranks = rank, ranks

    def __iter__(self) -> Iterator[Samples]:
        """Yields one batch [n] after the other."""
        for block in self.blocks():
            yield from map(Samples, *block)

    def blocks(self) -> Iterator[Samples]:
        """Yields the same, several batches [k, n] at once."""
        at_once = max(1, BLOCK // self.size)
        for first in range(0, len(self.steps), at_once):
            steps = self.steps[first : first + at_once]
            yield batches(self.recipe.seed, steps, self.images, self.recipe.global_batch_size, self.rank, self.ranks)

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def size(self) -> int:
        """Images in each of the batches."""
        return self.recipe.global_batch_size // self.ranks

    def every(self, n: int, first: int) -> "DistributedBatchSampler":
        """Returns every n-th of these batches, from number `first` on."""
        part = copy.copy(self)
        part.steps = self.steps[first::n]
        return part
