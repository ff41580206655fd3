"""Launched by test_parallel.py with one or more processes: writes what each rank was given, and the mean gradient."""

import sys
from pathlib import Path
from typing import get_args

import torch
from safetensors.torch import save_file

from cifar import evaluation, failure, launch, loop
from cifar.data import loading, sampler
from cifar.data.cache import open_data
from cifar.recipes import Recipe, override

STEPS = 6


def main(data_path: str, output: str, accumulation_steps: int) -> None:
    accelerator = launch.start()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    recipe = Recipe(global_batch_size=16, gradient_accumulation_steps=accumulation_steps)
    data = open_data(data_path)
    shares = sampler.DistributedBatchSampler(recipe, len(data.train_labels), 0, STEPS, rank, ranks)
    given = {}
    for way in get_args(Recipe.model_fields["augmentation_backend"].annotation):
        images = loading.training_images(override(recipe, {"augmentation_backend": way}), data, accelerator.device)
        batches = list(loading.training_batches(images, shares, 1, accelerator.device))
        given |= {f"images.{way}.{step}": batch.contiguous() for step, (batch, _) in enumerate(batches)}
        given |= {f"labels.{way}.{step}": labels for step, (_, labels) in enumerate(batches)}

    torch.manual_seed(rank)  # another start on each rank: rank 0's weights must win
    # Pooled to one size, since test-time augmentation shows images at several.
    network = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, len(data.classes))
    )
    model = accelerator.prepare(network)
    totals = loop.accumulate_gradients(accelerator, recipe, loop.OwnWork(accelerator.device), model, *batches[0])
    delayed = loop.DelayedMetrics(accelerator)
    (metrics,) = delayed.add(1, totals) + delayed.read()  # on a GPU they come later
    images = torch.from_numpy(data.test_images)
    evaluated = evaluation.evaluate(accelerator, network, images, data, tta=True)
    assert evaluated is not None
    save_file(
        {
            **given,
            "gradient": network[2].weight.grad,  # type: ignore[dict-item]
            "totals": torch.tensor([metrics.loss, metrics.correct]),
            "probabilities": torch.from_numpy(evaluated.probabilities),
            "evaluation": torch.tensor([evaluated.loss, evaluated.accuracy, evaluated.accuracy_tta]),
        },
        Path(output, f"{ranks}-{accumulation_steps}-{rank}.safetensors"),
    )
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    failure.leave(0)
