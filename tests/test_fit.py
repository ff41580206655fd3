"""`--fit 32`: pictures of any size as images of a data set, seen by every command as the app sees them."""

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from subprocess import CompletedProcess
from subprocess import run as start

import numpy as np
import pytest
from conftest import ROOT, Train, draw
from helpers.explained import assert_predicted_alike, explain
from PIL import Image

from cifar.app import content
from cifar.data import decoding, pictures
from cifar.data.cache import open_data
from cifar.errors import UserError
from cifar.explain import runs

SHAPES = ("disc", "square", "stripes")
SIZES = [(32, 32), (64, 64), (100, 75), (28, 28), (33, 200), (640, 480), (31, 32)]
MODES = [
    ("RGB", "png"),
    ("L", "png"),
    ("RGBA", "webp"),
    ("P", "gif"),
    ("CMYK", "jpeg"),
    ("RGB", "tiff"),
    ("RGB", "bmp"),
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures of many sizes and types, called otherwise, in a folder of their own."""
    root, generator = tmp_path_factory.mktemp("photos") / "photos", np.random.default_rng(0)
    for split, count in (("train", 14), ("test", 7)):
        for shape in SHAPES:
            for number in range(count):
                path = root / "mine" / split / shape / f"{number:02}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                mode, format_ = MODES[number % len(MODES)]
                picture = draw(shape, generator).resize(SIZES[number * 3 % len(SIZES)], Image.Resampling.BICUBIC)
                picture.convert(mode).save(path, format_)
    return root


def packed(folder: Path, how: str, to: Path) -> Path:
    if how == "folder":
        return folder
    return Path(shutil.make_archive(str(to / "photos"), "gztar" if how == "tar" else how, folder))


@pytest.mark.parametrize("how", ["folder", "zip", "tar"])
def test_pictures_become_what_the_app_sees(how: str, photos: Path, tmp_path: Path) -> None:
    data = open_data(str(packed(photos, how, tmp_path)), fit=True)
    assert data.classes == list(SHAPES)
    assert (len(data.train_labels), len(data.test_labels)) == (42, 21)
    for split, images in (("train", data.train_images), ("test", data.test_images)):
        for name, image in zip(data.files(split), images, strict=True):
            assert np.array_equal(pictures.read(photos / name), image), name


def test_other_sizes_are_refused_unless_asked_for_also_after_they_were(photos: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=r"00.jpg|01.jpg") as error:
            open_data(str(photos))
        assert "pixels; give opaque 8-bit RGB or grey images of 32x32 pixels, or train.py --fit 32" in str(error.value)
        fitted = open_data(str(photos), fit=True)
    assert open_data(str(photos), fit=True).path == fitted.path


def test_images_that_need_no_fitting_are_the_same_data_with_it(shapes: Path, shapes_zip: Path) -> None:
    plain = open_data(str(shapes))
    for path in (shapes, shapes_zip):
        fitted = open_data(str(path), fit=True)
        assert fitted.path != plain.path
        assert fitted.fingerprint == plain.fingerprint


def test_what_has_its_size_already_is_not_fitted() -> None:
    assert open_data("digits", fit=True).path == open_data("digits").path


@pytest.mark.parametrize("how", ["folder", "zip", "tar"])
def test_large_pictures_are_for_those_who_ask(how: str, shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8))
    noise.save(root / "train/disc/00.png")
    assert (root / "train/disc/00.png").stat().st_size > 1 << 20
    path = packed(root, how, tmp_path)
    with pytest.raises(UserError, match=r"train/disc/00.png has \d+ bytes; give .* or train.py --fit 32"):
        open_data(str(path))
    data = open_data(str(path), fit=True)
    assert np.array_equal(data.train_images[0], pictures.read(root / "train/disc/00.png"))


@pytest.mark.parametrize("how", ["folder", "zip", "tar"])
@pytest.mark.parametrize(
    ("spoiled", "wrong"),
    [(b"", "cannot be used: the file is not a picture"), (bytes(26 << 20), f"has {26 << 20} bytes; make it smaller"),
     (b"\x89PNG\r\n\x1a\n" + bytes(2 << 20), "cannot be used: the file is not a picture")],
    ids=["empty", "too large", "no picture and large"],
)  # fmt: skip
def test_a_picture_that_cannot_be_read_is_named(
    spoiled: bytes, wrong: str, how: str, shapes: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes, root)
    (root / "train/disc/00.png").write_bytes(spoiled)
    (root / "large.bin").write_bytes(bytes(26 << 20))  # disturbs nobody
    path = packed(root, how, tmp_path)
    with pytest.raises(UserError) as error:
        open_data(str(path), fit=True)
    assert f"{path}: train/disc/00.png {wrong}" in str(error.value)
    assert "\n" not in str(error.value)


def test_no_more_pictures_are_held_than_are_read_at_once(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of large photographs would not fit into memory."""
    monkeypatch.setattr(decoding, "SLOW", 0)
    names = [path.relative_to(photos).as_posix() for path in sorted(photos.rglob("*.jpg"))]
    read: list[str] = []

    def note(name: str) -> bytes:
        read.append(name)
        return (photos / name).read_bytes()

    for taken, content_ in enumerate(decoding._contents(note, names), 1):
        assert content_ == (photos / names[taken - 1]).read_bytes()
        assert len(read) <= taken + 2 * decoding.AT_ONCE
    assert sorted(read) == names


# ---- the commands


@pytest.fixture(scope="module")
def run(photos: Path, train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of few steps, which is wrong often enough, on pictures in a zip."""
    folder = tmp_path_factory.mktemp("fit")
    done = trained(train, packed(photos, "zip", folder), folder / "run", "--fit", 32)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def trained(train: Train, data: Path, directory: Path, *more: object) -> "CompletedProcess[str]":
    return train("--data", data, "--run", directory, "--network", "whitened", "--epochs", 2, "--peak-epoch", 1,
                 "--global-batch-size", 14, "--peak-learning-rate", 1e-4, *more)  # fmt: skip


def test_a_run_keeps_it_and_its_data_is_found_again(run: Path, photos: Path, train: Train) -> None:
    assert json.loads((run / "recipe.json").read_text())["recipe"]["fit"] == 32
    opened = runs.open_run(run)
    assert runs.images(opened, None).fingerprint == opened.data_fingerprint
    assert runs.images(opened, str(photos)).fingerprint == opened.data_fingerprint
    shown = content.of_run(opened, None)
    assert shown.images == 21


def test_without_the_flag_the_same_command_names_it(run: Path, train: Train, tmp_path: Path) -> None:
    done = trained(train, run.parent / "photos.zip", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "or train.py --fit 32" in done.stderr
    assert not (tmp_path / "run").exists()
    assert "is finished" in trained(train, run.parent / "photos.zip", run, "--fit", 32).stdout


@pytest.mark.parametrize("asked", ["64", "-32", "x", "31.5"])
def test_other_sizes_than_the_networks_are_refused(asked: str, train: Train, tmp_path: Path) -> None:
    done = train("--fit", asked, "--run", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"train.py: error: --fit {asked}: ")


@pytest.mark.slow
def test_explain_export_and_predict_say_the_same_of_the_pictures(run: Path, photos: Path, tmp_path: Path) -> None:
    explained, exported = tmp_path / "explained", tmp_path / "out.onnx"
    done = explain("--run", run, "--output", explained, launcher=("--mixed_precision", "no"))
    assert done.returncode == 0, done.stderr
    words = ["-m", "cifar.export", "--run", str(run), "--output", str(exported)]
    done = start([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "verified on 21 test images" in done.stdout
    words = ["-m", "cifar.predict", "--run", str(run), "--format", "csv", str(photos / "mine" / "test")]
    said = start([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    ours = {row["path"]: row for row in csv.DictReader(io.StringIO(said))}
    assert_predicted_alike(explained, ours, photos)
