"""A measured quantity: all of its measurements, and what they are compared with."""

from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

HEAD = ("part", "what", "median (lowest to highest)", "", "of the limit", "ratio", "to", "n")
WIDTHS = (10, 41, 29, 20, 12, 22, 18)


class Measurement(NamedTuple):
    """One measured quantity. `values` has one for each repeat, `ratios` one for each pair.

    A ratio is a speed-up over the baseline: a quotient of rates, or an inverse quotient of times.
    """

    part: str
    what: str
    unit: str
    values: Sequence[float]
    limit: tuple[str, float] | None = None  # which, and its median in the unit of `values`
    baseline: str = ""
    ratios: Sequence[float] = ()

    def row(self) -> str:
        fraction = f"{short(median(self.values) / self.limit[1])}" if self.limit else ""
        ratio = spread(self.ratios) if self.ratios else ""
        cells = (self.part, self.what, spread(self.values), self.unit, fraction, ratio, self.baseline)
        return _line(cells, str(len(self.values)))

    def json(self) -> dict[str, Any]:
        """Returns the same with the value of each repeat."""
        found: dict[str, Any] = {"part": self.part, "what": self.what, "unit": self.unit, **statistics(self.values)}
        if self.limit:
            found |= {"limit": self.limit[0], "of_limit": median(self.values) / self.limit[1]}
        if self.ratios:
            found |= {"baseline": self.baseline, "times_as_fast": statistics(self.ratios)}
        return found


def head() -> str:
    return _line(HEAD[:-1], HEAD[-1])


def statistics(values: Sequence[float]) -> dict[str, Any]:
    """Returns median, range, number and the values themselves."""
    return {"median": median(values), "low": min(values), "high": max(values), "n": len(values), "values": [*values]}


def spread(values: Sequence[float]) -> str:
    """Formats values for a person: 'median (lowest to highest)'."""
    return f"{short(median(values))} ({short(min(values))} to {short(max(values))})"


def short(value: float) -> str:
    """Formats a value with three significant digits, or all integer digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(cells: Sequence[str], last: str) -> str:
    return "  ".join([*(f"{cell:{width}}" for cell, width in zip(cells, WIDTHS, strict=True)), last])
