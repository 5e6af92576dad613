"""Types of what is asked of a store and of its answers."""

from __future__ import annotations

from typing import Any, NamedTuple

from storage.errors import ConversionError

Range = tuple[str, int, int]  # key, start, length in bytes; a start of -length means the end of the file
Stat = tuple[int, dict[str, Any]]  # bytes of a file, and values that tell its version


class Entry(NamedTuple):
    """A file as a listing tells of it."""

    size: int  # bytes
    tag: str = ""  # an object store's name for these very bytes; folders have none


class Occupied(ConversionError):  # noqa: N818  it is an answer, not an error
    """A conditional put was not done: its place is taken, or the object that it was to replace has changed."""
