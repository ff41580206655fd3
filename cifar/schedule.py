"""Everything that depends on the step: learning rate, image size, freezing, epochs, saves, seeds.

Each depends on the step and the recipe alone, never on the number of ranks or on where a run was resumed.
"""

import math

import numpy as np

from cifar.errors import UserError
from cifar.recipes import Recipe

WARMUP_START = 1 / 25  # of the peak learning rate, at step 0
DROPOUT = 2  # first element of the spawn key; data/sampler.py has the others, so that one seed serves all uses


class Schedule:
    """What happens in which optimizer step of a run over `images` training images. Steps count from 0.

    Raises UserError where a batch is larger than the set of images.
    """

    def __init__(self, recipe: Recipe, images: int, checkpoint_every: int = 0) -> None:
        self.recipe, self.images, self.checkpoint_every = recipe, images, checkpoint_every
        if recipe.global_batch_size > images:
            raise UserError(
                f"--global-batch-size {recipe.global_batch_size} is more than the {images} training images; lower it"
            )
        # Until `epochs` passes over all images are complete; the last batch may begin another.
        self.total_steps = math.ceil(images * recipe.epochs / recipe.global_batch_size)
        # The first step in which the early layers are frozen; `total_steps` where they learn to the end.
        self.freeze_step = math.ceil(recipe.freeze_at * self.total_steps)

    def epochs_completed(self, steps: int) -> int:
        """Returns how many whole epochs lie within the first `steps` batches."""
        return epochs_completed(steps, self.images, self.recipe.global_batch_size)

    def completes_epoch(self, steps: int) -> bool:
        """Returns whether the last of the first `steps` batches completes an epoch."""
        return steps > 0 and self.epochs_completed(steps) > self.epochs_completed(steps - 1)

    def saves(self, steps: int) -> bool:
        """Returns whether a checkpoint is due after so many steps. Needs a `checkpoint_every` of at least 1."""
        return self.completes_epoch(steps) or steps % self.checkpoint_every == 0

    def learning_rate(self, step: int) -> float:
        """Returns the learning rate of a step in one cycle.

        It is linear from 1/25 of the peak up to it at `peak_epoch`, and linear down to zero at the end. There is no
        final annihilation phase: the rate would reach 0 one step after the last. With `peak_epoch` 0 there is no
        warm-up.
        """
        peak_step = self.total_steps * self.recipe.peak_epoch / self.recipe.epochs
        if step < peak_step:
            return self.recipe.peak_learning_rate * (WARMUP_START + (1 - WARMUP_START) * step / peak_step)
        return self.recipe.peak_learning_rate * (self.total_steps - step) / (self.total_steps - peak_step)

    def image_size(self, step: int) -> int:
        """Returns the side of a step's training images: each of the recipe's sizes for an equal part of the steps."""
        sizes = self.recipe.image_sizes.split(",")
        return int(sizes[step * len(sizes) // self.total_steps])

    def generator_seed(self, step: int, rank: int) -> int:
        """Returns the seed of torch's generator (dropout) for one rank's part of one step."""
        sequence = np.random.SeedSequence(self.recipe.seed, spawn_key=(DROPOUT, step, rank))
        return int(sequence.generate_state(1, np.uint32)[0])


def epochs_completed(steps: int, images: int, global_batch_size: int) -> int:
    """Returns how many whole epochs of so many images lie within the first `steps` batches."""
    return steps * global_batch_size // images
