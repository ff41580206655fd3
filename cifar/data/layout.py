"""Classes and splits of images that are laid out as <train|test>/<class>/<image> in a folder, zip or tar archive.

Files that are ambiguous are rejected with a message that names them. What is skipped is printed.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cifar.data import decoding, pictures
from cifar.data.decoding import Reader
from cifar.data.image_files import GIVE, LARGEST_FILE, UNFIT_NAME, Listing
from cifar.errors import UserError

SPLITS = ("train", "test")
TEST_FOLDERS = ("test", "validation", "val")  # the first of them that there is holds the test images
LAYOUT = "give <train|test>/<class>/<image>"

# Names of files that are not images. Any other file is taken for an image, and is an error if it cannot be decoded.
NO_IMAGE = re.compile(
    r"icon\r|readme|licen[cs]e|.*\.(?:txt|md|rst|csv|tsv|jsonl?|xml|html?|ya?ml|toml|ini|cfg|log|db|pdf|docx?|xlsx?|py|"
    r"ipynb|sh|md5|sha1|sha256|lnk|url)",
    re.IGNORECASE,
)


class Split(NamedTuple):
    """Images uint8 [n, 32, 32, 3], labels uint8 [n], and the file that each image came from (or no names)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    files: list[str]


class Found(NamedTuple):
    """Where the images of each split are: the name of the folder, and its files in order."""

    root: str  # '' or the folder around, as 'photos/'
    folders: dict[str, str]
    files: dict[str, list[str]]

    @property
    def names(self) -> list[str]:
        """The files of both splits."""
        return [name for files in self.files.values() for name in files]


def images_file(folder: Path, split: str) -> Path:
    """Returns the file for the images of a split, in a folder for decoded images."""
    return folder / f"{split}_images.npy"


def decode(listing: Listing, reader: Reader, to: Path, *, fit: bool = False) -> tuple[list[str], dict[str, Split]]:
    """Returns classes in alphabetical order, and the images of both splits in order of their paths, written to `to`.

    Hidden files and folders, files whose names are not those of images, and everything outside train/ and test/ are
    skipped, with a message.

    Raises UserError, naming the file, for whatever is not a 32x32 RGB image or cannot become one without loss, or, with
    `fit`, is no picture at all; OSError where the folder cannot be written.
    """
    where, (root, folders, by_split) = listing.where, (images := find_images(listing))
    for name in images.names:
        _check(listing, root, name, fit)
    classes = {split: {_class_of(name) for name in found} for split, found in by_split.items()}
    if classes["train"] != classes["test"]:
        odd = min(classes["train"] ^ classes["test"])
        with_it, without = folders.values() if odd in classes["train"] else reversed(folders.values())
        raise UserError(f"{where}: class {odd!r} has images under {with_it}/ but none under {without}/; {LAYOUT}")
    names = sorted(classes["train"])
    if not 2 <= len(names) <= 256:
        raise UserError(f"{where} has {len(names)} class(es); give between 2 and 256")
    _say_what_is_skipped(listing, [f"{root}{folder}/" for folder in folders.values()], images.names)
    if folders["test"] != "test":
        print(f"{where}: {root}{folders['test']}/ holds the test images", flush=True)
    decoding.decode_all(
        [
            part
            for split, found in by_split.items()
            for part in decoding.parts(where, reader, found, images_file(to, split), fit=fit)
        ]
    )
    number = {name: index for index, name in enumerate(names)}
    splits = {}
    for split, found in by_split.items():
        images = np.load(images_file(to, split), mmap_mode="r")
        labels = np.array([number[_class_of(name)] for name in found], np.uint8)
        splits[split] = Split(images, labels, found)
    return names, splits


def find_images(listing: Listing) -> Found:
    """Finds which files are the images of each split. Raises UserError where a split has none."""
    where, files = listing.where, [name for name in listing.sizes if not NO_IMAGE.fullmatch(name.rpartition("/")[2])]
    if not files:
        raise UserError(f"{where} holds no images; {LAYOUT}")
    root = _root(where, files)
    below = {
        folder: sorted_names(name for name in files if name.startswith(f"{root}{folder}/"))
        for folder in ("train", *TEST_FOLDERS)
    }
    folders = {"train": "train", "test": next((folder for folder in TEST_FOLDERS if below[folder]), "test")}
    for folder in folders.values():
        if not below[folder]:
            unreadable = (f"{name} {wrong}" for name, wrong in listing.wrong.items() if name.endswith("/"))
            raise UserError(f"{where} has no images under {root}{folder}/; {next(unreadable, LAYOUT)}")
    return Found(root, folders, {split: below[folder] for split, folder in folders.items()})


def sorted_names(names: Iterable[str]) -> list[str]:
    """Sorts relative paths part by part: '/' sorts before all other characters.

    How a file system or archive stores accents makes no difference, unless nothing else does.
    """
    return sorted(sorted(names), key=lambda name: unicodedata.normalize("NFC", name).replace("/", "\0"))


def _root(where: str, files: Iterable[str]) -> str:
    """Returns where train/ and test/ are: '' or a folder around them, as 'photos/'."""
    parts = (name.split("/") for name in files)
    known = {"train", *TEST_FOLDERS}
    roots = {"/".join([*part[:-3], ""]) for part in parts if len(part) >= 3 and part[-3] in known}
    if "" in roots or not roots:
        return ""
    if len(roots) > 1:
        raise UserError(
            f"{where} has images under {_some(roots)}, each with train/ or test/; give one of them, with both"
        )
    return roots.pop()


def _class_of(name: str) -> str:
    """Returns the class's folder, NFC-normalised: macOS decomposes accents, other systems do not."""
    return unicodedata.normalize("NFC", name.split("/")[-2])


def _check(listing: Listing, root: str, name: str, fit: bool) -> None:
    """Raises UserError for a file that does not lie in a class's folder, or is known to be no image."""
    if UNFIT_NAME.search(name):
        wrong = "has a line break, a control character or bytes that are not UTF-8 in its name; rename it"
        raise UserError(f"{listing.where}: {name!r} {wrong}")
    if name.endswith("/"):  # a folder, of which nobody knows what is in it
        raise UserError(f"{listing.where}: {name} {listing.wrong[name]}")
    if name.count("/") != root.count("/") + 2:
        raise UserError(f"{listing.where}: {name} is not in a class folder; {LAYOUT}")
    if name in listing.wrong:
        raise UserError(f"{listing.where}: {name} {listing.wrong[name]}")
    most, fix = (pictures.BYTES, "make it smaller") if fit else (LARGEST_FILE, GIVE)
    if listing.sizes[name] > most:
        raise UserError(f"{listing.where}: {name} has {listing.sizes[name]} bytes; {fix}")


def _say_what_is_skipped(listing: Listing, splits: Sequence[str], taken: list[str]) -> None:
    with_images = {name.rpartition("/")[0] for name in taken}
    class_folders = (name for name in listing.folders if name.count("/") == splits[0].count("/"))
    empty = {name for name in class_folders if name.startswith(tuple(splits))} - with_images
    rest = listing.sizes.keys() - set(taken)
    outside = {name for name in rest if not name.startswith(tuple(splits))}
    counts = {
        "hidden": listing.hidden,
        "files that are not images": rest - outside,
        f"outside {' and '.join(splits)}": outside,
        "class folders without images": empty,
    }
    said = [f"{len(names):,} {kind} ({_some(names)})" for kind, names in counts.items() if names]
    if said:
        print(f"{listing.where}: skipped {', '.join(said)}", flush=True)


def _some(names: Collection[str]) -> str:
    """Returns the first three, escaped if they are not printable."""
    shown = [name if name.isprintable() else ascii(name) for name in sorted(names)[:3]]
    return ", ".join([*shown, "..."] if len(names) > 3 else shown)
