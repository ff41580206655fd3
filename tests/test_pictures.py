"""Uploaded files as the network sees them: every size, mode and orientation, and all that is no picture."""

import io
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cifar.data import pictures
from cifar.data.image_files import UPRIGHT, decode_image
from cifar.errors import UserError

SMOOTH = np.stack(np.broadcast_arrays(*np.ogrid[0:256:8, 0:256:8], 90), axis=-1).astype(np.uint8)  # [32, 32, 3]
LARGE = Image.fromarray(SMOOTH).resize((256, 256), Image.Resampling.NEAREST)


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


def png_of(width: int, height: int) -> bytes:
    """A PNG of which only the header is sound."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", b"no pixels")


@pytest.mark.parametrize("name", ["png", "bmp", "tiff", "webp", "gif"])
@pytest.mark.parametrize("factor", [1, 5])
def test_a_picture_that_is_32x32_or_was_enlarged_stays_as_it_is(name: str, factor: int, tmp_path: Path) -> None:
    pixels = SMOOTH // 64 * 64  # few colours, so that GIF keeps them
    large = pixels.repeat(factor, axis=0).repeat(factor, axis=1)
    options: dict[str, Any] = {"lossless": True} if name == "webp" else {}
    assert (pictures.read(saved(tmp_path / f"a.{name}", Image.fromarray(large), **options)) == pixels).all()


def test_a_small_picture_is_enlarged_smoothly(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.linspace(20, 230, 28).round().astype(np.uint8)[:, None, None], (28, 28, 3))
    seen = pictures.read(saved(tmp_path / "a.png", Image.fromarray(np.ascontiguousarray(ramp)))).astype(int)
    assert np.diff(seen[:, 0, 0]).min() >= 1  # no row is there twice
    assert abs(seen[[0, -1]] - [[[20]], [[230]]]).max() <= 4


@pytest.mark.parametrize(("width", "height"), [(300, 100), (100, 301), (33, 32)])
def test_the_middle_square_is_seen(width: int, height: int, tmp_path: Path) -> None:
    side = min(width, height)
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = 200
    seen = pictures.read(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert (seen == 200).all()


@pytest.mark.parametrize(
    ("mode", "name"),
    [("1", "png"), ("L", "png"), ("LA", "png"), ("P", "png"), ("P", "gif"), ("RGBA", "png"), ("RGBA", "webp"),
     ("CMYK", "jpeg"), ("CMYK", "tiff"), ("YCbCr", "jpeg"), ("I;16", "png"), ("I;16", "tiff"), ("RGB", "avif")],
)  # fmt: skip
def test_every_mode_shows_what_it_holds(mode: str, name: str, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.asarray(LARGE.convert("L")).astype(np.uint16) * 257)
    else:
        image = LARGE.convert(mode)
    with Image.open(saved(tmp_path / f"a.{name}", image, **({"quality": 95} if name != "gif" else {}))) as again:
        assert again.mode in {mode, "RGB", "RGBA"}
    seen = pictures.read(tmp_path / f"a.{name}").astype(int)
    grey = mode in {"1", "L", "LA", "I;16"}
    expected = np.asarray(Image.fromarray(SMOOTH).convert("L").convert("RGB") if grey else SMOOTH).astype(int)
    assert np.abs(seen - expected).mean() < (16 if mode in {"1", "P"} else 6)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[:, :32, 3] = 255  # the left half opaque black
    pixels[:, 48:, 3] = 128  # a quarter half transparent
    seen = pictures.read(saved(tmp_path / "a.png", Image.fromarray(pixels)))
    assert (seen[:, :16] == 0).all()
    assert (seen[:, 16:24] == 255).all()
    assert (abs(seen[:, 24:].astype(int) - 127) <= 1).all()
    palette = Image.fromarray(np.zeros((32, 32), np.uint8), "P")
    palette.putpalette([9, 9, 9])
    assert (pictures.read(saved(tmp_path / "p.png", palette, transparency=0)) == 255).all()


def grey_png(bits: int, value: int) -> bytes:
    """32x32 pixels of a grey, of which the right half, that has `value`, is transparent."""
    values = np.where(np.arange(32) < 16, 0, value)
    if bits == 16:
        row = values.astype(">u2").tobytes()
    else:
        row = np.packbits((values[:, None] >> np.arange(bits)[::-1]) & 1).tobytes()
    header = struct.pack(">IIBBBBB", 32, 32, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"tRNS", struct.pack(">H", value))
        + _chunk(b"IDAT", zlib.compress((b"\0" + row) * 32)) + _chunk(b"IEND", b"")
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "value"), [(1, 1), (2, 1), (4, 5), (8, 85), (16, 21845)])
def test_a_grey_may_be_what_is_transparent(bits: int, value: int) -> None:
    seen = pictures.read(grey_png(bits, value))
    assert (seen[:, :16] == 0).all()
    assert (seen[:, 16:] == 255).all()
    with pytest.raises(UserError, match=r"partly transparent|16 bits a channel"):
        decode_image(grey_png(bits, value), "a.png")


@pytest.mark.parametrize(
    ("colour", "transparent", "expected"),
    [(0x1234, 0x1234, 255), (0x1234, 0x1233, 0x12), (0x1200, 0x0012, 0x12), (0x1200, 0x1200, 255)],
)
def test_a_colour_of_16_bits_may_be_what_is_transparent(colour: int, transparent: int, expected: int) -> None:
    """All 16 of them count, not the lower 8, as Pillow has it."""
    rows = (b"\0" + struct.pack(">H", colour) * 96) * 32
    content = (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", 32, 32, 16, 2, 0, 0, 0))
        + _chunk(b"tRNS", struct.pack(">HHH", *[transparent] * 3)) + _chunk(b"IDAT", zlib.compress(rows))
        + _chunk(b"IEND", b"")
    )  # fmt: skip
    assert (pictures.read(content) == expected).all()


@pytest.mark.parametrize(("bits", "white_is_zero"), [(8, False), (8, True), (12, False), (16, False), (16, True)])
def test_a_grey_tiff_is_as_light_as_it_says(bits: int, white_is_zero: bool) -> None:
    white = bytes(128 * bits) if white_is_zero else b"\xff" * (128 * bits)
    tags = {256: 32, 257: 32, 258: bits, 259: 1, 262: 0 if white_is_zero else 1, 277: 1, 278: 32, 279: len(white)}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted({**tags, 273: start}.items()))
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags) + 1) + entries + bytes(4) + white
    assert (pictures.read(content) == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_turned_upright(orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = {value: key for key, value in {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}.items()}[orientation]
    undo = UPRIGHT.get(lying)  # the inverse of a turn to the left is one to the right
    image = Image.fromarray(SMOOTH) if undo is None else Image.fromarray(SMOOTH).transpose(undo)
    for name in ("png", "tiff"):
        assert (pictures.read(saved(tmp_path / f"a.{name}", image, exif=exif)) == SMOOTH).all()
    from PIL import ImageOps  # an independent judge

    with Image.open(tmp_path / "a.png") as again:
        assert (np.asarray(ImageOps.exif_transpose(again)) == SMOOTH).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # what Pillow says of it
def test_a_broken_camera_note_does_not_matter(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.jpg", LARGE, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + bytes(range(40)), quality=95)
    assert np.abs(pictures.read(path).astype(int) - SMOOTH).mean() < 6


@pytest.mark.parametrize("name", ["gif", "webp", "png", "tiff"])
def test_the_first_frame_of_an_animation(name: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "lime", "blue")]
    path = saved(tmp_path / f"a.{name}", frames[0], save_all=True, append_images=frames[1:])
    red, green, blue = pictures.read(path).mean(axis=(0, 1))
    assert red > 240
    assert max(green, blue) < 15


def test_a_large_photograph_is_seen_whole(tmp_path: Path) -> None:
    photograph = LARGE.resize((4000, 4000), Image.Resampling.BICUBIC)
    assert np.abs(pictures.read(saved(tmp_path / "a.jpg", photograph)).astype(int) - SMOOTH).mean() < 8


@cache
def broken() -> dict[str, bytes]:
    """Files that are no picture to be shown."""
    whole = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP")}
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3)).astype(np.uint8))
    for kind, content in whole.items():
        noise.save(content, kind)
    return {
        "empty": b"",
        "text": b"hello",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n",
        "sound header": png_of(64, 64),
        "text bomb": png_of(64, 64)[:33] + _chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(200_000_000))),
        **{f"truncated {kind}": content.getvalue()[: len(content.getvalue()) // 2] for kind, content in whole.items()},
        **{f"scrambled {kind}": content.getvalue()[:60] + bytes(5000) for kind, content in whole.items()},
    }  # fmt: skip


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "name",
    ["empty", "text", "svg", "eps", "sound header", "text bomb",
     *(f"{how} {kind}" for how in ("truncated", "scrambled") for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF")),
     "truncated BMP"],
)  # fmt: skip
def test_what_is_no_picture_is_refused_in_words(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(broken()[name])
    with pytest.raises(UserError, match=r"not a picture that can be read|is damaged \(.+\); save it again") as refusal:
        pictures.read(tmp_path / "a.png")
    assert "\n" not in str(refusal.value)
    assert str(tmp_path) not in str(refusal.value)


@pytest.mark.parametrize(("width", "height"), [(8001, 8000), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_bomb_is_refused_before_it_is_decoded(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png_of(width, height))  # decoding would say that it is damaged
    with pytest.raises(UserError, match="more than 64 million pixels"):
        pictures.read(tmp_path / "a.png")


def test_a_file_of_too_many_bytes_is_refused_before_it_is_opened(tmp_path: Path) -> None:
    with (tmp_path / "a.png").open("wb") as file:
        file.truncate(pictures.BYTES + 1)
    with pytest.raises(UserError, match="larger than 25 MB"):
        pictures.read(tmp_path / "a.png")


def test_a_file_that_is_gone_and_one_without_a_white_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no longer here"):
        pictures.read(tmp_path / "gone.png")
    with pytest.raises(UserError, match="32 bits"):
        pictures.read(saved(tmp_path / "a.tiff", LARGE.convert("F")))
