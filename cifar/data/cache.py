"""The decoded images of a source, once per machine: uint8 arrays on disk that every process maps.

A cache directory appears whole or not at all (temporary name, rename), so that jobs may start side by side.
"""

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from cifar.data import sources
from cifar.data.image_files import Split
from cifar.errors import UserError

FORMAT = 1


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
        """The name of each image's file within its source; empty where the source has none."""
        names: list[str] = json.loads((self.path / "files.json").read_text())[split]
        return names


def open_data(data: str) -> Data:
    """Maps the images that `--data` names, decoding them first if this machine has not done so yet.

    Raises UserError for whatever is wrong with the source, or where the cache cannot be written.
    """
    source = sources.find(data)
    path = directory() / f"{source.key[:32]}-v{FORMAT}"
    if not (path / "meta.json").is_file():
        classes, splits = source.decode()
        if sources.find(data).key != source.key:
            raise UserError(f"--data {data} changed while it was being read; start again when it is complete")
        try:
            _write(path, classes, splits)
        except OSError as error:
            raise UserError(f"{directory()}: the image cache cannot be written ({error.strerror}); "
                            "make room there, or set XDG_CACHE_HOME") from None  # fmt: skip
    return open_cache(path)


def open_cache(path: Path) -> Data:
    """Maps the arrays of a cache directory."""
    meta = json.loads((path / "meta.json").read_text())
    # Copy on write, since torch takes no read-only array: what a process might write would stay its own.
    arrays = {name: np.load(path / f"{name}.npy", mmap_mode="c") for name in
              ("train_images", "train_labels", "test_images", "test_labels")}  # fmt: skip
    meta["mean"], meta["std"] = tuple(meta["mean"]), tuple(meta["std"])
    return Data(path=path, **meta, **arrays)


def directory() -> Path:
    """Where caches are kept, by the XDG base directory specification."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cifar"


def _write(path: Path, classes: list[str], splits: dict[str, Split]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        fingerprint = hashlib.sha256(json.dumps(classes).encode())
        for split, (images, labels, _) in splits.items():
            for kind, array in (("images", images), ("labels", labels)):
                np.save(temporary / f"{split}_{kind}.npy", array)
                fingerprint.update(array.data)
        mean, std = statistics(splits["train"].images)
        (temporary / "files.json").write_text(json.dumps({split: splits[split].files for split in splits}))
        meta = {"classes": classes, "mean": mean, "std": std, "fingerprint": fingerprint.hexdigest()}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=1))
        try:
            temporary.rename(path)
        except OSError:
            if not (path / "meta.json").is_file():  # else another job was faster, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def statistics(images: npt.NDArray[np.uint8]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation per channel on a scale of 0 to 1, exact (from the counts of the 256 values)."""
    values = np.arange(256) / 255
    counts = np.zeros((3, 256), np.int64)
    for start in range(0, len(images), 100):  # bincount takes 64 bits a value: so few stay in the processor's cache
        pixels = images[start : start + 100].reshape(-1, 3)
        counts += [np.bincount(pixels[:, channel], minlength=256) for channel in range(3)]
    mean = (counts @ values) / counts.sum(axis=1)
    square = (counts @ values**2) / counts.sum(axis=1)
    # A channel that never varies would divide by zero; one step of 256 is the least that uint8 can resolve.
    std = np.maximum(np.sqrt(np.maximum(square - mean**2, 0)), 1 / 255)
    return mean.tolist(), std.tolist()
