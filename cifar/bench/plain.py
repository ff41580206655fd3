"""The baseline `plain`: a naive training loop for the same recipe as train.py.

The recipe's network, images, batch size, augmentation, loss and evaluation, with Adam; but float32, torch's default
memory layout, per-image transforms in the training process, no prefetching.

    python -m cifar.bench.plain <arguments of train.py>
"""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from cifar import device, models
from cifar.bench import interleave
from cifar.bench.interleave import Answer
from cifar.data.cache import Data, open_data
from cifar.errors import UserError, command_line
from cifar.recipes import Recipe, parse_command_line

# The recipe's augmentations as torchvision's transforms: before and after an image becomes a normalised tensor.
CROP = [transforms.Pad(4, padding_mode="reflect"), transforms.RandomCrop(32)]
SMALL_CROP = [transforms.Pad(2, padding_mode="reflect"), transforms.RandomCrop(32)]
CUTOUT = [transforms.RandomErasing(p=1, scale=(1 / 16, 1 / 16), ratio=(1, 1), value=0)]  # 8x8 of 32x32, wholly inside
LIGHT = transforms.Lambda(lambda image: (image + random.uniform(-0.14, 0.14)) * random.uniform(0.87, 1.13))
TRANSFORMS: dict[str, tuple[list[Any], list[Any]]] = {
    "crop_flip_cutout": ([*CROP, transforms.RandomHorizontalFlip()], CUTOUT),
    "crop_alternating_flip": ([*SMALL_CROP, transforms.RandomHorizontalFlip()], []),  # as much work as alternating
    "crop_alternating_flip_light": ([*SMALL_CROP, transforms.RandomHorizontalFlip()], [LIGHT]),
    "crop_cutout": (CROP, CUTOUT),
    "none": ([], []),
}


class Images(Dataset[tuple[torch.Tensor, int]]):
    """One split, an image at a time."""

    def __init__(self, data: Data, split: str, before: list[Any], after: list[Any]) -> None:
        self.images = {"train": data.train_images, "test": data.test_images}[split]
        self.labels = {"train": data.train_labels, "test": data.test_labels}[split]
        self.transform = transforms.Compose(
            [*before, transforms.ToTensor(), transforms.Normalize(data.mean, data.std), *after]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image: torch.Tensor = self.transform(Image.fromarray(self.images[index]))
        return image, int(self.labels[index])


class Plain:
    """Network, optimizer and images of a recipe, and the requests that it answers."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        if recipe.augmentation not in TRANSFORMS:
            raise UserError(f"cifar/bench/plain.py does not know augmentation {recipe.augmentation!r}; write it there")
        self.recipe, self.path = recipe, folder.with_suffix(".pt")
        self.device = torch.device(device.decide(1).kind)
        data = open_data(recipe.data, fit=recipe.fit > 0)
        self.images = Images(data, "train", *TRANSFORMS[recipe.augmentation])
        self.test_images = Images(data, "test", [], [])
        torch.manual_seed(recipe.seed)
        self.network = models.build(recipe.network, len(data.classes), recipe.dropout).to(self.device)
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=recipe.peak_learning_rate / 25, weight_decay=recipe.weight_decay
        )
        self.batches = self.epochs()

    def epochs(self) -> Iterator[list[torch.Tensor]]:
        """Yields training batches without end."""
        loader = DataLoader(self.images, batch_size=self.recipe.global_batch_size, shuffle=True, drop_last=True)
        while True:
            yield from loader

    def train(self, amount: int, uncounted: int = 1) -> Answer:
        """Times `amount` steps, after `uncounted` warm-up steps."""
        seconds = input_seconds = 0.0
        for step in range(-uncounted, amount):
            began = time.perf_counter()
            images, labels = (tensor.to(self.device) for tensor in next(self.batches))
            made = time.perf_counter()
            loss = F.cross_entropy(self.network(images), labels, label_smoothing=self.recipe.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            interleave.synchronize(self.device.type)
            if step >= 0:
                seconds += time.perf_counter() - began
                input_seconds += made - began
        return {"amount": amount, "seconds": seconds, "input": input_seconds, "at": time.time()}

    def evaluate(self, amount: int) -> Answer:
        """Evaluates `amount` test images, in batches as large as the project's own."""
        from cifar.evaluation import EVALUATION_BATCH

        chosen = [index % len(self.test_images) for index in range(amount)]
        loader = DataLoader(self.test_images, batch_size=EVALUATION_BATCH, sampler=chosen)
        loss, right = 0.0, 0
        began = time.perf_counter()
        self.network.eval()
        with torch.no_grad():
            for images, labels in loader:
                logits, truth = self.network(images.to(self.device)), labels.to(self.device)
                loss += F.cross_entropy(logits, truth, reduction="sum").item()
                right += int((logits.argmax(1) == truth).sum())
        self.network.train()
        return {"amount": amount, "seconds": time.perf_counter() - began, "loss": loss / amount, "correct": right}

    def input(self, amount: int) -> Answer:
        """Makes `amount` training images, on one core."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        size = min(amount, self.recipe.global_batch_size)
        batches = iter(DataLoader(self.images, batch_size=size, sampler=[i % 1024 for i in range(amount)]))
        began = time.perf_counter()
        for _ in batches:
            pass
        seconds = time.perf_counter() - began
        torch.set_num_threads(threads)
        return {"amount": amount, "seconds": seconds}

    def save(self, amount: int) -> Answer:
        began = time.perf_counter()
        for _ in range(amount):
            torch.save({"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}, self.path)
        return {"amount": amount, "seconds": time.perf_counter() - began}

    def restore(self, amount: int) -> Answer:
        """Reads them again."""
        began = time.perf_counter()
        for _ in range(amount):
            state = torch.load(self.path, map_location=self.device)
            self.network.load_state_dict(state["network"])
            self.optimizer.load_state_dict(state["optimizer"])
        return {"amount": amount, "seconds": time.perf_counter() - began}


def main() -> None:
    with command_line("plain"):
        recipe, options = parse_command_line(sys.argv[1:])
        plain = Plain(recipe, options.run_dir)
        interleave.serve({name: getattr(plain, name) for name in ("train", "evaluate", "input", "save", "restore")})


if __name__ == "__main__":
    main()
