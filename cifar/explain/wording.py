"""Numbers as text, alike in pages, pictures and the app, and the templates of the pages.

The report's script has `counted` and `percent`, too.
"""

from jinja2 import Environment, PackageLoader, StrictUndefined


def templates(package: str) -> Environment:
    """Returns the HTML templates of a package; the functions of this module are filters in them."""
    loader = PackageLoader(package, ".")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters |= {"counted": counted, "percent": percent}
    return found


def counted(count: int, one: str, several: str = "") -> str:
    """Returns a number of things: "1 mistake", "2,000 mistakes"; `several` where that is not `one` and an s."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def percent(share: float) -> str:
    """Returns a share as percentage.

    What is short of certain never looks certain: 0.9997 is "> 99.9 %", not "100.0 %".
    """
    text = f"{100 * share:.1f}"
    return "> 99.9 %" if share < 1 and text == "100.0" else f"{text} %"
