"""Numbers as text, alike in pages, pictures and the app. The report's script has both functions, too."""


def counted(count: int, one: str, several: str = "") -> str:
    """Returns a number of things: "1 mistake", "2,000 mistakes"; `several` where that is not `one` and an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def percent(share: float, digits: int = 1) -> str:
    """Returns a share as percentage.

    What is short of certain never looks certain: 0.9997 is "> 99.9 %", not "100.0 %".
    """
    text = f"{100 * share:.{digits}f}"
    return f"> {100 - 10**-digits:.{digits}f} %" if share < 1 and float(text) == 100 and digits else f"{text} %"
