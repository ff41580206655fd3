"""Pictures of any size and mode as network input: center crop, downscaled to 32x32.

Files are untrusted: sizes in bytes and pixels are checked before decoding, and every failure to decode becomes a
UserError.
"""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from cifar.data.image_files import FORMATS, SIZE, compare_checksums, name_transparent_grey, upright
from cifar.errors import UserError

UInt8 = npt.NDArray[np.uint8]

BYTES = 25 << 20  # of a file: the largest JPEG of a phone camera
PIXELS = 64_000_000  # of a picture: a phone camera's 50 million, with a margin; 256 MB once decoded
WHITE_IS_ZERO = 0  # TIFF photometric interpretation; Pillow inverts 8-bit images, not 16-bit ones
TOO_MANY = f"the picture has more than {PIXELS // 1_000_000} million pixels; make it smaller"


def read(file: Path | bytes) -> UInt8:
    """Reads the picture in a file, or in a file's content, as uint8 [32, 32, 3].

    Raises UserError for whatever is no picture, broken or too large.

    Takes the first frame, applies the EXIF orientation, and puts transparency on white. Downscales with a box filter: a
    32x32 picture, or one enlarged by a whole factor, stays as it is. Smaller ones are upscaled (bicubic).
    """
    try:
        check_size(len(file) if isinstance(file, bytes) else file.stat().st_size)
        content = file if isinstance(file, bytes) else file.read_bytes()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            _check(image.width * image.height <= PIXELS, TOO_MANY)
            compare_checksums(image, content)
            image.draft(None, (8 * SIZE, 8 * SIZE))  # lets JPEG decode a large picture at a fraction of its size
            return _small(image, content)
    except FileNotFoundError:
        raise UserError("the picture is no longer here; upload it again") from None
    except UnidentifiedImageError:
        raise UserError(
            f"the file is not a picture that can be read; save it as one of: {', '.join(FORMATS)}"
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(TOO_MANY) from None
    except UserError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise UserError(
            f"the picture is damaged ({f'{error}'[:120] or type(error).__name__}); save it again, or try another"
        ) from None


def as_png(content: bytes) -> bytes:
    """Returns a file's content as a small PNG, of which `read` makes the same array. Raises UserError as it does."""
    file = io.BytesIO()
    Image.fromarray(read(content)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def check_size(size: int) -> None:
    """Raises UserError for a file of more than BYTES."""
    _check(size <= BYTES, f"the file is larger than {BYTES >> 20} MB; make it smaller")


def _small(image: ImageFile.ImageFile, content: bytes) -> UInt8:
    name_transparent_grey(image)
    if image.mode == "RGB" and "transparency" in image.info and image.tile[0].args == "RGB;16B":
        pixels = _rgba_of_8_bits(image, content)
    elif image.mode.startswith("I;16"):  # more than 8 bits of grey, which `convert` would cut off at 255
        pixels = _grey_of_8_bits(image)
    elif image.mode in ("I", "F"):
        raise UserError(f"the picture has 32 bits a pixel (mode {image.mode}), without a known white; save it with 8")
    else:
        pixels = image.convert("RGBA" if image.has_transparency_data else "RGB")
    side = min(pixels.size)
    left, top = (pixels.width - side) // 2, (pixels.height - side) // 2
    how = Image.Resampling.BOX if side >= SIZE else Image.Resampling.BICUBIC
    square = pixels.resize((SIZE, SIZE), how, (left, top, left + side, top + side))
    if square.mode == "RGBA":
        square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square)
    return np.array(upright(image, square).convert("RGB"))


def _grey_of_8_bits(image: Image.Image) -> Image.Image:
    """Converts a picture of mode I;16, which may hold 12 bits, 0 as white, or a grey that is transparent."""
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of TIFF
    grey = (values >> (tags.get(ExifTags.Base.BitsPerSample, (16,))[0] - 8)).astype(np.uint8)
    if tags.get(ExifTags.Base.PhotometricInterpretation) == WHITE_IS_ZERO:
        grey = 255 - grey
    if "transparency" not in image.info:
        return Image.fromarray(grey)
    opaque = np.where(values == image.info["transparency"], 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([grey, grey, grey, opaque]))


def _rgba_of_8_bits(image: Image.Image, content: bytes) -> Image.Image:
    """Converts a PNG of 16 bits with a transparent colour, which `convert` would look for in the upper 8 bits."""
    with Image.open(io.BytesIO(content), formats=["PNG"]) as lower:  # once more, taking the lower 8 bits for the upper
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        pixels, colour = np.asarray(image), np.array(image.info["transparency"])
        same = (pixels == colour >> 8) & (np.asarray(lower) == colour & 255)
    return Image.fromarray(np.dstack([pixels, np.where(same.all(axis=2), 0, 255).astype(np.uint8)]))


def _check(fine: bool, otherwise: str) -> None:
    if not fine:
        raise UserError(otherwise)
