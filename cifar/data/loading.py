"""From the cache to batches: worker processes augment ahead of the training, evaluation reads in order."""

from typing import Any

import cv2
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cifar import stop
from cifar.data.augment import Augmentation, Statistics
from cifar.data.cache import Data, open_cache
from cifar.data.order import RankBatches, Sample

Batch = tuple[torch.Tensor, torch.Tensor]  # images float32 [n, 3, 32, 32] (channels-last), labels int64 [n]


class TrainingImages(Dataset[Batch]):
    """Augmented training images, fetched a batch at a time by (epoch, index)."""

    def __init__(self, data: Data, augmentation: Augmentation) -> None:
        # Only the path: a pickled memory map would be a copy of all the images in every worker that is spawned.
        self.path, self.augmentation = data.path, augmentation
        self.data: Data | None = None

    def __getitems__(self, samples: list[Sample]) -> Batch:
        self.data = self.data or open_cache(self.path)
        images = np.empty((len(samples), *self.data.train_images.shape[1:]), np.float32)
        for image, (epoch, index) in zip(images, samples, strict=True):
            image[:] = self.augmentation(self.data.train_images[index], epoch, index)
        labels = self.data.train_labels[[index for _, index in samples]].astype(np.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)


def training_batches(
    images: TrainingImages, batches: RankBatches, workers: int, device: torch.device
) -> DataLoader[Batch]:
    """A loader that goes through `batches` with `workers` processes (0: in this one), each a few batches ahead."""
    return DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=_as_it_is,
        num_workers=workers,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",  # so that the copy to the device does not wait
    )


def _as_it_is(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    stop.obey_parent()  # a stop request is for the training process, which still wants its batches
    cv2.setNumThreads(0)


def normalize(images: torch.Tensor, mean: Statistics, std: Statistics) -> torch.Tensor:
    """uint8 [n, 32, 32, 3] to normalised float32 [n, 3, 32, 32], channels-last: what Albumentations' Normalize does."""
    scaled = images.float() / 255
    return ((scaled - scaled.new_tensor(mean)) / scaled.new_tensor(std)).permute(0, 3, 1, 2)
