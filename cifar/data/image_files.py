"""What a folder, zip or tar archive of images holds, and its files as pixels.

Files that are ambiguous, or would need scaling or cropping, are rejected with a message that names them.
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

SIZE = 32  # pixels; the networks' pooling assumes it
UNIX = (3, 19)  # systems, as a zip numbers them, whose names are UTF-8: Linux and others, macOS
LARGEST_FILE = 1 << 20  # bytes; a 32x32 image as PNG or JPEG has 1 to 4 kB
HELD = 1 << 14  # bytes of a picture of any size that are kept in memory until it is decoded
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")  # no format that starts another program, as EPS does
MODES = ("RGB", "L", "P", "1", "RGBA", "LA", "PA")  # that become RGB without loss, where nothing is transparent
REMOVE = "repair or remove it"
GIVE = f"give opaque 8-bit RGB or grey images of {SIZE}x{SIZE} pixels, or train.py --fit {SIZE}, which converts them"

# Names that would not fit in one line of a message or table, or not in UTF-8: Python decodes other bytes to surrogates.
UNFIT_NAME = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")

# A normalised relative path without hidden parts, as nearly all are.
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

# Metadata in which Pillow looks for an orientation. Looking takes 5 % of the time of decoding.
NOTES = {"exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif"}

# Raised from the header, before `decode_image` compares the size, and reported by it.
warnings.simplefilter("error", Image.DecompressionBombWarning)


@dataclass
class Listing:
    """What a folder or archive holds, by relative paths with forward slashes. What is hidden is in `hidden` alone.

    Dicts of plain numbers and strings, since there may be 100,000 files: an object per file would take as long as its
    system call.
    """

    where: str
    sizes: dict[str, int] = field(default_factory=dict)  # bytes, of each file
    # ns, of each file in a folder: mtime, and ctime, which nobody can set
    changed: dict[str, tuple[int, int]] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)  # of some: why it cannot be read, with the fix
    folders: set[str] = field(default_factory=set)
    hidden: set[str] = field(default_factory=set)


# ---- what is there


def list_folder(root: Path) -> Listing:
    """Lists everything below a folder, links followed; hidden folders are not entered.

    A folder in it that cannot be read is recorded as a file that is wrong, with a slash at the end of its name.

    Raises OSError where the folder itself cannot be read, UserError for one in it that a link leads back to.
    """
    listing = Listing(str(root))
    to_do: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    with ProgressBar("looking through the images", "files") as progress:
        while to_do:
            progress.done = len(listing.sizes)
            progress.look()
            folder, above = to_do.pop()
            place = f"{root}/{folder}" if folder else str(root)
            try:
                descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)  # so that no file's whole path is looked up
                try:
                    status = os.fstat(descriptor)
                    identity = (status.st_dev, status.st_ino)
                    if identity in above:
                        raise UserError(f"{place} is a symbolic link to one of its parent folders; remove it")
                    inner = _list_one(listing, folder, descriptor)
                finally:
                    os.close(descriptor)
            except OSError as error:
                if not folder:
                    raise
                listing.sizes[f"{folder}/"], listing.changed[f"{folder}/"] = 0, (0, 0)
                listing.wrong[f"{folder}/"] = f"cannot be read ({error.strerror}); change its permissions, or remove it"
                continue
            to_do += [(name, above | {identity}) for name in inner]
    return listing


def _list_one(listing: Listing, folder: str, descriptor: int) -> list[str]:
    """Lists the entries of one folder; returns its subfolders."""
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
            if not stat.S_ISREG(status.st_mode):  # reading a pipe would block forever
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
    """Returns what a zip holds, and each file's entry. Raises UserError where it is damaged."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise UserError(f"{path} cannot be read as a zip ({error}); create it again") from None
    listing, entries = Listing(str(path)), {}
    with archive:
        for info in archive.infolist():
            name = _relative(listing, _zip_name(path, info))
            if name is None:
                continue
            if name in entries:
                listing.wrong[name] = "appears twice; create the zip again"
            elif info.flag_bits & 1:
                listing.wrong[name] = "is encrypted; make the zip without a password"
            elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # Python lacks Deflate64, and unpacks bzip2 and LZMA completely, whatever size an entry declares.
                listing.wrong[name] = "is not compressed with Deflate; create the zip again with that method"
            entries[name], listing.sizes[name] = info, info.file_size
    return listing, entries


def _zip_name(path: Path, info: zipfile.ZipInfo) -> str:
    """Returns the entry's name.

    Without the UTF-8 flag it should be code page 437, but often has the creator's encoding.
    """
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
        # macOS writes UTF-8 without the flag. On Windows it may be any encoding; GBK's word for cat is valid UTF-8.
        return raw.decode("utf-8" if info.create_system in UNIX or declared else "ascii")
    except UnicodeDecodeError:
        raise UserError(
            f"{path}: entry {raw!r} has a name in an encoding that the zip does not declare; "
            "create the zip again with names in UTF-8 (7-Zip: -mcu=on), or give the unpacked folder"
        ) from None


def _relative(listing: Listing, name: str) -> str | None:
    """Returns the normalised path of a file in an archive; None for a folder or a hidden entry, which is recorded.

    Raises UserError for names that lead out of the archive.
    """
    if ORDINARY_PATH.fullmatch(name):
        return name
    name = name.replace("\\", "/")  # some Windows programs write backslashes
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
    shrink: Callable[[bytes], bytes] | None = None,
) -> tuple[Listing, dict[str, bytes]]:
    """Reads a tar archive's listing and files' contents: of those up to `largest`, or whose base name is in `large`.

    The former go through `shrink` where they have more than HELD bytes; it raises UserError for one that is wrong. By
    default those are dropped that `decode_image` refuses: photographs would fill the memory before the first is named.

    In one pass, since seeking back in a compressed archive means starting over. Raises UserError if it is damaged.
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
                    listing.wrong[name] = "appears twice; create the archive again"
                if not member.isreg():
                    listing.wrong[name] = (
                        "is a link or device, not a file; pack with tar --dereference --hard-dereference"
                    )
                elif name.rpartition("/")[2] in large or member.size <= HELD:
                    contents[name] = _content(archive, member)
                elif member.size <= largest:
                    try:
                        contents[name] = (shrink or _checked)(_content(archive, member))
                    except UserError as error:
                        listing.wrong[name] = f"cannot be used: {error}"
                listing.sizes[name] = member.size
            _require_end(archive)
    except (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"{path} is damaged or cut short ({error}); copy or make it again") from None
    return listing, contents


def _checked(content: bytes) -> bytes:
    """Returns the content of an image file. Raises UserError where `decode_image` does."""
    decode_image(content, "it")
    return content


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = archive.extractfile(member)
    return file.read() if file else b""


def _require_end(archive: tarfile.TarFile) -> None:
    """Raises ReadError unless the archive ends with a block of zeros: tarfile also stops at a damaged header.

    Reading to the end also compares a compressed file's checksum.
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
    """Decodes an image file to uint8 [32, 32, 3], upright. Grey, palette and opaque alpha become RGB without loss.

    The format is detected from the content. Raises UserError, with the file's name, for all else: what is damaged,
    ambiguous, or would need scaling or cropping.
    """
    if not content:
        raise UserError(f"{name} is empty; {REMOVE}")
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            wrong = _misfit(image, content)
            if not wrong:
                pixels = image.convert("RGBA") if image.has_transparency_data else image
                return np.asarray(upright(image, pixels if pixels.mode == "RGB" else pixels.convert("RGB")))
    except UnidentifiedImageError:
        wrong = f"is not an image ({', '.join(FORMATS)}); {REMOVE}"
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        wrong = f"has far too many pixels; {GIVE}"
    except Exception as error:  # decoders of damaged files raise nearly anything
        wrong = f"is damaged ({f'{error}'[:120] or type(error).__name__}); {REMOVE}"
    raise UserError(f"{name} {wrong}")


def _misfit(image: Image.Image, content: bytes) -> str:
    """Returns why an image cannot be used as it is, and the fix; '' if it can.

    Found in the header, so that a bomb is never decoded; except for transparency.
    """
    if image.size != (SIZE, SIZE):
        return f"has {image.width}x{image.height} pixels; {GIVE}"
    if image.mode in ("I", "F"):
        return "has 32 bits a pixel, without a known white; save it with 8"
    if _bits(image, content) > 8:  # Pillow reduces them silently
        return f"has {_bits(image, content)} bits a channel; {GIVE}"
    if image.mode not in MODES:
        return f"has colour mode {image.mode}; {GIVE}"
    if image.format != "MPO" and getattr(image, "is_animated", False):
        return f"has more than one frame; {GIVE}"
    compare_checksums(image, content)
    name_transparent_grey(image)
    image.load()
    if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
        return f"is partly transparent; {GIVE}"
    return ""


def compare_checksums(image: Image.Image, content: bytes) -> None:
    """Raises ValueError for a PNG whose pixels are damaged: of their chunks, Pillow skips the checksums."""
    place = 8  # after the signature
    while image.format == "PNG" and len(content) >= place + 8:
        length, kind = struct.unpack_from(">I4s", content, place)
        end = place + 8 + length
        if kind == b"IDAT" and zlib.crc32(content[place + 4 : end]).to_bytes(4) != content[end : end + 4]:
            raise ValueError("wrong checksum of its pixels")
        place = end + 4


def name_transparent_grey(image: Image.Image) -> None:
    """Scales the transparent grey of a 2- or 4-bit PNG to 8 bits, as Pillow scales pixels. Call it before loading."""
    for tile in getattr(image, "tile", ()):
        if image.format == "PNG" and tile.args in ("L;2", "L;4") and "transparency" in image.info:
            image.info["transparency"] *= 255 // (2 ** int(tile.args[-1]) - 1)


def _bits(image: Image.Image, content: bytes) -> int:
    """Returns the bits per channel of a PNG, AVIF or TIFF; 1 for other formats, which have at most 8."""
    if image.format == "PNG":
        return content[24]
    if image.format == "AVIF":
        flags = content[content.index(b"av1C") + 6]  # of the AV1 codec configuration: high_bitdepth, twelve_bit
        return 8 + 2 * (flags >> 6 & 1) + 2 * (flags >> 5 & 1)
    of_tiff: tuple[int, ...] = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (1,))
    return max(of_tiff)


def upright(opened: Image.Image, pixels: Image.Image) -> Image.Image:
    """Returns `pixels`, made from the opened file, turned or mirrored as the file's EXIF orientation says."""
    orientation = 1
    if not NOTES & opened.info.keys():
        return pixels
    with suppress(Exception):  # broken EXIF data is no reason to refuse a picture
        orientation = opened.getexif().get(ExifTags.Base.Orientation, 1)
    return pixels.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else pixels
