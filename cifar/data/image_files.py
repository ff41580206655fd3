"""What a folder, zip or tar archive of images holds, and its files as pixels.

What would have to be guessed, scaled or cut is refused in a line that names the file.
"""

import io
import lzma
import os
import re
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, UnidentifiedImageError

from cifar.data.waiting import ProgressBar
from cifar.errors import UserError

SIZE = 32  # pixels: the networks' pooling is made for it
UNIX = (3, 19)  # systems, as a zip numbers them, whose names are UTF-8: Linux and others, macOS
LARGEST_FILE = 1 << 20  # bytes; a 32x32 image as PNG or JPEG has 1 to 4 kB
HELD = 1 << 14  # bytes of a picture of any size that are kept in memory until it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no format that starts another program, as EPS does
MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA")  # that become RGB without loss, where nothing is transparent
REMOVE = "repair or remove it"
GIVE = f"give opaque 8-bit RGB or grey images of {SIZE}x{SIZE} pixels, or train.py --fit {SIZE}, which makes them so"

# Names that would not fit in one line of a message or table, or not in UTF-8: Python decodes other bytes to surrogates.
UNFIT_NAME = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# A relative path that is as it should be and leads to nothing hidden, as nearly all are.
PART_OF_PATH = r"(?!__MACOSX(?:/|\Z))[^./\\:][^/\\:]*"
ORDINARY_PATH = re.compile(f"{PART_OF_PATH}(?:/{PART_OF_PATH})*")

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


@dataclass
class Listing:
    """What a folder or archive holds, by relative paths with forward slashes. What is hidden is in `hidden` alone.

    Plain numbers and strings, since there may be 100,000 files: an object for each would take as long as to ask for it.
    """

    where: str
    sizes: dict[str, int] = field(default_factory=dict)  # bytes, of each file
    # ns, of each file in a folder: its content, and its entry, whose time nobody can set
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # of some: why it cannot be read, with the fix
    folders: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)


# ---- what is there


def list_folder(root: Path) -> Listing:
    """Everything below a folder, links followed; hidden folders are not entered.

    Raises OSError for a folder that cannot be read, UserError for one that a link leads back to.
    """
    listing = Listing(str(root))
    to_do: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    with ProgressBar("looking through the images", "files") as progress:
        while to_do:
            progress.done = len(listing.sizes)
            progress.look()
            folder, above = to_do.pop()
            place = f"{root}/{folder}" if folder else str(root)
            descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)  # so that no file's whole path is looked up
            try:
                status = os.fstat(descriptor)
                identity = (status.st_dev, status.st_ino)
                if identity in above:
                    raise UserError(f"{place} is a symbolic link to a folder that it lies in; remove it")
                inner = _list_one(listing, folder, descriptor)
            finally:
                os.close(descriptor)
            to_do += [(name, above | {identity}) for name in inner]
    return listing


def _list_one(listing: Listing, folder: str, descriptor: int) -> list[str]:
    """What lies in a folder itself; returns the folders in it."""
    prefix = f"{folder}/" if folder else ""
    sizes, changed, inner = listing.sizes, listing.changed, []
    with os.scandir(descriptor) as entries:
        for entry in entries:
            own_name = entry.name
            name = prefix + own_name
            if _is_hidden(own_name):
                listing.hidden.add(name)
                continue
            try:
                if entry.is_dir():
                    inner.append(name)
                    continue
                status = entry.stat()
            except OSError as error:
                sizes[name], changed[name] = 0, (0, 0)
                listing.wrong[name] = _unreadable(f"{listing.where}/{name}", error)
                continue
            sizes[name], changed[name] = status.st_size, (status.st_mtime_ns, status.st_ctime_ns)
            if not stat.S_ISREG(status.st_mode):  # to read a pipe would wait for ever
                listing.wrong[name] = "is a pipe, socket or device, not a file; remove it"
    listing.folders.update(inner)
    return inner


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name == "__MACOSX"


def _unreadable(path: str, error: OSError) -> str:
    try:
        what = f"is a symbolic link to {str(Path(path).readlink())!r}, and that"
    except OSError:
        what = "is listed, but"
    return f"{what} cannot be read ({error.strerror}); repair or remove it"


def list_zip(path: Path) -> tuple[Listing, dict[str, zipfile.ZipInfo]]:
    """What a zip holds, and each file's entry. Raises UserError where it is damaged."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}); make it anew") from None
    listing, entries = Listing(str(path)), {}
    with archive:
        for info in archive.infolist():
            name = _relative(listing, _zip_name(path, info))
            if name is None:
                continue
            if name in entries:
                listing.wrong[name] = "is there twice; make the zip anew"
            elif info.flag_bits & 1:
                listing.wrong[name] = "is encrypted; make the zip without a password"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # Python has no Deflate64, and unpacks bzip2 and LZMA whole, whatever size an entry tells.
                listing.wrong[name] = "is compressed by another method than Deflate; make the zip again with that one"
            entries[name], listing.sizes[name] = info, info.file_size
    return listing, entries


def _zip_name(path: Path, info: zipfile.ZipInfo) -> str:
    """The entry's name. Without a mark it should be in code page 437, but is in whatever its maker's system uses."""
    if info.flag_bits & 0x800:  # marked as UTF-8
        return info.filename
    if info.orig_filename.isascii() and b"up" not in info.extra:  # nor is there another name
        return info.orig_filename
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
    if ORDINARY_PATH.fullmatch(name):
        return name
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


def read_tar(
    path: Path,
    large: Collection[str] = (),
    largest: int = LARGEST_FILE,
    shrink: Callable[[bytes], bytes] = lambda content: content,
) -> tuple[Listing, dict[str, bytes]]:
    """What a tar archive holds, and its files' contents: of those up to `largest`, or whose base name is in `large`.

    The former go through `shrink` where they have more than HELD bytes; it raises UserError for one that is wrong.

    In one go, since to go back in a compressed archive is to begin anew. Raises UserError where it is damaged.
    """
    listing, contents = Listing(str(path)), {}
    try:
        with tarfile.open(path) as archive, ProgressBar("reading the archive", "files") as progress:
            for member in archive:
                progress.done = len(listing.sizes)
                progress.look()
                name = _relative(listing, f"{member.name}/" if member.isdir() else member.name)
                if name is None:
                    continue
                if name in listing.sizes:
                    listing.wrong[name] = "is there twice; make the archive anew"
                if not member.isreg():
                    listing.wrong[name] = (
                        "is no file but a link or device; pack with tar --dereference --hard-dereference"
                    )
                elif name.rpartition("/")[2] in large or member.size <= HELD:
                    contents[name] = _content(archive, member)
                elif member.size <= largest:
                    try:
                        contents[name] = shrink(_content(archive, member))
                    except UserError as error:
                        listing.wrong[name] = f"cannot be taken: {error}"
                listing.sizes[name] = member.size
            _require_end(archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy or make it again") from None
    return listing, contents


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


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


# ---- images


def decode_image(content: bytes, name: str) -> npt.NDArray[np.uint8]:
    """One image file as uint8 [32, 32, 3], upright. Grey, palette and opaque alpha become RGB, which loses nothing.

    Its type is what it holds, not what its name says. Raises UserError, with the file's name, for all else: what would
    have to be guessed, scaled or cut is refused.
    """
    if not content:
        raise UserError(f"{name} is empty; {REMOVE}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            wrong = _misfit(image, content)
            if not wrong:
                pixels = image.convert("RGBA") if _has_alpha(image) else image
                return np.asarray(upright(image, pixels if pixels.mode == "RGB" else pixels.convert("RGB")))
    except UnidentifiedImageError:
        wrong = f"is not an image ({', '.join(FORMATS)}); {REMOVE}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        wrong = f"has far too many pixels; {GIVE}"
    except Exception as error:  # decoders of damaged files raise nearly anything
        wrong = f"is damaged ({f'{error}'[:120] or type(error).__name__}); {REMOVE}"
    raise UserError(f"{name} {wrong}")


def _misfit(image: Image.Image, content: bytes) -> str:
    """What would have to be guessed, scaled or cut, and the fix; '' if nothing.

    Known from the header, so that a bomb is never decoded; but for what is transparent.
    """
    if image.size != (SIZE, SIZE):
        return f"has {image.width}x{image.height} pixels; {GIVE}"
    if image.mode in ("I", "F"):
        return "has 32 bits a pixel, without a known white; save it with 8"
    if _bits(image, content) > 8:  # Pillow cuts them down without a word
        return f"has {_bits(image, content)} bits a channel; {GIVE}"
    if image.mode not in MODES:
        return f"has colour mode {image.mode}; {GIVE}"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return f"has more than one frame; {GIVE}"
    name_transparent_grey(image)
    image.load()
    if _has_alpha(image) and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return f"is partly transparent; {GIVE}"
    return ""


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info


def name_transparent_grey(image: Image.Image) -> None:
    """Pillow makes 8 bits of a PNG's 2 or 4 of grey, but not of the grey that is transparent: call before loading."""
    for tile in getattr(image, "tile", ()):
        if image.format == "PNG" and tile.args in ("L;2", "L;4") and "transparency" in image.info:
            image.info["transparency"] *= 255 // (2 ** int(tile.args[-1]) - 1)


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of each channel in the file, as far as there can be more than 8: in PNG and TIFF."""
    if image.format == "PNG":
        return content[24]
    of_tiff: tuple[int, ...] = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (1,))
    return max(of_tiff)


def upright(opened: Image.Image, pixels: Image.Image) -> Image.Image:
    """`pixels`, made from the opened file, turned or mirrored as the file's EXIF orientation says."""
    orientation = 1
    if not NOTES & opened.info.keys():
        return pixels
    with suppress(Exception):  # a camera's broken note is no reason to refuse its picture
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    return pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels
