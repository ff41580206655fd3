"""Augmentation, made image by image and on the device: random where it should be, reproducible everywhere, alike."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy import stats

from cifar.data import augment_device, loading, philox
from cifar.data.augment import AUGMENTATIONS, LEVELS, Pipeline, Statistics, normalize, resize, uniform_offset
from cifar.data.augment_albumentations import Augmentation
from cifar.data.cache import Data, open_data
from cifar.data.sampler import DistributedBatchSampler, Samples
from cifar.errors import UserError
from cifar.recipes import RECIPES, Recipe

CPU = torch.device("cpu")
WAYS = get_args(Recipe.model_fields["augmentation_backend"].annotation)
PLAIN = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # mean and deviation that leave an image as it is, on a scale of 0 to 1

UNLIKELY = 1e-4  # a table less probable than this is refused; all draws are fixed by their seeds


@pytest.fixture(scope="module")
def data(shapes: Path) -> Data:
    return open_data(str(shapes))


def recipe(way: str, name: str, seed: int = 0) -> Recipe:
    return Recipe(augmentation_backend=way, augmentation=name, seed=seed, global_batch_size=16)  # type: ignore[arg-type]


def batches(
    data: Data, way: str, name: str, workers: int, start: int = 0, rank: int = 0, ranks: int = 1
) -> list[torch.Tensor]:
    """With `workers`, as training has them, else each made here and alone."""
    images = loading.training_images(recipe(way, name), data, CPU)
    sampler = DistributedBatchSampler(recipe(way, name), len(data.train_labels), start, 9, rank, ranks)
    if workers:
        return [batch for batch, _ in loading.training_batches(images, sampler, workers, CPU)]
    return [images.__getitems__(samples)[0] for samples in sampler]


def samples(epoch: int, indices: npt.ArrayLike) -> Samples:
    """Images of one epoch."""
    chosen = np.array(indices, np.int64)
    return Samples(np.full_like(chosen, epoch), chosen)


def made(
    images: npt.NDArray[np.uint8], draws: augment_device.Draws, pipeline: Pipeline, *statistics: Statistics
) -> torch.Tensor:
    """As many images as draws, for which the `images` are taken one after the other, over and over."""
    indices = np.arange(len(draws.top)) % len(images)
    plan = augment_device.plan(indices, draws, CPU)
    return augment_device.augment(torch.from_numpy(images), plan, pipeline, *statistics)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_do_not_depend_on_workers_ranks_or_where_the_run_resumes(name: str, way: str, data: Data) -> None:
    here = batches(data, way, name, workers=0)
    assert len(here) == 9
    assert all(torch.equal(a, b) for a, b in zip(here, batches(data, way, name, workers=2), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(here[4:], batches(data, way, name, workers=1, start=4), strict=True))
    for ranks in (2, 8):
        shares = (batches(data, way, name, workers=1, rank=rank, ranks=ranks) for rank in range(ranks))
        assert all(torch.equal(a, torch.cat(b)) for a, b in zip(here, zip(*shares, strict=True), strict=True))


# sha256 of nine batches of 24 of the 64 shapes, and of their labels.
FINGERPRINT = "fbcf3db827d1e9414f45088413786197ef96d70875ecbbc1266531509af91b2b"
GOLDEN = {  # by the way and the augmentation
    "albumentations crop_flip_cutout": "af5e1cab526800d8f5786db1ea513bfd08aecd66d1b1184e86c896581f2afec0",
    "albumentations crop_alternating_flip": "7655b60382e2e4be335f6ddbf89d55df47267e41c8e4f5ec51658e1803d32047",
    "albumentations crop_alternating_flip_light": "8471b0ec2ae03898287451fd54ad1de491f57a7cae4ac2c19e63f0e8e7ab0566",
    "albumentations crop_cutout": "dbe40cb83f91642b3d51a6790f92216ac6c482bdaae93963e8f8fc5a3b5ef9ee",
    "albumentations none": "cd6238fde3059a500a8a0e15d6e9301f27c6c6767dd78aac0f78d68d7e1ec6b7",
    "device crop_flip_cutout": "e5b78afffb353d27a05a041fb1fba2ddab50d5a7362bdaef7c14272234e22d0d",
    "device crop_alternating_flip": "26412db24a7bdeeb583ec85664daab7cc0ba853d6e5c78c9e41409c4e2a2e46b",
    "device crop_alternating_flip_light": "7149ac23c4a8958d002c7d5b7f77122e02aba4f5d573cedbf5fa4e4d44eb3580",
    "device crop_cutout": "fa15b34425ff48655105bf756324e8e644f37f7d41a9149936fb54b8389d9742",
    "device none": "cd6238fde3059a500a8a0e15d6e9301f27c6c6767dd78aac0f78d68d7e1ec6b7",
}


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("way", "number"), [("albumentations", 1), ("device", 1), ("device", 2)])
@pytest.mark.parametrize("name", sorted({name.partition(" ")[2] for name in GOLDEN}))
def test_batches_stay_what_they_are_while_ranks_and_threads_change(
    name: str, way: str, number: int, data: Data, threads: None
) -> None:
    """Others would be as good, but a run that began before a change would not go on as it was."""
    assert data.fingerprint == FINGERPRINT
    torch.set_num_threads(number)
    asked = recipe(way, name, 7).model_copy(update={"global_batch_size": 24})
    images = loading.training_images(asked, replace(data, mean=(0.25, 0.5, 0.4), std=(0.3, 0.2, 0.25)), CPU)
    digest = hashlib.sha256()
    for start, end, ranks in ((0, 4, 8), (4, 7, 2), (7, 9, 1)):
        shares = [
            loading.training_batches(images, DistributedBatchSampler(asked, 64, start, end, rank, ranks), 1, CPU)
            for rank in range(ranks)
        ]
        for of_ranks in zip(*shares, strict=True):
            batch, labels = (torch.cat(parts) for parts in zip(*of_ranks, strict=True))
            digest.update(batch.permute(0, 2, 3, 1).contiguous().numpy().tobytes())
            digest.update(labels.numpy().tobytes())
    assert digest.hexdigest() == GOLDEN[f"{way} {name}"]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
def test_images_look_different_in_each_epoch_and_for_each_seed(name: str, way: str, data: Data) -> None:
    of_seed = [loading.training_images(recipe(way, name, seed), data, CPU) for seed in (0, 1)]
    asked = [(0, epoch) for epoch in range(8)] + [(1, 0)]  # of the seeds
    seen = [of_seed[seed].__getitems__(samples(epoch, range(8)))[0] for seed, epoch in asked]
    assert len({images.numpy().tobytes() for images in seen}) == len(seen)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_images_come_out_normalised_float32_and_channels_last_with_their_labels(
    name: str, way: str, data: Data
) -> None:
    of_two_epochs = Samples(np.array([0, 3, 0]), np.array([40, 2, 63]))
    images, labels = loading.training_images(recipe(way, name), data, CPU).__getitems__(of_two_epochs)
    assert images.shape == (3, 3, 32, 32)
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [data.train_labels[index] for index in (40, 2, 63)]


@pytest.mark.parametrize("way", WAYS)
def test_none_is_what_evaluation_does(way: str, data: Data) -> None:
    augmented, _ = loading.training_images(recipe(way, "none"), data, CPU).__getitems__(samples(1, [5, 7]))
    assert torch.equal(augmented, normalize(torch.from_numpy(data.train_images[[5, 7]]), data.mean, data.std))


def test_normalised_training_images_have_mean_0_and_deviation_1(data: Data) -> None:
    everything = normalize(torch.from_numpy(data.train_images), data.mean, data.std)
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-4, rtol=0)


def test_images_on_the_cpu_are_the_caches_memory_map_which_nothing_can_change(shapes: Path) -> None:
    data = open_data(str(shapes))
    images = loading.DeviceDataset(data, AUGMENTATIONS["crop_flip_cutout"], 0, CPU)
    assert images.images.data_ptr() == data.train_images.ctypes.data
    before = open_data(str(shapes)).train_images.tobytes()
    images.images.zero_()  # a mistake that would stay within this process
    assert open_data(str(shapes)).train_images.tobytes() == before


CRASH = """
import sys, torch
from cifar.data import loading, sampler
from cifar.data.cache import open_data
from cifar.recipes import Recipe
recipe, cpu = Recipe(global_batch_size=16), torch.device("cpu")
images = loading.training_images(recipe, open_data(sys.argv[1]), cpu)
batches = loading.training_batches(images, sampler.DistributedBatchSampler(recipe, 64, 0, 100, 0, 1), 2, cpu)
next(batches)
raise RuntimeError("as when memory runs out")
"""


def test_after_a_crash_the_worker_processes_do_not_keep_the_program_from_ending(shapes: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, shapes], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: as when memory runs out"


# ---- what is drawn


def augmented(way: str, name: str, image: npt.NDArray[np.uint8], n: int) -> list[npt.NDArray[np.float32]]:
    """One image as n samples of a training set, each augmented once."""
    pipeline = AUGMENTATIONS[name]
    if way == "albumentations":
        augmentation = Augmentation(pipeline, *PLAIN, seed=0)
        return [augmentation(image, 0, index) for index in range(n)]
    draws = augment_device.draw(pipeline, 0, samples(0, range(n)))
    return list(made(image[None], draws, pipeline, *PLAIN).permute(0, 2, 3, 1).numpy())


Parts = tuple[int, int, bool, tuple[int, int]]


def explain(image: npt.NDArray[np.uint8], seen: list[npt.NDArray[np.float32]]) -> list[Parts]:
    """The shift, the flip and the cutout's corner that explain each augmented image, by trying them all."""
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    ways = [(top, left, flip) for top in range(9) for left in range(9) for flip in (False, True)]
    crops = [padded[top : top + 32, left : left + 32] for top, left, _ in ways]
    candidates = np.stack([crop[:, ::-1] if flip else crop for crop, (_, _, flip) in zip(crops, ways, strict=True)])
    found: list[Parts] = []
    for one in seen:
        scaled = np.round(one * 255).astype(np.uint8)  # made with mean 0 and deviation 1
        odd = (scaled != candidates).any(axis=3)
        (number,) = np.flatnonzero(odd.sum(axis=(1, 2)) <= 64)  # one explanation and no more
        rows, columns = np.nonzero(odd[number])
        assert len(rows) == 64
        assert np.ptp(rows) == np.ptp(columns) == 7
        assert not scaled[rows, columns].any()
        found.append((*ways[number], (int(rows[0]), int(columns[0]))))
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["crop_flip_cutout", "crop_cutout"])
def test_crop_flip_and_cutout_are_what_they_say_and_uniform(name: str, way: str) -> None:
    # No two pixels are alike and none is 0, so that each augmented image has one explanation only.
    image = np.random.default_rng(0).integers(1, 256, (32, 32, 3)).astype(np.uint8)
    n = 900
    tops, lefts, flips, corners = zip(*explain(image, augmented(way, name, image, n)), strict=True)
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


def drawn(augmentation: Augmentation) -> augment_device.Draws:
    """What Albumentations drew for its last image; 0 where a pipeline lacks a choice."""
    applied = {type(transform).__name__: transform.get_applied_params() for transform in augmentation.pipeline}
    left, top, _, _ = applied.get("RandomCrop", {}).get("crop_coords", (0, 0, 0, 0))
    hole_left, hole_top, _, _ = applied.get("CoarseDropout", {}).get("holes", [(0, 0, 0, 0)])[0]
    light = (applied.get("BrightnessContrast", {}).get(what, 0) for what in ("brightness", "contrast"))
    return augment_device.Draws(top, left, int(bool(applied.get("HorizontalFlip"))), hole_top, hole_left, *light)


ALONE = {
    "crop": Pipeline(padding=4),
    "flip": Pipeline(flip="random"),
    "brightness": Pipeline(brightness=0.3),
    "contrast": Pipeline(contrast=0.3),
    "cutout": Pipeline(cutout=8),
}
ALL = Pipeline(padding=4, flip="random", brightness=0.14, contrast=0.13, cutout=8)


# An alternating flip is no draw of Albumentations'.
@pytest.mark.parametrize(
    "name", [n for n, p in (ALONE | {"all": ALL} | AUGMENTATIONS).items() if p.flip != "alternating"]
)
def test_for_the_same_draws_both_ways_make_the_same_image_bit_for_bit(name: str, data: Data) -> None:
    pipeline = (ALONE | {"all": ALL} | AUGMENTATIONS)[name]
    augmentation = Augmentation(pipeline, data.mean, data.std, seed=3)
    expected, numbers = [], []
    for index in range(len(data.train_images)):
        expected.append(augmentation(data.train_images[index], 0, index))
        numbers.append(drawn(augmentation))
    draws = augment_device.Draws(*np.array(numbers).T)
    seen = made(data.train_images, draws, pipeline, data.mean, data.std)
    assert np.array_equal(seen.permute(0, 2, 3, 1).numpy(), np.stack(expected))


def uniform(values: npt.NDArray[np.int64], choices: int) -> bool:
    """Whether all of 0 to choices - 1 occur, and nothing else, equally often (chi-square)."""
    counts = np.bincount(values)
    equally = choices == 1 or stats.chisquare(counts).pvalue > UNLIKELY
    return len(counts) == choices and counts.min() > 0 and equally


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_both_ways_draw_the_same_values_equally_often(name: str, way: str) -> None:
    pipeline, n = AUGMENTATIONS[name], 10_000
    if way == "device":
        draws = augment_device.draw(pipeline, 0, samples(0, range(n)))
    else:
        augmentation, numbers = Augmentation(pipeline, *PLAIN, seed=0), []
        for index in range(n):
            augmentation(np.zeros((32, 32, 3), np.uint8), 0, index)
            numbers.append(drawn(augmentation))
        draws = augment_device.Draws(*np.array(numbers).T)
    places = 2 * pipeline.padding + 1
    assert uniform(draws.top * places + draws.left, places**2)
    if pipeline.flip != "alternating" or way == "device":
        assert uniform(draws.mirrored, 1 + (pipeline.flip != "never"))
    if pipeline.cutout:
        assert uniform(draws.hole_top * 25 + draws.hole_left, 625)
    if pipeline.brightness:
        assert uniform(draws.brightness, LEVELS)
        assert uniform(draws.contrast, LEVELS)


def test_brightness_is_added_to_a_normalised_image_and_contrast_multiplies_the_sum() -> None:
    image, mean, std = np.full((1, 32, 32, 3), 100, np.uint8), (0.2, 0.3, 0.4), (0.1, 0.2, 0.3)
    pipeline = Pipeline(brightness=0.5, contrast=0.25)
    draws = augment_device.Draws(*[np.zeros(4, int)] * 5, np.array([0, 0, 255, 255]), np.array([0, 255, 0, 255]))
    seen = made(image, draws, pipeline, mean, std)[:, :, 0, 0]
    plain = (100 / 255 - np.array(mean)) / np.array(std)
    expected = [(plain + shift) * scale for shift in (-0.5, 0.5) for scale in (0.75, 1.25)]
    torch.testing.assert_close(seen.double(), torch.tensor(np.array(expected)), rtol=1e-6, atol=1e-6)
    assert uniform_offset(np.arange(LEVELS), 0.5).mean() == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("way", WAYS)
def test_an_alternating_flip_shows_both_sides_in_every_two_epochs_and_begins_with_either(way: str) -> None:
    image = np.zeros((32, 32, 3), np.uint8)
    image[:, :8] = 255  # bright at the left, further in than a crop can move it
    pipeline, n = AUGMENTATIONS["crop_alternating_flip"], 400
    mirrored = np.zeros((4, n), bool)
    for epoch in range(4):
        if way == "device":
            seen = made(image[None], augment_device.draw(pipeline, 0, samples(epoch, range(n))), pipeline, *PLAIN)
            mirrored[epoch] = seen[:, 0, 16, 29] > 0.5
        else:
            augmentation = Augmentation(pipeline, *PLAIN, seed=0)
            mirrored[epoch] = [augmentation(image, epoch, index)[16, 29, 0] > 0.5 for index in range(n)]
    assert (mirrored[0] != mirrored[1]).all()
    assert (mirrored[0] == mirrored[2]).all()
    assert (mirrored[1] == mirrored[3]).all()
    assert abs(mirrored[0].sum() - n / 2) < 5 * np.sqrt(n) / 2


@pytest.mark.parametrize("size", [16, 24, 28, 32, 40])
def test_resizing_keeps_the_whole_picture(size: int) -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 3, 32, 32)
    resized = resize(ramp, size)
    assert resized.shape == (1, 3, size, size)
    assert resized.mean().item() == pytest.approx(0.5, abs=1e-6)  # a part of it would be brighter or darker
    assert resized[0, 0, 0, 0] < 0.05
    assert resized[0, 0, 0, -1] > 0.95


def test_draws_of_neighbouring_images_epochs_seeds_and_choices_are_independent() -> None:
    pipeline, n = ALL, 20_000
    here = augment_device.draw(pipeline, 0, samples(0, range(n)))
    others = {
        "the next image": augment_device.draw(pipeline, 0, samples(0, range(1, n + 1))),
        "the next epoch": augment_device.draw(pipeline, 0, samples(1, range(n))),
        "the next seed": augment_device.draw(pipeline, 1, samples(0, range(n))),
        "a seed that differs in its high half": augment_device.draw(pipeline, 1 << 32, samples(0, range(n))),
    }
    pairs = {f"{a} and {b}": (getattr(here, a), getattr(here, b)) for a, b in combinations(here._fields, 2)}
    pairs |= {
        f"{field} and that of {what}": (getattr(here, field), getattr(there, field))
        for what, there in others.items()
        for field in here._fields
    }
    assert len(pairs) == 49
    for what, pair in pairs.items():
        # Levels of light eight at a time: each cell of a table needs a few draws.
        first, second = (values // 8 if values.max() == LEVELS - 1 else values for values in pair)
        table = np.zeros((first.max() + 1, second.max() + 1))
        np.add.at(table, (first, second), 1)
        assert stats.chi2_contingency(table).pvalue > UNLIKELY, what


def test_no_two_samples_of_any_epoch_and_seed_share_their_random_words() -> None:
    seeds = (0, 1, 2, 2**32, 2**63 - 1)
    epochs, indices = np.meshgrid(np.arange(40), np.arange(500))
    counters = np.zeros((4, epochs.size), np.uint64)
    counters[0], counters[1] = indices.ravel(), epochs.ravel()
    words = np.concatenate([philox.words(seed, *counters) for seed in seeds], axis=1)
    assert len(np.unique(words, axis=1).T) == len(seeds) * epochs.size


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_gives_the_known_answers(counter: str, key: str, expected: str) -> None:
    """Those that its authors publish: Random123 1.14, tests/kat_vectors, "philox4x32 10"."""
    low, high = (int(word, 16) for word in key.split())
    words = philox.words(low + (high << 32), *np.array([[int(word, 16)] for word in counter.split()], np.uint64))
    assert [f"{int(word):08x}" for word in words[:, 0]] == expected.split()


def test_draws_stay_what_they_are() -> None:
    """Other numbers would be as good, but a run that began before a change would not go on as it was."""
    of_two_epochs = Samples(np.array([3, 0]), np.array([41, 0]))
    draws = augment_device.draw(AUGMENTATIONS["crop_flip_cutout"], 7, of_two_epochs)
    assert np.array(draws).tolist() == [[0, 7], [4, 4], [0, 0], [9, 15], [18, 5], [0, 0], [0, 0]]


def test_words_become_numbers_below_their_bound() -> None:
    ends = np.array([0, 2**32 - 1], np.uint64)
    for bound in (1, 2, 9, 25):
        assert philox.below(np.array([bound], np.uint64), ends).tolist() == [0, bound - 1]


# ---- names


def test_digits_are_not_flipped() -> None:
    assert RECIPES["digits"]().augmentation == "crop_cutout"
    assert AUGMENTATIONS["crop_cutout"].flip == "never"


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_augmentation_is_refused_by_name(way: str, data: Data) -> None:
    with pytest.raises(UserError, match="'mixup' is unknown; choose one of: crop_flip_cutout"):
        loading.training_images(recipe(way, "mixup"), data, CPU)
