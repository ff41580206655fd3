"""Text in figures, drawn with Pillow. A class is shown by its number if no font has its name's letters.

No text is parsed as markup (matplotlib would read $...$ as a formula), and no letter is drawn as an empty box: classes
that no font can render still differ by number.
"""

import math
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont, features

from cifar import names
from cifar.plotting import mpl

SIZE, LINE = 13, 17  # pixels: of letters, and from one line to the next
OWN_FONT = str(Path(mpl.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


class Part(NamedTuple):
    """A piece of text, and the file of a font that has its letters."""

    text: str
    font: str = OWN_FONT


Line = tuple[Part, ...]
ELLIPSIS = Part("\u2026")


class Labels:
    """How pictures show classes: by their names, or by their numbers where no font has a name's letters."""

    def __init__(self, classes: Sequence[str]) -> None:
        readable = names.readable(classes)
        fonts = _fonts_for(readable)
        self._lines: list[Line] = [
            (Part(f"#{number}") if font is None else Part(name, font),)
            for number, (name, font) in enumerate(zip(readable, fonts, strict=True))
        ]
        self._unshown = [name for name, font in zip(readable, fonts, strict=True) if font is None]
        self._fitted: dict[int, list[Line]] = {}

    def fitted(self, width: int) -> list[Line]:
        """Truncates all classes to `width` pixels; where two would look alike, their numbers come first."""
        if width not in self._fitted:
            cut = [fitting(line, width) for line in self._lines]
            times = Counter(cut)
            self._fitted[width] = [
                fitting((Part(f"#{number} "), *self._lines[number]), width) if times[line] > 1 else line
                for number, line in enumerate(cut)
            ]
        return self._fitted[width]

    def advice(self) -> str:
        """Returns a line that names a font where one is missing, else ''."""
        if not self._unshown:
            return ""
        scripts = {unicodedata.name(letter, "").partition(" ")[0] for name in self._unshown for letter in name}
        asian = scripts & {"CJK", "HIRAGANA", "KATAKANA", "HANGUL"}
        font = "Noto Sans CJK (fonts-noto-cjk)" if asian else "Noto (fonts-noto-core)"
        return (
            f"pictures show {len(self._unshown)} of {len(self._lines)} classes by number (the first is #0), because no "
            f"font on this machine has all letters of their names; install one that has them, e.g. {font}"
        )


def of(*texts: str | Line) -> Line:
    """Returns a line of several pieces."""
    return tuple(part for text in texts for part in ((Part(text),) if isinstance(text, str) else text))


def length(line: Line) -> int:
    """Returns the width of a line in pixels."""
    return math.ceil(sum(_opened(part.font).getlength(part.text) for part in line))


def fitting(line: Line, width: int) -> Line:
    """Returns the line, truncated to `width` pixels."""
    if length(line) <= width:
        return line
    # Names may have 255 letters, and there may be 256 of them: binary search.
    fits, too_many = 0, sum(len(part.text) for part in line)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if length((*_first(line, middle), ELLIPSIS)) <= width:
            fits = middle
        else:
            too_many = middle
    return (*_first(line, fits), ELLIPSIS)


def _first(line: Line, count: int) -> Line:
    """Returns the first `count` letters of a line."""
    kept: list[Part] = []
    for text, font in line:
        kept.append(Part(text[:count], font))
        count = max(0, count - len(text))
    return tuple(part for part in kept if part.text)


def write(image: Image.Image, place: tuple[int, int], line: Line) -> None:
    """Draws a line whose top left corner is at `place`."""
    draw, (across, down) = ImageDraw.Draw(image), place
    x = float(across)
    for part in line:
        draw.text((x, down + SIZE), part.text, "black", _opened(part.font), anchor="ls")
        x += _opened(part.font).getlength(part.text)


def write_centred(image: Image.Image, middle: tuple[float, float], text: str, colour: str) -> None:
    """Draws plain text around a place."""
    ImageDraw.Draw(image).text(middle, text, colour, _opened(OWN_FONT), anchor="mm")


# ---- fonts


@cache
def _opened(path: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, SIZE)


def _fonts_for(texts: Sequence[str]) -> list[str | None]:
    """Returns for each text the file of a font that has all of its letters.

    The font is this project's own, or one that is installed.
    """
    # Without raqm, letters would not be joined, and right-to-left text would be reversed.
    left = [text for text in texts if features.check("raqm") or not _needs_shaping(text)]
    found = _covered(OWN_FONT, left)
    for path in _installed() if len(found) < len(left) else []:
        found |= _covered(path, [text for text in left if text not in found])
    return [found.get(text) for text in texts]


def _covered(path: str, texts: Sequence[str]) -> dict[str, str]:
    """Returns those texts of which a font has all letters, each with the font's file."""
    from matplotlib.ft2font import FT2Font

    try:
        letters = FT2Font(path)
        candidates = [text for text in texts if all(map(letters.get_char_index, map(ord, _joined(text))))]
        # Colour fonts, as for emoji, would draw nothing.
        return {text: path for text in candidates if letters.scalable and _opened(path).getmask(text).getbbox()}
    except (OSError, RuntimeError):  # a file that is damaged, or that is not for everybody to read
        return {}


def _joined(text: str) -> str:
    return "".join(letter for letter in text if letter not in names.JOINERS)


def _needs_shaping(text: str) -> bool:
    return any(names.from_the_right(letter) or unicodedata.category(letter) in {"Mn", "Mc"} for letter in text)


@cache
def _installed() -> list[str]:
    """Returns the files of the fonts on this machine, plain ones first."""
    from matplotlib import font_manager

    def order(path: str) -> tuple[bool, bool, str]:
        name = Path(path).stem.lower()
        return "regular" not in name, "sans" not in name, path

    # A font of last resort has every letter, as a box.
    paths = [path for path in font_manager.findSystemFonts() if "lastresort" not in Path(path).name.lower()]
    return sorted(paths, key=order)
