"""What a run does in which step, as functions of the step: the same on all ranks and after every resume."""

import math

import numpy as np

from cifar.data.sampler import DROPOUT
from cifar.errors import UserError
from cifar.recipes import Recipe


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
