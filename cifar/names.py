"""Displayable class names. A name comes from a folder: any text at all, never treated as markup."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and signs that are empty by design
SEEN, MOST = 12, 60  # letters of a name shown on the narrowest tile of a page; letters kept in all
JOINERS = "\u200c\u200d"  # format characters that change the letters beside them


def readable(classes: Sequence[str]) -> list[str]:
    """Returns each class's name as one line of text that can be seen.

    If nothing of it is visible, or another class's name looks the same, it is prefixed with the class's number.
    """
    lines = [one_line(name) for name in classes]
    # What differs in width or composition alone, and a name that looks like a number, could be taken for another.
    looks = [unicodedata.normalize("NFKC", line) for line in lines]
    times = Counter(looks)
    return [
        f"#{number} {line}".rstrip() if not line or times[look] > 1 or re.match(r"#\d", look) else line
        for number, (line, look) in enumerate(zip(lines, looks, strict=True))
    ]


def on_pages(classes: Sequence[str]) -> list[str]:
    """Returns the same as `readable`, for HTML: a page truncates long names, and readers may have other fonts.

    The number also precedes a name that begins like another, and one in letters that not every machine has.
    Right-to-left text is isolated from its surroundings.
    """
    readable_names = readable(classes)
    beginnings = Counter(name[:SEEN] for name in readable_names)
    shown = []
    for number, name in enumerate(readable_names):
        cut = name if len(name) <= MOST else f"{name[:MOST]}\u2026"
        isolated = f"\u2068{cut}\u2069" if any(map(from_the_right, cut)) else cut
        needs_number = beginnings[name[:SEEN]] > 1 or not all(map(_is_everywhere, cut))
        shown.append(f"#{number} {isolated}" if needs_number and not name.startswith("#") else isolated)
    return shown


def from_the_right(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in {"R", "AL", "AN"}


def _is_everywhere(letter: str) -> bool:
    """Returns whether a letter is Latin, Greek, Cyrillic or one of their signs."""
    return letter < "\u0530" or "\u1e00" <= letter < "\u2200"


def one_line(name: str) -> str:
    """Returns text as one line, without control, invisible, bidirectional or unencodable characters."""
    # A file system's name need not be UTF-8: Python keeps such bytes as halves of surrogate pairs.
    text = unicodedata.normalize("NFC", name.encode(errors="backslashreplace").decode())
    kept = "".join(
        letter if letter in JOINERS else "" if unicodedata.category(letter) == "Cf" else _visible(letter)
        for letter in text
    )
    return " ".join(kept.split()) if kept.strip(JOINERS + " ") else ""


def _visible(letter: str) -> str:
    return " " if letter in BLANK or unicodedata.category(letter) in {"Cc", "Zl", "Zp", "Zs"} else letter
