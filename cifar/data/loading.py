"""From the cache to batches of training images, augmented ahead by other processes or at once on the device."""

import atexit
import multiprocessing
import signal
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cifar import stop
from cifar.data import augment, augment_device
from cifar.data.augment import Pipeline
from cifar.data.cache import Data, open_cache
from cifar.data.order import RankBatches, Sample
from cifar.recipes import Recipe

Batch = tuple[torch.Tensor, torch.Tensor]  # images float32 [n, 3, 32, 32] (channels-last), labels int64 [n]


class WorkerImages(Dataset[Batch]):
    """Training images that Albumentations augments, fetched a batch at a time by (epoch, index)."""

    def __init__(self, data: Data, pipeline: Pipeline, seed: int) -> None:
        from cifar.data.augment_albumentations import Augmentation  # half a second to import, and only needed here

        # Only the path: a pickled memory map would be a copy of all the images in every worker that is spawned.
        self.path, self.augmentation = data.path, Augmentation(pipeline, data.mean, data.std, seed)
        self.data: Data | None = None

    def __getitems__(self, samples: list[Sample]) -> Batch:
        self.data = self.data or open_cache(self.path)
        images = np.empty((len(samples), *self.data.train_images.shape[1:]), np.float32)
        for image, (epoch, index) in zip(images, samples, strict=True):
            image[:] = self.augmentation(self.data.train_images[index], epoch, index)
        labels = self.data.train_labels[[index for _, index in samples]].astype(np.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


class ResidentImages:
    """All training images as uint8 on the device, augmented there a batch at a time by (epoch, index).

    On a CPU they are the cache's memory map, which all processes share; on a GPU a copy for each process, 154 MB
    for CIFAR-10.
    """

    def __init__(self, data: Data, pipeline: Pipeline, seed: int, device: torch.device) -> None:
        self.pipeline, self.seed, self.mean, self.std = pipeline, seed, data.mean, data.std
        self.images = torch.from_numpy(data.train_images).to(device)
        self.labels = data.train_labels.astype(np.int64)

    def __getitems__(self, samples: list[Sample]) -> Batch:
        draws = augment_device.draw(self.pipeline, self.seed, samples)
        indices = np.array([index for _, index in samples])
        images = augment_device.augment(self.images, indices, draws, self.pipeline, self.mean, self.std)
        return images, torch.from_numpy(self.labels[indices])


TrainingImages = WorkerImages | ResidentImages


def training_images(recipe: Recipe, data: Data, device: torch.device) -> TrainingImages:
    """The training images, augmented as the recipe says. Raises UserError for an unknown augmentation."""
    pipeline = augment.find(recipe.augmentation)
    if recipe.augment == "device":
        return ResidentImages(data, pipeline, recipe.seed, device)
    return WorkerImages(data, pipeline, recipe.seed)


def training_batches(
    images: TrainingImages, batches: RankBatches, workers: int, device: torch.device
) -> Iterator[Batch]:
    """Goes through `batches`: with `workers` processes, each a few batches ahead, or here where images are resident."""
    if isinstance(images, ResidentImages):
        return map(images.__getitems__, batches)
    loader = DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",  # so that the copy to the device does not wait
    )
    started = iter(loader)
    atexit.register(_end_workers)  # only now, so that it comes before the loader's own waiting for them
    return started


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    import cv2

    stop.obey_parent()  # a stop request is for the training process, which still wants its batches
    cv2.setNumThreads(0)


def _end_workers() -> None:
    """After a crash Python would send them SIGTERM, which they ignore, and then wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take it for a crash of theirs
    for process in multiprocessing.active_children():
        process.kill()
