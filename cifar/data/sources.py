"""Where images come from: scanned digits, the official CIFAR-10 archive or folder, any folder, zip or tar of images.

Everything here runs once per machine and set of images: what is decoded goes into the cache (cache.py).
"""

import hashlib
import http.client
import io
import lzma
import os
import pickle
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image

from cifar import files
from cifar.data import image_files, layout
from cifar.data.decoding import InFolder, InMemory, InZip
from cifar.data.image_files import Listing
from cifar.data.layout import SPLITS, Split
from cifar.data.waiting import Progress, in_thread, wait_for
from cifar.errors import UserError

SIZE = image_files.SIZE
BLOCK = 1 << 18  # bytes that are read at a time
DOWNLOAD_SECONDS, SILENT_SECONDS = 3600, 60  # for all of it, and without a byte
ABANDONED_SECONDS = 24 * 3600  # after which nobody can still be writing a temporary file

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


class Source(NamedTuple):
    """A set of images that can be decoded: `key` changes when its content does, `decode` gives classes and splits.

    It is given an empty folder, into which it may write images (layout.images_file) instead of holding them in memory.
    """

    key: str
    decode: Callable[[Path], tuple[list[str], dict[str, Split]]]


def find(data: str, download_to: Path = Path("data")) -> Source:
    """The source that `--data` names; downloads CIFAR-10 into `data/` if that is asked for and not there.

    Raises UserError for a path that is missing or is no source of images.
    """
    if data == "digits":
        return Source("digits-1", lambda _: decode_digits())
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
        exists = path.exists()
    except PermissionError as error:
        raise UserError(f"{error.filename or path} may not be read; change its permissions") from None
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}); give another --data") from None
    wrong = "is neither a file nor a folder" if exists else "does not exist"
    raise UserError(f"--data {data} {wrong}; give cifar10, digits, or the path of an archive or folder of images")


def _folder(path: Path) -> Source:
    if (path / OFFICIAL_FOLDER).is_dir():
        path = path / OFFICIAL_FOLDER
    listing = image_files.list_folder(path)
    if (path / "data_batch_1").exists():
        return Source(_key(listing), lambda _: decode_official(_official_folder_reader(path)))
    return Source(_key(listing), lambda folder: layout.decode(listing, InFolder(path), folder))


def _key(listing: Listing) -> str:
    """Names, sizes and modification times: reading 50,000 files at every start would cost seconds to minutes."""
    sizes, modified = listing.sizes, listing.modified
    words = "".join([f"{name}\0{sizes[name]}\0{modified[name]}\n" for name in layout.sorted_names(sizes)])
    return hashlib.sha256(words.encode(errors="surrogateescape")).hexdigest()


def _archive(path: Path) -> Source:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        start = file.read(4)
        digest.update(start)
        for block in blocks(file, f"reading {path}"):
            digest.update(block)
    key = digest.hexdigest()
    if zipfile.is_zipfile(path):
        return Source(key, partial(_decode_zip, path))
    if _is_tar(path):
        return Source(key, partial(_decode_tar, path))
    if start == b"PK\3\4":
        raise UserError(f"{path} is a zip that was cut short; copy or make it again")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX")):  # gzip, bzip2, xz
        raise UserError(f"{path} holds no tar archive, or is damaged or cut short; copy or make it again")
    known = "a zip or tar archive of images nor the official CIFAR-10 archive"
    raise UserError(f"{path} is neither {known}; give one of these, or the unpacked folder")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy or make it again") from None


def blocks(file: io.BufferedIOBase | io.RawIOBase, doing: str) -> Iterator[memoryview]:
    """The file's content, in one buffer that is used again. Raises UserError where a stop is asked for meanwhile."""
    buffer = memoryview(bytearray(BLOCK))
    with Progress(doing, "B", os.fstat(file.fileno()).st_size) as progress:
        while count := file.readinto(buffer):
            progress.done += count
            progress.look()
            yield buffer[:count]


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
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    print(f"downloading {url} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, f".{path.name}.*.part")
        with part.open("xb") as file, Progress(f"downloading {url}", "B") as progress:
            fetched = in_thread(partial(_fetch, url, file, progress))  # a stop is heard whatever the network does
            found = wait_for(fetched, DOWNLOAD_SECONDS, progress)
            os.fsync(file.fileno())
        if found != md5:
            raise UserError(f"{url}: the download has md5 {found}, not {md5}; {mend}")
        part.replace(path)
        files.sync(path.parent)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be downloaded ({reason}); {mend}") from None
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, file: BinaryIO, progress: Progress) -> str:
    """Writes what the address holds, and returns its md5 sum."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        response = urllib.request.urlopen(url, timeout=SILENT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise OSError(f"{error.code} {error.reason}") from None
    with response:
        progress.total = response.length
        while block := response.read1(BLOCK):  # what has come, be it little
            digest.update(block)
            file.write(block)
            progress.done += len(block)
    file.flush()
    return digest.hexdigest()


def remove_abandoned(folder: Path, pattern: str) -> None:
    """Removes temporary files and folders that a killed process has left."""
    for path in folder.glob(pattern):
        with suppress(OSError):  # somebody else's, or just renamed
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file or a folder, as far as that is allowed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _decode_zip(path: Path, folder: Path) -> tuple[list[str], dict[str, Split]]:
    listing, entries = image_files.list_zip(path)
    return layout.decode(listing, InZip(path, entries), folder)


def _decode_tar(path: Path, folder: Path) -> tuple[list[str], dict[str, Split]]:
    batches = {name for names in OFFICIAL_FILES.values() for name in names}
    listing, contents = image_files.read_tar(path, batches)
    official = {name.rpartition("/")[2]: content for name, content in contents.items()}
    if not batches & official.keys():
        return layout.decode(listing, InMemory(contents), folder)
    mend = f"it is damaged or another file; download {OFFICIAL_URL} again, or give images of your own"

    def read(name: str, md5: str) -> bytes:
        content = official.get(name, b"")
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != md5:
            raise UserError(f"{path}: {name} is not that of the official CIFAR-10 archive (md5 {found}); {mend}")
        return content

    return decode_official(read)


def _official_folder_reader(path: Path) -> Callable[[str, str], bytes]:
    def read(name: str, md5: str) -> bytes:
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing; unpack the official archive again")
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
