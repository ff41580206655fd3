"""Validates requests: the page only sends valid values, but an API client may send anything."""

from collections.abc import Sequence
from typing import Any

from cifar.errors import UserError


def whole(name: str, value: Any, low: int, high: int) -> int:
    """Returns a whole number in a range. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1 or not low <= value <= high:
        raise UserError(f"{name} {_short(value)} is not possible; give a whole number from {low} to {high}")
    return int(value)


def one_of(name: str, value: Any, known: Sequence[str]) -> str:
    """Returns one of the names that are known. Raises UserError."""
    if not isinstance(value, str) or value not in known:
        raise UserError(f"{name} {_short(value)} is unknown; choose one of: {', '.join(known)}")
    return value


def some_of(name: str, values: Any, known: Sequence[str]) -> list[str]:
    """Returns the chosen names, without duplicates, in the order of `known`. Raises UserError."""
    if not isinstance(values, list):
        raise UserError(f"{name} {_short(values)} is not a list; choose some of: {', '.join(known)}")
    wanted = {one_of(name, value, known) for value in values}
    return [value for value in known if value in wanted]


def switch(name: str, value: Any) -> bool:
    """Returns whether a switch is on or off. Raises UserError."""
    if not isinstance(value, bool):
        raise UserError(f"{name} {_short(value)} is neither true nor false; give one of them")
    return value


def _short(value: Any) -> str:
    return f"{value!r}"[:60]
