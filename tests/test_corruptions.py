"""Damage to pictures: seeded, of one picture at a time, and the more severe the further from what was there."""

import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from cifar.data.cache import Data, open_data
from cifar.explain import corruptions, robustness
from cifar.explain.corruptions import KINDS, SEVERITIES, Random, corrupt
from cifar.explain.findings import FLIPS, Robustness

CIFAR_10_C = {
    *("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    *("snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def photographs(count: int) -> np.ndarray:
    """Pictures with the statistics of photographs: coloured noise of every size, the larger the stronger."""
    generator = np.random.default_rng(0)
    pictures = np.zeros((count, 32, 32, 3), np.float32)
    for cells in (2, 4, 8, 16, 32):
        for noise, picture in zip(generator.random((count, cells, cells, 3), np.float32), pictures, strict=True):
            np.add(picture, cv2.resize(noise, (32, 32), interpolation=cv2.INTER_CUBIC) * cells**-0.8, out=picture)
    pictures -= pictures.min(axis=(1, 2, 3), keepdims=True)
    return np.rint(255 * pictures / pictures.max(axis=(1, 2, 3), keepdims=True)).astype(np.uint8)


@pytest.fixture(scope="module", params=["digits", "photographs"])
def pictures(request: pytest.FixtureRequest) -> np.ndarray:
    return np.array(open_data("digits").test_images[:120]) if request.param == "digits" else photographs(120)


def test_the_kinds_are_those_of_cifar_10_c() -> None:
    assert set(KINDS) == CIFAR_10_C
    assert all(len(kind.levels) == SEVERITIES == 5 for kind in KINDS.values())


@every_kind
def test_a_corrupted_picture_is_its_own_whatever_it_is_made_together_with(kind: str, pictures: np.ndarray) -> None:
    indices = np.arange(len(pictures))
    for severity in (1, 5):
        together = corrupt(kind, severity, pictures, indices, 3)
        assert (together.shape, together.dtype) == (pictures.shape, np.uint8)
        np.testing.assert_array_equal(corrupt(kind, severity, pictures, indices, 3), together)
        shuffled = np.random.default_rng(0).permutation(indices)
        np.testing.assert_array_equal(corrupt(kind, severity, pictures[shuffled], shuffled, 3), together[shuffled])
        for image in (0, 7, 119):
            alone = corrupt(kind, severity, pictures[image : image + 1], np.array([image]), 3)
            np.testing.assert_array_equal(alone[0], together[image])


@every_kind
def test_every_picture_changes_and_more_with_severity(kind: str, pictures: np.ndarray) -> None:
    distances = []
    for severity in range(1, SEVERITIES + 1):
        corrupted = corrupt(kind, severity, pictures, np.arange(len(pictures)), 0)
        assert (corrupted != pictures).any(axis=(1, 2, 3)).all()
        distances.append(np.abs(corrupted.astype(float) - pictures).mean())
    assert distances == sorted(set(distances))


@every_kind
def test_another_seed_or_position_draws_other_numbers_where_any_are_drawn(kind: str) -> None:
    picture = photographs(1)
    random = Random(kind, np.array([0]), 0)
    KINDS[kind].corruption(picture.astype(np.float32) / 255, KINDS[kind].levels[4], random)
    first = corrupt(kind, 5, picture, np.array([0]), 0)
    for index, seed in ((0, 1), (1, 0), (0, 2**70)):
        other = corrupt(kind, 5, picture, np.array([index]), seed)
        assert (other != first).any() == (random.draws > 0)


def test_only_light_lenses_and_files_draw_nothing() -> None:
    """A kind that is random must not become fixed unnoticed."""
    fixed = set()
    for kind, (corruption, levels) in KINDS.items():
        random = Random(kind, np.array([0]), 0)
        corruption(photographs(1).astype(np.float32) / 255, levels[0], random)
        fixed |= set() if random.draws else {kind}
    assert fixed == {"defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression"}


def test_kinds_and_draws_have_numbers_of_their_own() -> None:
    indices = np.arange(3)
    random = Random("fog", indices, 0)
    drawn = [*random.uniform(8), *random.uniform(8), *Random("snow", indices, 0).uniform(8)]
    assert len({values.tobytes() for values in drawn}) == 9


def test_what_some_kinds_do_is_what_they_say() -> None:
    pictures = np.full((400, 32, 32, 3), 128, np.uint8)
    indices = np.arange(400)
    for severity, (deviation, part) in enumerate(
        zip(KINDS["gaussian_noise"].levels, KINDS["impulse_noise"].levels, strict=True), start=1
    ):
        noise = corrupt("gaussian_noise", severity, pictures, indices, 0).astype(float) - 128
        assert noise.mean() == pytest.approx(0, abs=0.1)
        assert noise.std() / 255 == pytest.approx(deviation, rel=0.02)
        impulses = corrupt("impulse_noise", severity, pictures, indices, 0)
        assert set(np.unique(impulses)) == {0, 128, 255}
        assert (impulses != 128).mean() == pytest.approx(part, rel=0.03)
        photons = KINDS["shot_noise"].levels[severity - 1]
        shot = corrupt("shot_noise", severity, pictures, indices, 0) / 255
        assert shot.mean() == pytest.approx(128 / 255, abs=1e-3)
        assert shot.std() == pytest.approx((128 / 255 / photons) ** 0.5, rel=0.03)
    picture = photographs(1)
    brighter = corrupt("brightness", 2, picture, indices[:1], 0)
    assert brighter.max(axis=3) == pytest.approx(np.minimum(picture.max(axis=3) + 25.5, 255), abs=0.51)
    paler = corrupt("contrast", 5, picture, indices[:1], 0)
    assert paler.std() < 0.2 * picture.std() + 5
    # The published program's numbers of copies, one of which is the picture itself: from a point its light is the rest.
    point = np.zeros((1, 33, 33, 3), np.uint8)
    point[0, 16, 16] = 255
    for severity, copies in enumerate((7, 12, 16, 21, 26), start=1):
        farthest = KINDS["zoom_blur"].levels[severity - 1]
        assert len(np.arange(1, farthest, 0.01)) == copies
        neighbours = corrupt("zoom_blur", severity, point, indices[:1], 0)[0, 16, 17, 0] / 255
        assert neighbours == pytest.approx(sum(1 - 1 / (1 + k / 100) for k in range(copies)) / (copies + 1), abs=0.004)
    flat = np.full((1, 32, 32, 3), 90, np.uint8)
    for kind in ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "contrast", "elastic_transform", "pixelate"):
        np.testing.assert_array_equal(corrupt(kind, 5, flat, indices[:1], 0), flat)  # nothing gets lighter or darker


# ---- which pictures flip first


def test_pictures_that_flip_first_are_right_uncorrupted_and_wrong_at_the_least_severity(tmp_path: Path) -> None:
    images = photographs(10)
    labels = np.zeros(10, np.uint8)
    data = Data(tmp_path, ["a", "b"], (0.5,) * 3, (0.25,) * 3, "", images, labels, images, labels)
    predictions, confidences = np.zeros((5, 10), np.uint8), np.full((5, 10), 0.6, np.float32)
    predictions[:, 0] = 1  # wrong throughout, and wrong without corruption
    predictions[2:, 1] = 1
    predictions[0, 2] = 1  # wrong at the first alone
    predictions[2, 3] = 1
    confidences[2, 3] = 0.9
    predictions[4, 4] = 1
    unbroken = np.arange(10) > 0
    found = robustness.flips("fog", predictions, confidences, unbroken, data, 5)
    assert [(flip.image, flip.severity, flip.predicted) for flip in found] == [
        (2, 1, 1),
        (3, 3, 1),
        (1, 3, 1),
        (4, 5, 1),
    ]
    for flip in found:
        np.testing.assert_array_equal(flip.clean, images[flip.image])
        expected = corruptions.corrupt("fog", flip.severity, images, np.arange(10), 5)[flip.image]
        np.testing.assert_array_equal(flip.picture, expected)
    predictions[0] = 1
    assert len(robustness.flips("fog", predictions, confidences, unbroken, data, 5)) == FLIPS
    assert robustness.flips("fog", predictions, confidences, unbroken & False, data, 5) == []


def test_results_name_the_kinds_and_their_mean() -> None:
    accuracy = np.array([[[0.5, 0.25], [1, 0.25]], [[0.5, 0.5], [0, 0]]])
    found = Robustness(0, ["fog", "snow"], ["a", "b"], np.array([1.0, 0.75]), accuracy, [])
    assert found.results() == {
        "corruptions": {"fog": [0.5, 0.25], "snow": [1.0, 0.25], "mean": 0.5},
        "corruptions_compared": {
            "b": {"accuracy": 0.75, "corruptions": {"fog": [0.5, 0.5], "snow": [0, 0], "mean": 0.25}}
        },
    }
    assert re.fullmatch(r".*accuracy 50.00%, the worst kind fog with 37.50%", found.line())
