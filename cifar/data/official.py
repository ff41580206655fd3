"""The archives that Alex Krizhevsky publishes: CIFAR-10, and CIFAR-100 with its fine labels.

They contain pickles, which can run any code: only files with the published md5 sums are read.
"""

import hashlib
import pickle
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cifar.data.image_files import SIZE
from cifar.data.layout import SPLITS, Split
from cifar.errors import UserError

Read = Callable[[str, str], bytes]  # a file's content, from its name and md5 sum


class Official(NamedTuple):
    """An official archive. All md5 sums are also in torchvision.datasets.cifar."""

    title: str
    url: str
    md5: str
    folder: str  # in the archive
    files: Mapping[str, Mapping[str, str]]  # of each split: names and md5 sums
    labels: str  # their key in a file
    classes: tuple[str, ...]  # () where a file lists them:
    list_of_classes: tuple[str, str, str] = ("", "", "")  # its name, md5 sum and key

    @property
    def names(self) -> set[str]:
        """All files that are read."""
        return {name for files in self.files.values() for name in files} | {self.list_of_classes[0]} - {""}


OFFICIAL = {
    "cifar10": Official(
        title="CIFAR-10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
        md5="c58f30108f718f92721af3b95e74349a",
        folder="cifar-10-batches-py",
        files={
            "train": {
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
            },
            "test": {"test_batch": "40351d587109b95175f43aff81a1287e"},
        },
        labels="labels",
        classes=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    ),
    "cifar100": Official(
        title="CIFAR-100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz",
        md5="eb9058c3a382ffc7106e4002c42a8d85",
        folder="cifar-100-python",
        files={
            "train": {"train": "16019d7e3df5f24257cddd939b257f8d"},
            "test": {"test": "f0ef6b0ae62326f3e7ffdfab6717acfc"},
        },
        labels="fine_labels",
        classes=(),
        list_of_classes=("meta", "7973b15100ade9c7d40fb424638fde48", "fine_label_names"),
    ),
}


def in_folder(path: Path) -> tuple[Official, Path] | None:
    """Finds the official data set that was unpacked in this folder or a folder in it, and the folder of its files."""
    for official in OFFICIAL.values():
        for folder in (path / official.folder, path):
            if (folder / next(iter(official.files["train"]))).is_file():
                return official, folder
    return None


def in_archive(names: Iterable[str]) -> Official | None:
    """Finds the official data set that an archive's file names belong to."""
    paths = [name.rpartition("/") for name in names]
    for official in OFFICIAL.values():
        for folder, _, name in paths:
            # CIFAR-100's files are called like the folders of a custom data set, beside which there may be any files.
            own = name not in SPLITS or folder.rpartition("/")[2] == official.folder
            if name in official.files["train"] and own:
                return official
    return None


def folder_reader(path: Path) -> Read:
    """Makes a reader of an unpacked archive; it raises UserError for a file that is missing or has another md5 sum."""

    def read(name: str, md5: str) -> bytes:
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing; unpack the official archive again")
        try:
            content = (path / name).read_bytes()
        except OSError as error:
            raise UserError(f"{path / name}: {error.strerror}; unpack the official archive again") from None
        found = _md5(content)
        if found != md5:
            raise UserError(f"{path / name}: md5 {found}, not {md5}; unpack the official archive again")
        return content

    return read


def archive_reader(official: Official, path: Path, contents: Mapping[str, bytes]) -> Read:
    """Returns a reader of an archive's files by full path; it raises UserError if a file's md5 differs."""
    by_name = {name.rpartition("/")[2]: content for name, content in contents.items()}
    fix = f"it is damaged or another file; download {official.url} again, or give images of your own"

    def read(name: str, md5: str) -> bytes:
        content = by_name.get(name, b"")
        found = _md5(content)
        if found != md5:
            raise UserError(f"{path}: {name} is not that of the official {official.title} archive (md5 {found}); {fix}")
        return content

    return read


def _md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


def decode(official: Official, read: Read) -> tuple[list[str], dict[str, Split]]:
    """Returns classes and splits.

    The files are pickles of rows [3 * 32 * 32], channel by channel; `read` checks md5 sums.
    """
    splits, classes = {}, official.classes
    if not classes:
        name, md5, key = official.list_of_classes
        classes = tuple(pickle.loads(read(name, md5), encoding="latin1")[key])
    for split in SPLITS:
        batches = [pickle.loads(read(name, md5), encoding="latin1") for name, md5 in official.files[split].items()]
        rows = np.concatenate([batch["data"] for batch in batches])
        splits[split] = Split(
            np.ascontiguousarray(rows.reshape(-1, 3, SIZE, SIZE).transpose(0, 2, 3, 1)),
            np.concatenate([batch[official.labels] for batch in batches]).astype(np.uint8),
            [name for batch in batches for name in batch["filenames"]],
        )
    return list(classes), splits
