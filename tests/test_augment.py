"""Augmentation: random where it should be, reproducible everywhere."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch

from cifar.data import order
from cifar.data.augment import AUGMENTATIONS, Augmentation
from cifar.data.cache import Data, open_data
from cifar.data.loading import TrainingImages, normalize, training_batches
from cifar.errors import UserError
from cifar.recipes import RECIPES, Recipe

RECIPE = Recipe(global_batch_size=16)


@pytest.fixture(scope="module")
def data(shapes: Path) -> Data:
    return open_data(str(shapes))


def batches(data: Data, name: str, workers: int, start: int = 0, rank: int = 0, ranks: int = 1) -> list[torch.Tensor]:
    images = TrainingImages(data, Augmentation(name, data.mean, data.std, seed=0))
    shares = order.RankBatches(RECIPE, len(data.train_labels), start, 9, rank, ranks)
    return [batch for batch, _ in training_batches(images, shares, workers, torch.device("cpu"))]


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_do_not_depend_on_workers_ranks_or_where_the_run_resumes(name: str, data: Data) -> None:
    here = batches(data, name, workers=0)
    assert all(torch.equal(a, b) for a, b in zip(here, batches(data, name, workers=2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(here[4:], batches(data, name, workers=1, start=4), strict=True))
    halves = zip(*(batches(data, name, workers=1, rank=rank, ranks=2) for rank in (0, 1)), strict=True)
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(here, halves, strict=True))


@pytest.mark.parametrize("name", set(AUGMENTATIONS) - {"none"})
def test_an_image_looks_different_in_each_epoch_and_for_each_seed(name: str, data: Data) -> None:
    image = data.train_images[0]
    of_seed = [Augmentation(name, data.mean, data.std, seed) for seed in (0, 1)]
    seen = [of_seed[0](image, epoch, 0) for epoch in range(8)] + [of_seed[1](image, 0, 0)]
    assert len({array.tobytes() for array in seen}) == len(seen)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_come_out_normalised_float32_and_channels_last(name: str, data: Data) -> None:
    batch = batches(data, name, workers=0)[0]
    assert batch.shape == (16, 3, 32, 32)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_none_is_what_evaluation_does(data: Data) -> None:
    augmented = torch.from_numpy(Augmentation("none", data.mean, data.std, 0)(data.train_images[0], 0, 0))
    evaluated = normalize(torch.from_numpy(data.train_images[:1].copy()), data.mean, data.std)
    torch.testing.assert_close(augmented, evaluated[0].permute(1, 2, 0))


def test_normalised_training_images_have_mean_0_and_deviation_1(data: Data) -> None:
    everything = normalize(torch.from_numpy(data.train_images[:].copy()), data.mean, data.std)
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def parts(image: npt.NDArray[np.uint8], augmented: npt.NDArray[np.float32]) -> tuple[int, int, bool, tuple[int, int]]:
    """The shift, the flip and the cutout's corner that explain an augmented image, by trying them all."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    scaled = np.round(augmented * 255).astype(int)  # made with mean 0 and deviation 1
    found = []
    for top in range(9):
        for left in range(9):
            crop = padded[top : top + 32, left : left + 32].astype(int)
            for flip in (False, True):
                odd = np.argwhere((scaled != (crop[:, ::-1] if flip else crop)).any(axis=2))
                if len(odd) <= 64 and (np.ptp(odd, axis=0) < 8).all():
                    corner = tuple(int(value) for value in odd.min(axis=0))
                    assert (scaled[corner[0] : corner[0] + 8, corner[1] : corner[1] + 8] == 0).all()
                    found.append((top, left, flip, corner))
    assert len(found) == 1, f"{len(found)} explanations"
    return found[0]


@pytest.mark.parametrize("name", ["crop_flip_cutout", "crop_cutout"])
def test_crop_flip_and_cutout_are_what_they_say_and_uniform(name: str) -> None:
    # No two pixels are alike and none is 0, so that each augmented image has one explanation only.
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3)).astype(np.uint8)
    augmentation = Augmentation(name, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), seed=0)
    n = 900
    tops, lefts, flips, corners = zip(*(parts(image, augmentation(image, 0, i)) for i in range(n)), strict=True)
    for shifts in (tops, lefts):
        counts = np.bincount(shifts, minlength=9)
        # 9 equally likely shifts: 100 of each expected, standard deviation 9.4; 5 deviations
        assert abs(counts - n / 9).max() < 47
    rows, columns = np.array(corners).T
    for places in (rows, columns):
        assert (places.min(), places.max()) == (0, 24)
        assert abs(places.mean() - 12) < 5 * 7.2 / np.sqrt(n)  # 25 equally likely places deviate by 7.2
    if name == "crop_cutout":
        assert not any(flips)
    else:
        assert abs(sum(flips) - n / 2) < 5 * np.sqrt(n) / 2


def test_digits_are_not_flipped() -> None:
    assert RECIPES["digits"]().augmentation == "crop_cutout"


def test_an_unknown_augmentation_is_refused_by_name(data: Data) -> None:
    with pytest.raises(UserError, match="'mixup' is unknown; choose one of: crop_flip_cutout"):
        Augmentation("mixup", data.mean, data.std, 0)
