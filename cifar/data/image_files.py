"""Images in a folder, zip or tar archive, laid out as <train|test>/<class>/<image>, decoded into arrays.

What would have to be guessed, scaled or cut is refused in a line that names the file. What is passed over is printed.
"""

import io
import lzma
import os
import re
import stat
import struct
import tarfile
import threading
import time
import unicodedata
import warnings
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from cifar import stop
from cifar.errors import UserError

T = TypeVar("T")

SIZE = 32  # pixels: the networks' pooling is made for it
SPLITS = ("train", "test")
LAYOUT = "give <train|test>/<class>/<image>"
AT_ONCE, PART = 8, 100  # threads that read a folder's files, and how many files each of them takes at a time
PART_SECONDS = 300  # until a disk has delivered them; a busy network disk opens some 10 files a second
UNIX = (3, 19)  # systems, as a zip numbers them, whose names are UTF-8: Linux and others, macOS
LARGEST_FILE = 1 << 20  # bytes; a 32x32 image as PNG or JPEG has 1 to 4 kB

# Names that would not fit in one line of a message or table, or not in UTF-8: Python decodes other bytes to surrogates.
UNFIT_NAME = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

UPRIGHT = {  # what undoes each EXIF orientation but 1
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Where Pillow finds an orientation. To let it look takes 5 % of the time of decoding.
NOTES = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}

# From the header, before `decode_image` looks at the size: an error that it can put into words.
warnings.simplefilter("error", Image.DecompressionBombWarning)


class Split(NamedTuple):
    """Images uint8 [n, 32, 32, 3], labels uint8 [n], and the file that each image came from (or no names)."""

    images: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    files: list[str]


class File(NamedTuple):
    """A file in a folder or archive. `wrong` says why it cannot be read, with the fix, if that is known already."""

    size: int  # bytes
    modified: int = 0  # ns
    wrong: str = ""


class Listing(NamedTuple):
    """What a folder or archive holds, by relative paths with forward slashes. What is hidden is in `hidden` alone."""

    where: str
    files: dict[str, File]
    folders: set[str]
    hidden: set[str]


# ---- what is there


def list_folder(root: Path) -> Listing:
    """Everything below a folder, links followed; hidden folders are not entered.

    Raises OSError for a folder that cannot be read, UserError for one that a link leads back to.
    """
    listing = Listing(str(root), {}, set(), set())
    to_do: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while to_do:
        raise_if_stopped("looking through the images")
        folder, above = to_do.pop()
        status = (root / folder).stat()
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise UserError(f"{root / folder} is a symbolic link to a folder that it lies in; remove it")
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if _is_hidden(entry.name):
                    listing.hidden.add(name)
                elif _is_folder(entry):
                    listing.folders.add(name)
                    to_do.append((name, above | {identity}))
                else:
                    listing.files[name] = _file(entry)
    return listing


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link that leads to itself: `_file` says so
        return entry.is_dir()
    return False


def _file(entry: os.DirEntry[str]) -> File:
    try:
        status = entry.stat()
    except OSError as error:
        what = (
            f"is a symbolic link to {str(Path(entry).readlink())!r}, and that"
            if entry.is_symlink()
            else "is listed, but"
        )
        return File(0, 0, f"{what} cannot be read ({error.strerror}); mend or remove it")
    # Reading a pipe would wait for ever.
    wrong = "" if stat.S_ISREG(status.st_mode) else "is a pipe, socket or device, not a file; remove it"
    return File(status.st_size, status.st_mtime_ns, wrong)


def decode_folder(root: Path, listing: Listing) -> tuple[list[str], dict[str, Split]]:
    """Classes and splits of a folder. A network disk is slow, but not when it is asked for many files at once."""
    return decode(listing, lambda name: (root / name).read_bytes(), AT_ONCE)


def decode_zip(path: Path) -> tuple[list[str], dict[str, Split]]:
    """Classes and splits of a zip."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}); make it anew") from None
    with archive:
        listing, entries = Listing(str(path), {}, set(), set()), {}
        for info in archive.infolist():
            name = _relative(listing, _zip_name(path, info))
            if name is None:
                continue
            wrong = ""
            if name in entries:
                wrong = "is there twice; make the zip anew"
            elif info.flag_bits & 1:
                wrong = "is encrypted; make the zip without a password"
            entries[name] = info
            listing.files[name] = File(info.file_size, 0, wrong)
        return decode(listing, lambda name: archive.read(entries[name]))


def _zip_name(path: Path, info: zipfile.ZipInfo) -> str:
    """The entry's name. Without a mark it should be in code page 437, but is in whatever its maker's system uses."""
    if info.flag_bits & 0x800:  # marked as UTF-8
        return info.filename
    raw = info.orig_filename.encode("cp437")  # undoes what zipfile does
    extra, declared = info.extra, False
    while len(extra) >= 4:
        kind, size = struct.unpack_from("<HH", extra)
        if kind == 0x7075 and extra[4:9] == struct.pack("<BL", 1, zlib.crc32(raw)):  # Info-ZIP's Unicode path
            raw, declared = extra[9 : 4 + size], True
        extra = extra[4 + size :]
    try:
        # macOS writes UTF-8 without the mark. On Windows it may be any encoding: what GBK has for a cat is UTF-8, too.
        return raw.decode("utf-8" if info.create_system in UNIX or declared else "ascii")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: entry {raw!r} has a name in an encoding that the zip does not declare; "
            "make the zip anew with names in UTF-8 (7-Zip: -mcu=on), or give the unpacked folder"
        ) from None


def _relative(listing: Listing, name: str) -> str | None:
    """The normalised path of a file in an archive; None for what is no file, after it has been listed.

    Raises UserError for names that lead out of the archive.
    """
    name = name.replace("\\", "/")  # some programs of Windows write them
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or ":" in "".join(parts[:1]):
        raise UserError(f"{listing.where}: entry {name!r} leaves the archive; make it with relative names")
    for depth, part in enumerate(parts, 1):
        if _is_hidden(part):
            listing.hidden.add("/".join(parts[:depth]))
            return None
    if not parts or name.endswith(("/", "/.")):
        listing.folders.add("/".join(parts))
        return None
    return "/".join(parts)


def read_tar(path: Path, large: Collection[str] = ()) -> tuple[Listing, dict[str, bytes]]:
    """What a tar archive holds, and its files' contents: of those up to LARGEST_FILE, or whose base name is in `large`.

    In one go, since to go back in a compressed archive is to begin anew. Raises UserError where it is damaged.
    """
    listing, contents = Listing(str(path), {}, set(), set()), {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                raise_if_stopped("reading the archive")
                name = _relative(listing, f"{member.name}/" if member.isdir() else member.name)
                if name is None:
                    continue
                wrong = "is there twice; make the archive anew" if name in listing.files else ""
                if not member.isreg():
                    wrong = "is no file but a link or device; pack with tar --dereference --hard-dereference"
                elif member.size <= LARGEST_FILE or name.rpartition("/")[2] in large:
                    content = archive.extractfile(member)
                    contents[name] = content.read() if content else b""
                listing.files[name] = File(member.size, 0, wrong)
            _require_end(archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy or make it again") from None
    return listing, contents


def _require_end(archive: tarfile.TarFile) -> None:
    """A cut or damaged header, too, ends tarfile's reading: where it ended, a block of zeros must be.

    Reading on to the end lets a compressed file's checksum be compared.
    """
    file = archive.fileobj
    if file is not None:
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError("no end-of-archive mark")
        while file.read(1 << 20):
            pass


# ---- from files to arrays


def decode(listing: Listing, read: Callable[[str], bytes], at_once: int = 1) -> tuple[list[str], dict[str, Split]]:
    """Classes in alphabetical order, and the images of both splits in that of their paths.

    With `at_once` above 1 so many threads read ahead. Hidden files and folders, and what lies beside train/ and test/,
    are passed over, which is printed.

    Raises UserError, naming the file, for whatever is not a 32x32 RGB image or cannot become one without loss.
    """
    where, files = listing.where, listing.files
    if not files:
        raise UserError(f"{where} holds no images; {LAYOUT}")
    root = _root(listing)
    by_split = {
        split: sorted((name for name in files if name.startswith(f"{root}{split}/")), key=lambda name: name.split("/"))
        for split in SPLITS
    }
    for split, found in by_split.items():
        if not found:
            raise UserError(f"{where} has no images under {root}{split}/; {LAYOUT}")
        for name in found:
            _check(listing, root, name)
    classes = {split: {_class_of(name) for name in found} for split, found in by_split.items()}
    if classes["train"] != classes["test"]:
        odd = min(classes["train"] ^ classes["test"])
        there, missing = SPLITS if odd in classes["train"] else SPLITS[::-1]
        raise UserError(f"{where}: class {odd!r} has images under {there}/ but none under {missing}/; {LAYOUT}")
    names = sorted(classes["train"])
    if not 2 <= len(names) <= 256:
        raise UserError(f"{where} has {len(names)} class(es); between 2 and 256 can be told apart here")
    _say_what_is_passed_over(listing, root, [name for found in by_split.values() for name in found])
    number = {name: index for index, name in enumerate(names)}

    def read_or_say(name: str) -> bytes:
        try:
            return read(name)
        except Exception as error:  # decompression of damaged data raises nearly anything
            reason = f"{error}" or type(error).__name__
            raise UserError(f"{where}: {name} cannot be read ({reason}); mend or remove it") from None

    splits = {}
    for split, found in by_split.items():
        images = np.empty((len(found), SIZE, SIZE, 3), np.uint8)
        contents = _read_ahead(read_or_say, found, at_once, where) if at_once > 1 else map(read_or_say, found)
        # In one thread: Pillow reads a header in Python, and two threads lose more time to its lock than they win.
        for image, name, content in zip(images, found, contents, strict=True):
            raise_if_stopped("decoding the images")
            image[:] = decode_image(content, f"{where}: {name}")
        labels = np.array([number[_class_of(name)] for name in found], np.uint8)
        splits[split] = Split(images, labels, found)
    return names, splits


def _root(listing: Listing) -> str:
    """Where train/ and test/ are: '' or a folder around them, as 'photos/'."""
    parts = (name.split("/") for name in listing.files)
    roots = {"/".join([*part[:-3], ""]) for part in parts if len(part) >= 3 and part[-3] in SPLITS}
    if "" in roots or not roots:
        return ""
    if len(roots) > 1:
        raise UserError(f"{listing.where} has images under {_some(roots)}, each with train/ or test/; give one of them")
    return roots.pop()


def _class_of(name: str) -> str:
    """The class's folder. macOS takes accents apart, other systems do not: a name is the same either way."""
    return unicodedata.normalize("NFC", name.split("/")[-2])


def _check(listing: Listing, root: str, name: str) -> None:
    """Raises UserError for a file that does not lie in a class's folder, or is known to be no image."""
    file = listing.files[name]
    if UNFIT_NAME.search(name):
        wrong = "has a line break, a control character or bytes that are not UTF-8 in its name; rename it"
        raise UserError(f"{listing.where}: {name!r} {wrong}")
    if name.count("/") != root.count("/") + 2:
        raise UserError(f"{listing.where}: {name} does not lie in a class's folder; {LAYOUT}")
    if file.wrong:
        raise UserError(f"{listing.where}: {name} {file.wrong}")
    if file.size > LARGEST_FILE:
        raise UserError(f"{listing.where}: {name} has {file.size} bytes; give {SIZE}x{SIZE} images")


def _say_what_is_passed_over(listing: Listing, root: str, taken: list[str]) -> None:
    with_images = {name.rpartition("/")[0] for name in taken}
    class_folders = (name for name in listing.folders if name.count("/") == root.count("/") + 1)
    empty = {name for name in class_folders if name.startswith((f"{root}train/", f"{root}test/"))} - with_images
    outside = listing.files.keys() - set(taken)
    counts = {
        "hidden": listing.hidden,
        f"outside {root}train/ and {root}test/": outside,
        "class folders without images": empty,
    }
    said = [f"{len(names):,} {kind} ({_some(names)})" for kind, names in counts.items() if names]
    if said:
        print(f"{listing.where}: passed over {', '.join(said)}", flush=True)


def _some(names: Collection[str]) -> str:
    """The first three, as Python writes them where they hold what cannot be printed."""
    shown = [name if name.isprintable() else ascii(name) for name in sorted(names)[:3]]
    return ", ".join([*shown, "..."] if len(names) > 3 else shown)


def raise_if_stopped(doing: str) -> None:
    """Raises UserError where the user or the machine has asked this process to stop."""
    if stop.requested():
        raise UserError(f"{stop.name()} asked to stop while {doing}; nothing was kept", 0)


def in_thread(work: Callable[[], T]) -> Future[T]:
    """Begins the work in a thread that need not end before the process can: a disk may never answer."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # it is raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def wait_for(future: Future[T], seconds: float, doing: str) -> T:
    """What a thread brings. Raises UserError after so many seconds, and where a stop is asked for meanwhile."""
    deadline = time.monotonic() + seconds
    while not future.done():
        raise_if_stopped(doing)
        if time.monotonic() > deadline:
            raise UserError(f"{doing} takes more than {seconds:.0f} s; look at the disk or network, and start again")
        wait([future], timeout=0.5)
    return future.result()


def _read_ahead(read: Callable[[str], bytes], names: list[str], at_once: int, where: str) -> Iterator[bytes]:
    """The files' contents in order, read in parts by threads; no more than `at_once` parts are held."""

    def read_part(part: list[str]) -> list[bytes]:
        return [read(name) for name in part]

    parts = iter([names[start : start + PART] for start in range(0, len(names), PART)])
    ahead = deque(in_thread(partial(read_part, part)) for part in islice(parts, at_once))
    while ahead:
        contents = wait_for(ahead.popleft(), PART_SECONDS, f"reading {PART} files of {where}")
        ahead.extend(in_thread(partial(read_part, part)) for part in islice(parts, 1))
        yield from contents


def decode_image(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """One PNG or JPEG as uint8 [32, 32, 3], upright. Grey, palette and opaque alpha become RGB, which loses nothing.

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
            if image.format == "PNG":
                # Byte 24 is the bit depth. Pillow cuts 16 bits a channel down to 8 without a word.
                if content[24] == 16:
                    raise refuse("has 16 bits a channel")
                if getattr(image, "is_animated", False):
                    raise refuse("is animated")
            image.load()
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                with_alpha = image.convert("RGBA")
                if np.asarray(with_alpha)[..., 3].min() < 255:
                    raise refuse("is partly transparent")
                return np.asarray(upright(image, with_alpha).convert("RGB"))
            if image.mode not in ("RGB", "L", "P", "1"):
                raise refuse(f"has colour mode {image.mode}")
            return np.asarray(upright(image, image if image.mode == "RGB" else image.convert("RGB")))
    except UnidentifiedImageError:
        raise refuse("is not an image") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise refuse("has far too many pixels") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # what Pillow's decoders raise on damaged files
        raise refuse(f"is damaged ({error})") from None


def upright(opened: Image.Image, pixels: Image.Image) -> Image.Image:
    """`pixels`, made from the opened file, turned or mirrored as the file's EXIF orientation says."""
    orientation = 1
    if not NOTES & opened.info.keys():
        return pixels
    with suppress(Exception):  # a camera's broken note is no reason to refuse its picture
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    return pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels
