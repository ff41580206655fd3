"""Where images come from: scanned digits, official CIFAR archives, any folder, zip or tar of images.

Everything here runs once per machine and set of images: what is decoded goes into the cache (cache.py).
"""

import hashlib
import http.client
import io
import lzma
import os
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from PIL import Image

from cifar import files
from cifar.data import image_files, layout, official, pictures
from cifar.data.decoding import InFolder, InMemory, InZip
from cifar.data.image_files import Listing
from cifar.data.layout import Split
from cifar.data.official import OFFICIAL
from cifar.data.waiting import ProgressBar, in_thread, wait_for
from cifar.errors import UserError

SIZE = image_files.SIZE
FITTED = b"fitted 1"  # change it whenever --fit makes other images of a picture
BLOCK = 1 << 18  # bytes that are read at a time
DOWNLOAD_SECONDS, SILENT_SECONDS = 3600, 60  # for all of it, and without a byte
ABANDONED_SECONDS = 24 * 3600  # after which nobody can still be writing a temporary file


class Source(NamedTuple):
    """A source of images: `key` changes with its content; `decode` returns classes and splits.

    `decode` gets an empty folder, to which it may write images (layout.images_file) instead of holding them in memory.
    """

    key: str
    decode: Callable[[Path], tuple[list[str], dict[str, Split]]]


def find(data: str, download_to: Path = Path("data"), *, fit: bool = False) -> Source:
    """Finds the source that `--data` names; downloads an official archive into `data/` if asked for and not there.

    With `fit`, pictures of any size and kind in folders and archives become 32x32 images, as in the app.

    Raises UserError for a path that is missing or is no source of images.
    """
    if data == "digits":
        return Source("digits-1", lambda _: decode_digits())
    if wanted := OFFICIAL.get(data):
        folder, archive = download_to / wanted.folder, download_to / Path(wanted.url).name
        if not folder.is_dir() and not archive.is_file():
            download(wanted.url, archive, wanted.md5)
        path = folder if folder.is_dir() else archive
    else:
        path = Path(data)
    try:
        if path.is_dir():
            return _folder(path, fit)
        if path.is_file():
            return _archive(path, fit)
        exists = path.exists()
    except PermissionError as error:
        raise UserError(f"{error.filename or path} may not be read; change its permissions") from None
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read ({error.strerror}); give another --data") from None
    wrong = "is neither a file nor a folder" if exists else "does not exist"
    raise UserError(
        f"--data {data} {wrong}; give {', '.join(OFFICIAL)}, digits, or the path of an archive or folder of images"
    )


def _folder(path: Path, fit: bool) -> Source:
    if found := official.in_folder(path):
        which, path = found
        read, listing = official.folder_reader(path), image_files.list_folder(path)
        key = _key(listing, sorted(which.names & listing.sizes.keys()), b"")
        return Source(key, lambda _: official.decode(which, read))
    listing = image_files.list_folder(path)
    key = _key(listing, layout.find_images(listing).names, FITTED if fit else b"")
    return Source(key, lambda folder: layout.decode(listing, InFolder(path), folder, fit=fit))


def _key(listing: Listing, names: Iterable[str], more: bytes) -> str:
    """Hashes names, sizes and times of the images: reading 50,000 files at every start would cost seconds to minutes.

    Other files may change during the run: its log or its directory may lie beside train/ and test/.

    ctime is included because bitmaps of one size, unpacked with their archive's times, differ in nothing else.
    """
    sizes, changed = listing.sizes, listing.changed
    words = "".join([f"{name}\0{sizes[name]}\0{changed[name]}\n" for name in names])
    return hashlib.sha256(words.encode(errors="surrogateescape") + more).hexdigest()


def _archive(path: Path, fit: bool) -> Source:
    digest = hashlib.sha256(FITTED if fit else b"")
    with path.open("rb") as file:
        start = file.read(4)
        digest.update(start)
        for block in blocks(file, f"reading {path}"):
            digest.update(block)
    key = digest.hexdigest()
    if _is_tar(path):  # before zips, which are found by their end: a tar's last file may be one
        return Source(key, partial(_decode_tar, path, fit=fit))
    if zipfile.is_zipfile(path):
        return Source(key, partial(_decode_zip, path, fit=fit))
    if start == b"PK\3\4":
        raise UserError(f"{path} is a zip that was cut short; copy or make it again")
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX")):  # gzip, bzip2, xz
        raise UserError(f"{path} holds no tar archive, or is damaged or cut short; copy or make it again")
    known = "a zip or tar archive of images nor an official archive of CIFAR-10 or CIFAR-100"
    raise UserError(f"{path} is neither {known}; give one of these, or the unpacked folder")


def _is_tar(path: Path) -> bool:
    try:
        return tarfile.is_tarfile(path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy or make it again") from None


def blocks(file: io.BufferedIOBase | io.RawIOBase, doing: str) -> Iterator[memoryview]:
    """Yields the file's content, in blocks that reuse one buffer. Raises UserError on a stop request."""
    buffer = memoryview(bytearray(BLOCK))
    with ProgressBar(doing, "B", os.fstat(file.fileno()).st_size) as progress:
        while count := file.readinto(buffer):
            progress.done += count
            progress.look()
            yield buffer[:count]


# ---- digits


def decode_digits() -> tuple[list[str], dict[str, Split]]:
    """Loads scikit-learn's 1,797 scanned digits, enlarged from 8x8 to 32x32 RGB; a fixed stratified split 1,437/360."""
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


# ---- downloads


def download(url: str, path: Path, md5: str) -> None:
    """Downloads to a temporary name, checks the md5 sum, and only then gives the file its own name.

    Raises UserError without a network, for a wrong sum, and on a stop request; leaves no partial file.
    """
    fix = f"download it yourself to {path}, or pass --data PATH or --recipe digits"
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    print(f"downloading {url} to {path}", flush=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, f".{path.name}.*.part")
        with part.open("xb") as file, ProgressBar(f"downloading {url}", "B") as progress:
            fetched = in_thread(partial(_fetch, url, file, progress))  # so a stop is noticed even if the network hangs
            found = wait_for(fetched, DOWNLOAD_SECONDS, progress)
            os.fsync(file.fileno())
        if found != md5:
            raise UserError(f"{url}: the download has md5 {found}, not {md5}; {fix}")
        part.replace(path)
        files.sync(path.parent)
    except (OSError, http.client.HTTPException) as error:  # URLError and timeouts are OSErrors
        reason = getattr(error, "reason", None) or error
        raise UserError(f"{url}: cannot be downloaded ({reason}); {fix}") from None
    finally:
        part.unlink(missing_ok=True)


def _fetch(url: str, file: BinaryIO, progress: ProgressBar) -> str:
    """Writes what the address holds, and returns its md5 sum."""
    digest = hashlib.md5(usedforsecurity=False)
    try:
        response = urllib.request.urlopen(url, timeout=SILENT_SECONDS)
    except urllib.error.HTTPError as error:
        with error:  # it holds the connection
            raise OSError(f"{error.code} {error.reason}") from None
    with response:
        progress.total = response.length
        while block := response.read1(BLOCK):  # whatever has arrived
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
                files.remove(path)


def _decode_zip(path: Path, folder: Path, *, fit: bool) -> tuple[list[str], dict[str, Split]]:
    listing, entries = image_files.list_zip(path)
    return layout.decode(listing, InZip(path, entries), folder, fit=fit)


def _decode_tar(path: Path, folder: Path, *, fit: bool) -> tuple[list[str], dict[str, Split]]:
    large = {name for each in OFFICIAL.values() for name in each.names}
    fitting: dict[str, Any] = {"largest": pictures.BYTES, "shrink": pictures.as_png} if fit else {}
    listing, contents = image_files.read_tar(path, large, **fitting)
    if which := official.in_archive(contents):
        return official.decode(which, official.archive_reader(which, path, contents))
    return layout.decode(listing, InMemory(contents), folder, fit=fit)
