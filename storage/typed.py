"""Read JSON from files that somebody else wrote, and check each value for its type and bounds.

Every function takes a value, and ``what`` names it in messages. All raise ``ValueError``, which the readers of
metadata turn into an error of ours that names the file. The code behind them never meets a number that is infinite,
negative, of 10,000 digits or a string.
"""

from __future__ import annotations

import json
from typing import Any

SMALLEST, LARGEST = 1e-18, 1e18  # bounds of lengths, whose ratios neither overflow nor are denormal


def parse_object(data: bytes) -> dict[str, Any]:
    """Parse a JSON object."""
    try:
        value = json.loads(data)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004  whatever is wrong with a file is one kind of error
    return value


def member(value: Any, key: str) -> Any:
    """Return a member that a JSON object must have."""
    if not isinstance(value, dict) or key not in value:
        raise ValueError(f"no {key!r} where one must be")
    return value[key]


def mapping(value: Any, what: str) -> dict[str, Any]:
    """Return a JSON object; in the place of a missing one (None) it is empty."""
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, not an object")
    return value or {}


def items(value: Any, what: str, *, count: int | None = None, most: int | None = None) -> list[Any]:
    """Return a list of exactly ``count`` or at most ``most`` items."""
    if not isinstance(value, list):
        raise ValueError(f"{what} is {shown(value)}, not a list")  # noqa: TRY004
    if (count is not None and len(value) != count) or (most is not None and len(value) > most):
        raise ValueError(f"{what} has {len(value)} items, not {count if count is not None else f'at most {most}'}")
    return value


def text(value: Any, what: str) -> str:
    """Return a string that can be written out."""
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not text")  # noqa: TRY004
    value.encode()  # half of a surrogate pair is a UnicodeEncodeError, which is a ValueError
    return value


def label(value: Any, otherwise: str) -> str:
    """Return a name that is only shown, so that it may be missing or no text."""
    try:
        return text(value, "label") or otherwise
    except ValueError:
        return otherwise


def integer(value: Any, what: str, low: int, high: int) -> int:
    """Return an integer within bounds, which it may equal."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}, not an integer of {low} to {high}")
    return value


def integers(value: Any, what: str, low: int, high: int, *, count: int | None = None) -> tuple[int, ...]:
    """Return integers within bounds."""
    return tuple(integer(item, what, low, high) for item in items(value, what, count=count))


def number(value: Any, what: str, low: float = -LARGEST, high: float = LARGEST) -> float:
    """Return a finite number within bounds, which it may equal."""
    if type(value) not in (int, float) or not low <= value <= high:
        raise ValueError(f"{what} is {shown(value)}, not a number of {low:g} to {high:g}")
    return float(value)


def numbers(value: Any, what: str, count: int, low: float = -LARGEST, high: float = LARGEST) -> tuple[float, ...]:
    """Return finite numbers within bounds."""
    return tuple(number(item, what, low, high) for item in items(value, what, count=count))


def shown(value: Any) -> str:
    """Show a value in a message, whatever it is."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if type(value) is int and value.bit_length() > 128:
        return "a number of more than 38 digits"
    return ascii(value)[:60]
