"""What is asked of a store, and what it tells."""

from __future__ import annotations

from typing import Any, NamedTuple

from storage.errors import ConversionError

Range = tuple[str, int, int]  # key, start, length in bytes; a start of -length means the end of the file
Stat = tuple[int, dict[str, Any]]  # bytes of a file, and what tells its version


class Entry(NamedTuple):
    """A file as a listing tells of it."""

    size: int  # bytes
    tag: str = ""  # an object store's name for these very bytes; folders have none


class Occupied(ConversionError):  # noqa: N818  not an error: the answer to a condition
    """A put was not done: its place was to be free and is not, or what was to be there is no more."""
