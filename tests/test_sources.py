"""Where images come from, and everything that may be wrong with them."""

import hashlib
import http.server
import io
import os
import pickle
import shutil
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torchvision
from conftest import SHAPES
from PIL import Image

from cifar.data import cache, decoding, image_files, official, sources
from cifar.data.cache import open_data
from cifar.data.official import Official
from cifar.errors import UserError

# ---- digits


def test_digits_are_32x32_rgb_in_a_fixed_stratified_split() -> None:
    data = open_data("digits")
    assert data.train_images.shape == (1437, 32, 32, 3)
    assert data.test_images.shape == (360, 32, 32, 3)
    assert data.classes == list("0123456789")
    share = np.bincount(data.test_labels) / np.bincount(np.concatenate((data.train_labels, data.test_labels)))
    assert abs(share - 0.2).max() < 0.005
    # The same images, in the same order, on every machine; another split would make results incomparable.
    assert data.test_labels[:12].tolist() == [7, 6, 3, 7, 7, 3, 2, 8, 9, 3, 2, 6]
    assert data.files("test") == []


# ---- folders and zips


def test_a_zip_and_a_folder_of_the_same_images_are_the_same_data(shapes: Path, shapes_zip: Path) -> None:
    folder, archive = open_data(str(shapes)), open_data(str(shapes_zip))
    assert folder.path != archive.path
    assert folder.fingerprint == archive.fingerprint
    assert folder.classes == sorted(SHAPES)
    assert np.bincount(folder.test_labels).tolist() == [6, 6, 5, 5]
    assert folder.files("test")[0] == "test/disc/00.png"
    for index in (0, 21):
        with Image.open(shapes / folder.files("test")[index]) as image:
            assert np.array_equal(np.asarray(image), folder.test_images[index])


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    n = 3 * decoding.PART + 1  # read in parts
    for split, count in (("train", n), ("test", 1)):
        for number in range(count):
            path = tmp_path / split / "ab"[number % 2] / f"{number:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (number // 256, number % 256, 0)).save(path)
    Image.new("RGB", (32, 32)).save(tmp_path / "test" / "a" / "x.png")
    shutil.copytree(tmp_path / "test" / "a", tmp_path / "test" / "b")
    data = open_data(str(tmp_path))
    pixels = data.train_images[:, 0, 0].astype(int)
    assert (pixels[:, 0] * 256 + pixels[:, 1]).tolist() == [*range(0, n, 2), *range(1, n, 2)]
    assert [int(Path(name).stem) for name in data.files("train")] == [*range(0, n, 2), *range(1, n, 2)]


def test_the_cache_is_mapped_and_follows_the_content(shapes: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(shapes, copy)
    first = open_data(str(copy))
    assert isinstance(first.train_images, np.memmap)
    built = (first.path / "train_images.npy").stat().st_mtime_ns
    assert open_data(str(copy)).path == first.path
    assert (first.path / "train_images.npy").stat().st_mtime_ns == built
    Image.new("RGB", (32, 32), "red").save(copy / "test" / "disc" / "00.png")
    second = open_data(str(copy))
    assert second.fingerprint != first.fingerprint
    assert second.test_images[0, 0, 0].tolist() == [255, 0, 0]


def test_jobs_that_start_side_by_side_build_one_cache(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ProcessPoolExecutor(4) as pool:
        found = list(pool.map(fingerprint, [str(shapes)] * 8))
    assert len(set(found)) == 1
    assert len(list((tmp_path / "cifar").iterdir())) == 1


def fingerprint(data: str) -> str:
    return open_data(data).fingerprint


def test_statistics_are_those_of_the_pixels() -> None:
    images = np.random.default_rng(0).integers(0, 256, (50, 32, 32, 3)).astype(np.uint8)
    mean, std = cache.statistics(images)
    np.testing.assert_allclose(mean, (images / 255).mean((0, 1, 2)))
    np.testing.assert_allclose(std, (images / 255).std((0, 1, 2)))


def encoded(image: Image.Image, format_: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format_, **options)
    return file.getvalue()


def png_of_16_bits() -> bytes:
    """A valid RGB PNG with two bytes a channel, which Pillow cannot write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = (b"\0" + bytes(32 * 6)) * 32
    header = struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


RGB = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))


@pytest.mark.parametrize(
    "content",
    [
        encoded(RGB),
        encoded(RGB.convert("L")),
        encoded(RGB.convert("L"), "JPEG"),
        encoded(RGB.convert("1")),
        encoded(RGB.quantize(16)),
        encoded(RGB.convert("RGBA")),
        encoded(RGB, "JPEG", progressive=True),
    ],
    ids=["rgb", "grey", "grey jpeg", "black and white", "palette", "opaque alpha", "progressive jpeg"],
)
def test_what_becomes_rgb_without_loss_is_taken(content: bytes) -> None:
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(image_files.decode_image(content, "x"), np.asarray(image.convert("RGB")))


BAD_IMAGES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "text": (b"This is not an image.", "is not an image"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "is not an image"),
    **{f"truncated {kind}": (encoded(RGB, kind)[:-200], "is ") for kind in ("BMP", "TIFF", "WEBP", "GIF", "AVIF")},
    "truncated png": (encoded(RGB)[:-400], "is damaged"),
    "truncated jpeg": (encoded(RGB, "JPEG")[:-200], "is damaged"),
    "header only": (encoded(RGB)[:20], "is "),
    "cmyk": (encoded(RGB.convert("CMYK"), "JPEG"), "colour mode CMYK"),
    "16-bit grey": (encoded(Image.fromarray(np.zeros((32, 32), np.uint16))), "16 bits"),
    "16-bit rgb": (png_of_16_bits(), "16 bits"),
    "too small": (encoded(RGB.resize((31, 32))), "31x32 pixels"),
    "bomb": (encoded(Image.new("1", (20000, 20000))), "too many pixels"),
    "transparent": (encoded(Image.new("RGBA", (32, 32))), "partly transparent"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
@pytest.mark.parametrize("bad", BAD_IMAGES)
def test_an_image_that_cannot_be_taken_is_named(bad: str, packed: bool, shapes: Path, tmp_path: Path) -> None:
    content, wrong = BAD_IMAGES[bad]
    root = tmp_path / "images"
    shutil.copytree(shapes, root)
    (root / "train" / "ring" / "07.png").write_bytes(content)
    if packed:
        root = Path(shutil.make_archive(str(root), "zip", root))
    with pytest.raises(UserError) as error:
        open_data(str(root))
    assert "train/ring/07.png" in str(error.value)
    assert wrong in str(error.value)
    assert "\n" not in str(error.value)


def without(*patterns: str) -> Callable[[Path], None]:
    def remove(root: Path) -> None:
        for pattern in patterns:
            for path in root.glob(pattern):
                shutil.rmtree(path)

    return remove


@pytest.mark.parametrize(
    ("spoil", "wrong"),
    [
        (without("*"), "holds no images"),
        (without("test"), "no images under test/"),
        (without("train"), "no images under train/"),
        (without("test/disc"), "class 'disc' has images under train/ but none under test/"),
        (without("train/ring"), "class 'ring' has images under test/ but none under train/"),
        (without("*/ring", "*/disc", "*/square"), "1 class(es)"),
        (lambda root: (root / "train" / "stray.png").write_bytes(b""), "train/stray.png is not in a class folder"),
    ],
)
def test_a_folder_of_another_layout_is_refused(
    spoil: Callable[[Path], None], wrong: str, shapes: Path, tmp_path: Path
) -> None:
    root = tmp_path / "images"
    shutil.copytree(shapes, root)
    spoil(root)
    with pytest.raises(UserError) as error:
        open_data(str(root))
    assert str(root) in str(error.value)
    assert wrong in str(error.value)


def test_hidden_files_are_skipped(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(shapes, root)
    (root / "train" / "disc" / ".DS_Store").write_bytes(b"x")
    assert open_data(str(root)).fingerprint == open_data(str(shapes)).fingerprint


def test_files_that_are_no_images_may_change(shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "images"
    shutil.copytree(shapes, root)
    before = sources.find(str(root)).key
    for name in ("log.txt", "log", "runs/mine/status.json", "val/disc/0.png", "train/notes.txt", "test/disc/about.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
        assert sources.find(str(root)).key == before, name
    (root / "train" / "disc" / "00.png").touch()
    assert sources.find(str(root)).key != before


def test_a_run_may_write_its_log_into_the_folder_of_its_images(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    shutil.copytree(shapes, root)
    decode = image_files.decode_image

    def logged(content: bytes, name: str) -> object:
        with (root / "log.txt").open("a") as log:
            log.write(f"{name}\n")
        return decode(content, name)

    monkeypatch.setattr(image_files, "decode_image", logged)
    assert open_data(str(root)).fingerprint == open_data(str(shapes)).fingerprint


@pytest.mark.parametrize("how", ["another folder", "two files exchanged"])
def test_other_bitmaps_of_the_same_size_and_time_are_other_images(how: str, tmp_path: Path) -> None:
    def written(root: Path, colours: str) -> Path:
        for split in ("train", "test"):
            for name, colour in zip(("a", "b"), colours.split(), strict=True):
                (root / split / name).mkdir(parents=True)
                Image.new("RGB", (32, 32), colour).save(root / split / name / "0.bmp")
                os.utime(root / split / name / "0.bmp", (1_700_000_000, 1_700_000_000))  # as an archive told
        return root

    first = written(tmp_path / "first", "red blue")
    before = open_data(str(first))
    if how == "another folder":
        after = open_data(str(written(tmp_path / "second", "blue red")))
    else:
        one, other, aside = first / "train/a/0.bmp", first / "train/b/0.bmp", first / "0"
        one.rename(aside)
        other.rename(one)
        aside.rename(other)
        after = open_data(str(first))
    assert after.train_images[0, 0, 0].tolist() == [0, 0, 255]
    assert before.train_images[0, 0, 0].tolist() == [255, 0, 0]
    assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["/etc/train.png", "../train/disc/0.png", "train/../../x.png", "C:\\train\\x.png"])
def test_a_zip_whose_entries_leave_it_is_refused(name: str, shapes_zip: Path, tmp_path: Path) -> None:
    path = tmp_path / "evil.zip"
    shutil.copy(shapes_zip, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(zipfile.ZipInfo(name), encoded(RGB))
    with pytest.raises(UserError, match=r"entry .* leaves the archive"):
        open_data(str(path))


def test_a_zip_entry_that_unpacks_to_a_flood_is_refused(shapes_zip: Path, tmp_path: Path) -> None:
    path = tmp_path / "flood.zip"
    shutil.copy(shapes_zip, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/disc/flood.png", bytes(1 << 24))
    with pytest.raises(UserError, match=r"flood.png has 16777216 bytes"):
        open_data(str(path))


def test_a_damaged_zip_entry_is_named(shapes_zip: Path, tmp_path: Path) -> None:
    path = tmp_path / "damaged.zip"
    content = bytearray(shapes_zip.read_bytes())
    content[content.index(b"IDAT") + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"test/disc/00.png cannot be read"):
        open_data(str(path))


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"", "neither a zip or tar archive of images nor an official"),
        (b"not an archive", "neither a zip or tar archive of images nor an official"),
        (b"PK\x03\x04 cut short", "is a zip that was cut short; copy or make it again"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xed", "is damaged or cut short"),
    ],
)
def test_a_file_that_is_no_archive_is_refused(content: bytes, wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    path.write_bytes(content)
    with pytest.raises(UserError, match=wrong):
        open_data(str(path))


def test_a_missing_path_is_refused_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"does not exist; give cifar10, cifar100, digits, or"):
        open_data(str(tmp_path / "nowhere"))


def test_a_cache_that_cannot_be_written_is_named(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="image cache cannot be written"):
        open_data(str(shapes))


# ---- the official archive


class Made(NamedTuple):
    """An archive laid out as an official one, with 10 images a file, whose md5 sums are taken for the official."""

    name: str  # as --data calls it
    archive: Path
    folder: Path  # the same, unpacked

    @property
    def known(self) -> Official:
        """What the project knows of it."""
        return official.OFFICIAL[self.name]

    def change(self, **fields: object) -> None:
        official.OFFICIAL[self.name] = self.known._replace(**fields)  # type: ignore[arg-type]


@pytest.fixture(params=official.OFFICIAL)
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Made:
    published = official.OFFICIAL[request.param]
    folder = tmp_path / "made" / published.folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> str:
        written = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(written)
        return hashlib.md5(written).hexdigest()

    def batch(name: str) -> dict[str, object]:
        return {
            "data": generator.integers(0, 256, (10, 3072)).astype(np.uint8),
            published.labels: list(range(10)),
            "filenames": [f"{name}_{number}.png" for number in range(10)],
        }

    md5s = {split: {name: write(name, batch(name)) for name in names} for split, names in published.files.items()}
    listed, _, key = published.list_of_classes
    listed_md5 = write(listed, {key: [f"class {number}" for number in range(100)]}) if listed else ""
    archive = tmp_path / Path(published.url).name
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, published.folder)
    sums = {"files": md5s, "md5": hashlib.md5(archive.read_bytes()).hexdigest()}
    changed = published._replace(**sums, list_of_classes=(listed, listed_md5, key))
    monkeypatch.setitem(official.OFFICIAL, request.param, changed)
    return Made(request.param, archive, folder)


def test_what_is_known_of_the_official_archives_is_what_torchvision_knows() -> None:
    for name, theirs in (("cifar10", torchvision.datasets.CIFAR10), ("cifar100", torchvision.datasets.CIFAR100)):
        ours = official.OFFICIAL[name]
        assert (ours.url, ours.md5, ours.folder) == (theirs.url, theirs.tgz_md5, theirs.base_folder)
        assert [*ours.files["train"].items()] == [tuple(pair) for pair in theirs.train_list]
        assert [*ours.files["test"].items()] == [tuple(pair) for pair in theirs.test_list]
        meta = tuple(theirs.meta[part] for part in ("filename", "md5", "key"))
        assert ours.list_of_classes == (("", "", "") if ours.classes else meta)


def test_the_official_archive_and_its_folder_are_the_same_data(made: Made) -> None:
    archive = open_data(str(made.archive))
    assert archive.fingerprint == open_data(str(made.folder.parent)).fingerprint
    assert archive.fingerprint == open_data(str(made.folder)).fingerprint
    assert archive.train_images.shape == (10 * len(made.known.files["train"]), 32, 32, 3)
    assert archive.classes[3] == {"cifar10": "cat", "cifar100": "class 3"}[made.name]
    assert len(archive.classes) == {"cifar10": 10, "cifar100": 100}[made.name]
    (file,) = made.known.files["test"]
    assert archive.files("test")[2] == f"{file}_2.png"
    row = pickle.loads((made.folder / file).read_bytes())["data"][0]
    assert archive.test_images[0, 5, 7].tolist() == [row[5 * 32 + 7], row[1024 + 5 * 32 + 7], row[2048 + 5 * 32 + 7]]


def test_other_files_in_the_official_folder_may_change(made: Made) -> None:
    before = sources.find(str(made.folder)).key
    (made.folder / "log.txt").write_bytes(b"x")
    assert sources.find(str(made.folder)).key == before
    (next(iter(made.folder.glob("*ta*")))).touch()
    assert sources.find(str(made.folder)).key != before


def test_a_changed_archive_is_refused_before_it_is_unpickled(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle, "loads", lambda *_, **__: pytest.fail("it was unpickled"))
    zeros = {split: dict.fromkeys(names, "0" * 32) for split, names in made.known.files.items()}
    made.change(files=zeros, list_of_classes=(made.known.list_of_classes[0], "0" * 32, ""))
    with pytest.raises(UserError, match=f"is not that of the official {made.known.title} archive"):
        open_data(str(made.archive))


def test_a_changed_or_missing_file_of_the_folder_is_named(made: Made) -> None:
    (file,) = made.known.files["test"]
    content = (made.folder / file).read_bytes()
    (made.folder / file).write_bytes(content + b"x")
    with pytest.raises(UserError, match=rf"{file}: md5 .* unpack the official archive again"):
        open_data(str(made.folder))
    (made.folder / file).unlink()
    with pytest.raises(UserError, match=f"{file} is missing; unpack the official archive again"):
        open_data(str(made.folder))


@pytest.fixture
def server(made: Made) -> Iterator[str]:
    """Serves the archive's folder on loopback."""
    handler = partial(QuietHandler, directory=str(made.archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def send_header(self, keyword: str, value: str) -> None:
        promised = str(int(value) + 1000) if "cut" in self.path and keyword == "Content-Length" else value
        super().send_header(keyword, promised)


def test_it_is_downloaded_checked_and_kept(made: Made, server: str) -> None:
    made.change(url=f"{server}/{made.archive.name}")
    there = made.archive.parent / "download"
    images = 10 * len(made.known.files["train"])
    assert len(sources.find(made.name, there).decode(there)[1]["train"].images) == images
    assert [path.name for path in there.iterdir()] == [made.archive.name]
    made.change(url=f"{server}/gone/{made.archive.name}")
    assert len(sources.find(made.name, there).decode(there)[1]["test"].images) == 10
    shutil.copytree(made.folder, there / made.folder.name)  # unpacked by hand
    (there / made.archive.name).unlink()
    assert len(sources.find(made.name, there).decode(there)[1]["test"].images) == 10


@pytest.mark.parametrize("served", ["another file", "gone.tar.gz", "cut.tar.gz"])
def test_a_download_that_fails_leaves_nothing_behind(served: str, made: Made, server: str) -> None:
    (other,) = made.known.files["test"]
    made.archive.with_name("cut.tar.gz").write_bytes(made.archive.read_bytes()[:-1000])  # the connection ends too early
    made.change(url=f"{server}/" + (f"made/{made.folder.name}/{other}" if served == "another file" else served))
    there = made.archive.parent / "download"
    with pytest.raises(UserError, match=r"(md5|cannot be downloaded).*download it yourself to"):
        sources.find(made.name, there)
    assert list(there.iterdir()) == []


def test_no_network_is_one_line_with_the_mend(made: Made) -> None:
    made.change(url=f"http://127.0.0.1:9/{made.archive.name}")  # nobody listens there
    with pytest.raises(UserError, match=r"Connection refused.*--data PATH or --recipe digits") as error:
        sources.find(made.name, made.archive.parent / "download")
    assert "\n" not in str(error.value)
