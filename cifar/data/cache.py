"""The decoded images of a source, once per machine: uint8 arrays on disk that every process maps.

A cache directory is created atomically (temporary name, sync, rename), so jobs may start side by side. Sizes and
checksums are verified before use: a power cut or an old disk may damage files.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from cifar import files
from cifar.data import sources
from cifar.data.layout import images_file
from cifar.data.sources import Source
from cifar.errors import UserError
from cifar.formats import CACHE

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
CONTENT = {*(f"{name}.npy" for name in ARRAYS), "files.json", "meta.json"}
CHECKSUMS = "checksums.json"  # the name, size and crc32 of each of them
OWN_FOLDER = "set XDG_CACHE_HOME to a folder of your own"

_verified: set[tuple[object, ...]] = set()  # files whose content this process has compared


@dataclass(frozen=True)
class Data:
    """Memory-mapped images uint8 [n, 32, 32, 3] and labels uint8 [n] of both splits, and what belongs to them.

    `mean` and `std` are those of the training images per channel, on a scale of 0 to 1. `fingerprint` is a sha256
    of classes, images and labels: the same whatever archive or folder the images came in.
    """

    path: Path
    classes: list[str]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    fingerprint: str
    train_images: npt.NDArray[np.uint8]
    train_labels: npt.NDArray[np.uint8]
    test_images: npt.NDArray[np.uint8]
    test_labels: npt.NDArray[np.uint8]

    def files(self, split: str) -> list[str]:
        """Returns the name of each image's file within its source; empty where the source has none."""
        names: list[str] = json.loads((self.path / "files.json").read_text())[split]
        return names


def open_data(data: str, *, fit: bool = False) -> Data:
    """Maps the images that `--data` names, decoding them first if this machine has not done so yet.

    With `fit`, pictures of other sizes and kinds become 32x32 images (sources.find).

    A cache that is broken, or of an earlier version, is rebuilt, with a message.

    Raises UserError for whatever is wrong with the source, or where the cache cannot be read or written.
    """
    source = sources.find(data, fit=fit)
    path = directory() / f"{source.key[:32]}-v{CACHE}"
    try:
        fault = _fault(path)
    except PermissionError as error:
        fix = f"change its permissions, or {OWN_FOLDER}"
        raise UserError(f"{error.filename}: no permission to read the image cache; {fix}") from None
    if fault is not None:
        if fault:
            print(f"image cache {path}: {fault}; rebuilding it", flush=True)
        try:
            _make(path, source, data, fit)
        except OSError as error:
            fix = f"make room or change permissions there, or {OWN_FOLDER}"
            wrong = f"the image cache cannot be written ({error.strerror or error})"
            raise UserError(f"{path.parent}: {wrong}; {fix}") from None
    return open_cache(path)


def open_cache(path: Path) -> Data:
    """Maps the arrays of a cache directory that `open_data` has verified."""
    for pause in (0.1, 0.5):  # another process may be renaming it in this very moment
        with suppress(FileNotFoundError):
            return _map(path)
        time.sleep(pause)
    try:
        return _map(path)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path}: the image cache was removed or damaged just now ({error}); start again") from None


def _map(path: Path) -> Data:
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text())
    # Copy-on-write, since torch does not take read-only arrays; writes would stay private to the process.
    arrays = {name: np.load(path / f"{name}.npy", mmap_mode="c") for name in ARRAYS}
    meta["mean"], meta["std"] = tuple(meta["mean"]), tuple(meta["std"])
    return Data(path=path, **meta, **arrays)


def directory() -> Path:
    """Returns where caches are kept, by the XDG base directory specification.

    In the temporary folder for a user without a home, as in containers that run with another user id.
    """
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "cifar"
    try:
        return Path.home() / ".cache" / "cifar"
    except RuntimeError:
        return _own_temporary_folder()


def _own_temporary_folder() -> Path:
    try:
        path = Path(tempfile.gettempdir()) / f"cifar-{os.getuid()}"
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise UserError(
            f"no home folder, and no temporary folder to write to ({error.strerror}); {OWN_FOLDER}"
        ) from None
    # Another user may have made a folder of this name, and could replace the images in it.
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise UserError(f"{path}: the image cache can be written by others; {OWN_FOLDER}")
    return path


def _fault(path: Path) -> str | None:
    """Returns what is wrong with a cache: None if nothing, '' if it does not exist. Raises PermissionError.

    Sizes are checked at each call, checksums once, by the first process of each machine: 184 MB take 65 ms.
    """
    try:
        sums = json.loads((path / CHECKSUMS).read_bytes())
        if sums.keys() != CONTENT:
            return f"{CHECKSUMS} is damaged"
        for name, (size, checksum) in sums.items():
            status = (path / name).stat()
            if status.st_size != size:
                return f"{name} has {status.st_size:,} bytes instead of {size:,}"
            identity = (path, name, checksum, status.st_ino, status.st_mtime_ns)
            if os.environ.get("LOCAL_RANK", "0") == "0" and identity not in _verified:
                if _crc32(path / name) != checksum:
                    return f"{name} is damaged"
                _verified.add(identity)
    except (FileNotFoundError, NotADirectoryError) as error:
        if not os.path.lexists(path):
            return ""
        name = Path(error.filename).name
        return f"{name} is missing{' (earlier versions wrote none)' if name == CHECKSUMS else ''}"
    except PermissionError:
        raise
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, AttributeError, TypeError):
        return f"{CHECKSUMS} is damaged"
    return None


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb", buffering=0) as file:
        for block in sources.blocks(file, f"reading {path}"):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _make(path: Path, source: Source, data: str, fit: bool) -> None:
    """Raises UserError for what is wrong with the source, OSError where the cache cannot be written."""
    _make_directory(path.parent)
    sources.remove_abandoned(path.parent, ".*")
    temporary = path.with_name(f".{path.name}.{uuid4().hex}")  # its permissions follow the umask
    temporary.mkdir()
    try:
        classes, splits = source.decode(temporary)
        if sources.find(data, fit=fit).key != source.key:
            raise UserError(f"--data {data} changed while it was being read; start again when it is complete")
        fingerprint = hashlib.sha256(json.dumps(classes).encode())
        for split, (images, labels, _) in splits.items():
            if not images_file(temporary, split).exists():
                np.save(images_file(temporary, split), images)
            np.save(temporary / f"{split}_labels.npy", labels)
            fingerprint.update(images.data)
            fingerprint.update(labels.data)
        mean, std = statistics(splits["train"].images)
        (temporary / "files.json").write_text(json.dumps({split: splits[split].files for split in splits}))
        meta = {"classes": classes, "mean": mean, "std": std, "fingerprint": fingerprint.hexdigest()}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        sums = {name: ((temporary / name).stat().st_size, _crc32(temporary / name)) for name in sorted(CONTENT)}
        (temporary / CHECKSUMS).write_text(json.dumps(sums, indent=1))
        for file in temporary.iterdir():
            files.sync(file)
        files.sync(temporary)
        _put(temporary, path)
        files.sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _make_directory(path: Path) -> None:
    """Creates the caches' folder with its parent's permissions, so that a shared folder stays shared."""
    if not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(exist_ok=True)
        with suppress(PermissionError):  # another user was faster
            path.chmod(stat.S_IMODE(path.parent.stat().st_mode))


def _put(temporary: Path, path: Path) -> None:
    """Renames the cache into place. A broken one is moved aside first: processes that map it keep their map."""
    while _fault(path) is not None:  # else another job was faster, with the same bytes
        aside = path.with_name(f".{path.name}.{uuid4().hex}")
        with suppress(FileNotFoundError):
            path.rename(aside)
        files.remove(aside)
        try:
            temporary.rename(path)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        else:
            return  # another job may move it aside in turn, but then installs a complete one itself


def statistics(images: npt.NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Returns mean and standard deviation per channel on a scale of 0 to 1, exact (from counts of the 256 values)."""
    values = np.arange(256) / 255
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 100):  # bincount needs 64 bits a value: few enough for the processor's cache
        pixels = images[start : start + 100].reshape(-1, 3)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]
    mean = (counts @ values) / counts.sum(axis=1)
    square = (counts @ values**2) / counts.sum(axis=1)
    # A channel that never varies would divide by zero; one step of 256 is the least that uint8 can resolve.
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), 1 / 255)
    return mean.tolist(), std.tolist()
