"""Where images come from: scanned digits, the official CIFAR-10 archive or folder, any folder or zip of images.

Everything here runs once per machine and set of images: what is decoded goes into the cache (cache.py).
"""

import hashlib
import http.client
import io
import os
import pickle
import tarfile
import urllib.request
import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from cifar import stop
from cifar.errors import UserError

SIZE = 32  # pixels: the networks' pooling is made for it
SPLITS = ("train", "test")
AT_ONCE, PART = 8, 100  # threads that read a folder's files, and how many files each of them takes at a time
LARGEST_FILE = 1 << 20  # bytes; a 32x32 image as PNG or JPEG has 1 to 4 kB

# The archive that Alex Krizhevsky publishes, and its files' md5 sums (also in torchvision.datasets.CIFAR10).
OFFICIAL_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
OFFICIAL_MD5 = "c58f30108f718f92721af3b95e74349a"
OFFICIAL_FOLDER = "cifar-10-batches-py"
OFFICIAL_FILES = {
    "train": {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    },
    "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
}
OFFICIAL_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


class Split(NamedTuple):
    """Images uint8 [n, 32, 32, 3], labels uint8 [n], and the file that each image came from (or no names)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    files: list[str]


class Source(NamedTuple):
    """A set of images that can be decoded: `key` changes when its content does, `decode` gives classes and splits."""

    key: str
    decode: Callable[[], tuple[list[str], dict[str, Split]]]


def find(data: str, download_to: Path = Path("data")) -> Source:
    """The source that `--data` names; downloads CIFAR-10 into `data/` if that is asked for and not there.

    Raises UserError for a path that is missing or is no source of images.
    """
    if data == "digits":
        return Source("digits-1", decode_digits)
    if data == "cifar10":
        folder, archive = download_to / OFFICIAL_FOLDER, download_to / Path(OFFICIAL_URL).name
        if not folder.is_dir() and not archive.is_file():
            download(OFFICIAL_URL, archive, OFFICIAL_MD5)
        path = folder if folder.is_dir() else archive
    else:
        path = Path(data)
    try:
        if path.is_dir():
            return _folder(path)
        if path.is_file():
            return _archive(path)
    except PermissionError as error:
        raise UserError(f"{error.filename or path} may not be read; change its permissions") from None
    known = "cifar10, digits, or the path of an archive, zip or folder of images"
    raise UserError(f"--data {data} does not exist; give {known}")


def _folder(path: Path) -> Source:
    if (path / OFFICIAL_FOLDER).is_dir():
        path = path / OFFICIAL_FOLDER
    if (path / "data_batch_1").exists():
        return Source(_stat_key(path, sorted(path.iterdir())), lambda: decode_official(_official_folder_reader(path)))
    members = sorted(PurePosixPath(file.relative_to(path).as_posix()) for file in _files_below(path))
    key = _stat_key(path, [path / member for member in members])
    return Source(key, lambda: decode_images(str(path), members, lambda member: (path / member).read_bytes(), AT_ONCE))


def _files_below(path: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(path, onerror=_raise, followlinks=True):
        yield from (Path(folder, name) for name in names)


def _raise(error: OSError) -> None:
    raise error


def _archive(path: Path) -> Source:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if zipfile.is_zipfile(path):
        return Source(digest, lambda: _decode_zip(path))
    if tarfile.is_tarfile(path):
        return Source(digest, lambda: decode_official(_official_archive_reader(path)))
    raise UserError(f"{path} is neither a zip of images nor the official CIFAR-10 archive; give one of these")


def _stat_key(root: Path, files: list[Path]) -> str:
    """Names, sizes and modification times: reading 50,000 files at every start would cost seconds to minutes."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# ---- digits


def decode_digits() -> tuple[list[str], dict[str, Split]]:
    """scikit-learn's 1,797 scanned digits, enlarged from 8x8 to 32x32 RGB; a fixed stratified split 1,437/360."""
    from sklearn.datasets import load_digits  # 1 s to import, and only this source needs it
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = np.empty((len(pixels), SIZE, SIZE, 3), np.uint8)
    for image, values in zip(images, pixels, strict=True):
        grey = Image.fromarray((values.reshape(8, 8) * (255 / 16)).round().astype(np.uint8))
        image[:] = np.asarray(grey.resize((SIZE, SIZE), Image.Resampling.BICUBIC))[:, :, None]
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    splits = {
        "train": Split(images[train], labels[train].astype(np.uint8), []),
        "test": Split(images[test], labels[test].astype(np.uint8), []),
    }
    return [str(digit) for digit in range(10)], splits


# ---- official CIFAR-10


def download(url: str, path: Path, md5: str) -> None:
    """Downloads to a temporary name, checks the md5 sum, and only then gives the file its own name.

    Raises UserError without a network, at a wrong sum, and when the user stops it; nothing half-done stays.
    """
    mend = f"download it yourself to {path}, or pass --data PATH or --recipe digits"
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    print(f"downloading {url} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.md5(usedforsecurity=False)
        with urllib.request.urlopen(url, timeout=60) as response, part.open("wb") as file:
            while block := response.read(1 << 20):
                if stop.requested():
                    raise UserError(f"{url}: download stopped on request; nothing was kept")
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != md5:
            raise UserError(f"{url}: the download has md5 {digest.hexdigest()}, not {md5}; {mend}")
        part.replace(path)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be downloaded ({reason}); {mend}") from None
    finally:
        part.unlink(missing_ok=True)


def _official_archive_reader(path: Path) -> Callable[[str, str], bytes]:
    archive_bytes = path.read_bytes()  # what is checked is what is unpickled
    md5 = hashlib.md5(archive_bytes, usedforsecurity=False).hexdigest()
    if md5 != OFFICIAL_MD5:
        raise UserError(
            f"{path}: md5 {md5} is not that of the official CIFAR-10 archive ({OFFICIAL_MD5}); "
            "it is damaged or another file: delete it, or give a zip or folder of images"
        )
    with tarfile.open(fileobj=io.BytesIO(archive_bytes)) as archive:
        files = ((member.name, archive.extractfile(member)) for member in archive.getmembers())
        contents = {PurePosixPath(name).name: file.read() for name, file in files if file is not None}
    return lambda name, _md5: contents[name]


def _official_folder_reader(path: Path) -> Callable[[str, str], bytes]:
    def read(name: str, md5: str) -> bytes:
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{path / name}: {error.strerror}; unpack the official archive again") from None
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(f"{path / name}: md5 {found}, not {md5}; unpack the official archive again")
        return content

    return read


def decode_official(read: Callable[[str, str], bytes]) -> tuple[list[str], dict[str, Split]]:
    """The official batches: pickles of rows [3 * 32 * 32], channel by channel. `read` has checked their md5 sums."""
    splits = {}
    for split in SPLITS:
        batches = [pickle.loads(read(name, md5), encoding="latin1") for name, md5 in OFFICIAL_FILES[split].items()]
        rows = np.concatenate([batch["data"] for batch in batches])
        splits[split] = Split(
            np.ascontiguousarray(rows.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)),
            np.concatenate([batch["labels"] for batch in batches]).astype(np.uint8),
            [name for batch in batches for name in batch["filenames"]],
        )
    return list(OFFICIAL_CLASSES), splits


# ---- folders and zips of images


def _decode_zip(path: Path) -> tuple[list[str], dict[str, Split]]:
    with zipfile.ZipFile(path) as archive:
        members = {}
        for info in archive.infolist():
            name = PurePosixPath(info.filename)
            if name.is_absolute() or ".." in name.parts or "\\" in info.filename or ":" in name.parts[0]:
                raise UserError(f"{path}: entry {info.filename!r} leaves the archive; make the zip with relative names")
            if not info.is_dir():
                members[name] = info
            if info.flag_bits & 1:
                raise UserError(f"{path}: entry {info.filename!r} is encrypted; make the zip without a password")
            if info.file_size > LARGEST_FILE:
                raise UserError(f"{path}: entry {info.filename!r} has {info.file_size} bytes; give 32x32 images")
        return decode_images(str(path), sorted(members), lambda member: archive.read(members[member]))


def decode_images(
    where: str, members: list[PurePosixPath], read: Callable[[PurePosixPath], bytes], at_once: int = 1
) -> tuple[list[str], dict[str, Split]]:
    """Decodes `<train|test>/<class>/<image>`; names that begin with a dot, and __MACOSX, are passed over.

    With `at_once` above 1 so many threads read ahead: a network disk is slow, but not when it is asked for many files
    at once.

    Raises UserError, naming the file, for whatever is not a 32x32 RGB image or cannot become one without loss.
    """
    layout = "give <train|test>/<class>/<image>"
    members = [m for m in members if not m.name.startswith(".") and m.parts[0] != "__MACOSX"]
    if not members:
        raise UserError(f"{where} holds no images; {layout}")
    by_split: dict[str, list[PurePosixPath]] = {
        split: [member for member in members if member.parts[0] == split] for split in SPLITS
    }
    for split, found in by_split.items():
        if not found:
            raise UserError(f"{where} has no images under {split}/; {layout}")
        for member in found:
            if len(member.parts) != 3:
                raise UserError(f"{where}: {member} does not lie in a class's folder; {layout}")
    classes = {split: {member.parts[1] for member in found} for split, found in by_split.items()}
    if classes["train"] != classes["test"]:
        odd = min(classes["train"] ^ classes["test"])
        there, missing = SPLITS if odd in classes["train"] else SPLITS[::-1]
        raise UserError(f"{where}: class {odd!r} has images under {there}/ but none under {missing}/; {layout}")
    names = sorted(classes["train"])
    if not 2 <= len(names) <= 256:
        raise UserError(f"{where} has {len(names)} class(es); between 2 and 256 can be told apart here")
    number = {name: index for index, name in enumerate(names)}

    def read_or_say(member: PurePosixPath) -> bytes:
        try:
            return read(member)
        except (OSError, zipfile.BadZipFile, zipfile.zlib.error) as error:  # type: ignore[attr-defined]
            raise UserError(f"{where}: {member} cannot be read ({error}); mend or remove it") from None

    splits = {}
    for split, found in by_split.items():
        images = np.empty((len(found), SIZE, SIZE, 3), np.uint8)
        contents = _read_ahead(read_or_say, found, at_once) if at_once > 1 else map(read_or_say, found)
        # In one thread: Pillow reads a header in Python, and two threads lose more time to its lock than they win.
        for image, member, content in zip(images, found, contents, strict=True):
            image[:] = decode_image(content, f"{where}: {member}")
        labels = np.array([number[member.parts[1]] for member in found], np.uint8)
        splits[split] = Split(images, labels, [str(member) for member in found])
    return names, splits


def _read_ahead(read: Callable[[PurePosixPath], bytes], members: list[PurePosixPath], at_once: int) -> Iterator[bytes]:
    """The members' contents in order, read in parts by threads; no more than `at_once` parts are held."""

    def read_part(part: list[PurePosixPath]) -> list[bytes]:
        return [read(member) for member in part]

    parts = iter([members[start : start + PART] for start in range(0, len(members), PART)])
    with ThreadPoolExecutor(at_once) as pool:
        ahead = deque(pool.submit(read_part, part) for part in islice(parts, at_once))
        while ahead:
            contents = ahead.popleft().result()
            ahead.extend(pool.submit(read_part, part) for part in islice(parts, 1))
            yield from contents


def decode_image(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """One PNG or JPEG as uint8 [32, 32, 3]. Grey, palette and opaque alpha become RGB, which loses nothing.

    Raises UserError, with the file's name, for all else: what would have to be guessed, scaled or cut is refused.
    """

    def refuse(wrong: str) -> UserError:
        return UserError(f"{name} {wrong}; give 8-bit RGB or grey images of {SIZE}x{SIZE} pixels as PNG or JPEG")

    if not content:
        raise refuse("is empty")
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.size != (SIZE, SIZE):  # known from the header, so a bomb is never decoded
                raise refuse(f"has {image.width}x{image.height} pixels")
            # Byte 24 of a PNG is its bit depth. Pillow cuts 16 bits a channel down to 8 without a word.
            if image.format == "PNG" and content[24] == 16:
                raise refuse("has 16 bits a channel")
            image.load()
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                if np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                    raise refuse("is partly transparent")
            elif image.mode not in ("RGB", "L", "P", "1"):
                raise refuse(f"has colour mode {image.mode}")
            return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))
    except UnidentifiedImageError:
        raise refuse("is not an image") from None
    except Image.DecompressionBombError:
        raise refuse("has far too many pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise refuse(f"is damaged ({error})") from None
