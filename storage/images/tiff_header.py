"""Take a first look at a TIFF's directories, before any library reads it.

tifffile follows what a header says; this walk bounds it first: the chain of directories must lie inside the file, be
short and not circular, and no tag may claim more bytes than the file has. It reads directories only, never pixels,
so a hostile file is refused at once and in little memory. The format is in TIFF 6.0, section 2, and for BigTIFF at
https://www.awaresystems.be/imaging/tiff/bigtiff.html
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from storage.errors import CorruptImageError, UnsupportedImageError
from storage.images.tiff_kinds import AGAIN, OUT

if TYPE_CHECKING:
    from storage.limits import Limits
    from storage.place.files import BlockReader

# The bytes per value of each TIFF field type; unknown types count as one byte.
TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


SUB_IFDS = 330
PLACES = (273, 279, 324, 325)  # offsets and lengths of strips and tiles
SHOWN = 4096  # numbers of a table of places that tifffile sees
MCU_STARTS = 2**22  # pieces of an NDPI's image, of which tifffile makes an object each
OFFSET_TYPES = {3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}  # SHORT, LONG, IFD, LONG8, IFD8
NDPI_TAG = (65420).to_bytes(2, "little")  # NDPI is always little-endian


class Layout(NamedTuple):
    """How a directory is written: formats of `struct` for the number of tags, a tag, and the next one's offset."""

    number: str
    entry: str
    next: str


CLASSIC, BIG = Layout("H", "HHI4s", "I"), Layout("Q", "HHQ8s", "Q")
# Hamamatsu's has offsets of eight bytes; the upper four of a tag's value follow the directory.
NDPI = Layout("H", "HHI4s", "Q")


@dataclass(frozen=True, slots=True)
class Table:
    """Where in the file the numbers of a tag lie."""

    offset: int  # bytes
    count: int
    kind: str  # format of a number, with its byte order, as `numpy.dtype` takes it


Tables = dict[int, dict[int, Table]]
"""Long tables of places or lengths, by the offset of their directory and their tag."""


def check_directories(reader: BlockReader, limits: Limits) -> Tables:
    """Walk the main chain of image file directories, and the SubIFDs below each.

    tifffile would make an object of each number of a table, and of millions of tiles gigabytes: of the long tables
    that are returned the reader shows it no more than the beginning from now on.

    Raises
    ------
    UnsupportedImageError
        The file is no TIFF, or has more directories or tags than ``limits`` allows.
    CorruptImageError
        A directory or a tag points past the end of the file, or the chain is circular.
    """
    name, size = reader.file.location, reader.file.size
    head = reader.read_at(0, 16)
    order = {b"II": "<", b"MM": ">"}.get(head[:2])
    version = struct.unpack(order + "H", head[2:4])[0] if order and len(head) >= 8 else 0
    if order is None or version not in (42, 43):
        what = "an empty file" if not size else "not a TIFF file; give TIFF, BigTIFF, OME-TIFF or SVS"
        raise UnsupportedImageError(f"{name}: {what}")
    layout = BIG if version == 43 else NDPI if is_ndpi(reader, head) else CLASSIC
    if layout is BIG and len(head) < 16:
        raise CorruptImageError(f"{name}: truncated in its header; {AGAIN}")
    start = 8 if layout is BIG else 4
    offset = struct.unpack(order + layout.next, head[start : start + struct.calcsize("<" + layout.next)])[0]
    if not offset:
        raise CorruptImageError(f"{name}: a TIFF header without an image; {AGAIN}")
    seen: set[int] = set()
    tables: Tables = {}
    waiting = [(offset, True)]  # each with whether its chain goes on
    while waiting:
        offset, chained = waiting.pop()
        if offset in seen:
            raise CorruptImageError(f"{name}: its image directories form a circle; {AGAIN}")
        if len(seen) >= limits.ifds:
            raise UnsupportedImageError(
                f"{name}: more than {limits.ifds} images; keep one: vips copy 'IN.tif[page=0]' {OUT}"
            )
        seen.add(offset)
        below, following = _check_directory(reader, offset, order, tables, layout=layout, limits=limits)
        waiting += [(one, False) for one in below]
        if chained and following:
            waiting.append((following, True))
    return tables


def is_ndpi(reader: BlockReader, head: bytes) -> bool:
    """Tell by its first 16 bytes whether a TIFF is an NDPI: its first directory has Hamamatsu's tag."""
    if head[:4] != b"II*\0":
        return False
    for offset in {int.from_bytes(head[4:8], "little"), int.from_bytes(head[4:12], "little")} - {0}:
        count = int.from_bytes(reader.read_at(offset, 2), "little")
        entries = reader.read_at(offset + 2, 12 * count)
        if any(entries[i : i + 2] == NDPI_TAG for i in range(0, len(entries), 12)):
            return True
    return False


def _check_directory(
    reader: BlockReader, offset: int, order: str, tables: Tables, *, layout: Layout, limits: Limits
) -> tuple[list[int], int]:
    """Check one directory and return the offsets of its SubIFDs and of the next directory, which is 0 at the end."""
    name, size = reader.file.location, reader.file.size
    count_format, entry_format, next_format = layout.number, layout.entry, layout.next
    count_bytes, entry_bytes = struct.calcsize("<" + count_format), struct.calcsize("<" + entry_format)
    head = reader.read_at(offset, count_bytes) if offset < size else b""
    if len(head) < count_bytes:
        raise CorruptImageError(f"{name}: truncated, an image directory lies past the end of the file; {AGAIN}")
    count = struct.unpack(order + count_format, head)[0]
    if count > limits.ifd_entries:
        raise UnsupportedImageError(f"{name}: {count} tags in one image directory; {AGAIN}")
    tail_bytes = struct.calcsize("<" + next_format)
    body = reader.read_at(offset + count_bytes, count * entry_bytes + tail_bytes)
    if len(body) < count * entry_bytes + tail_bytes:
        raise CorruptImageError(f"{name}: truncated inside an image directory; {AGAIN}")
    below: list[int] = []
    entries = struct.iter_unpack(order + entry_format, body[: count * entry_bytes])
    for number, (tag, kind, values, data) in enumerate(entries):
        value_bytes = values * TYPE_BYTES.get(kind, 1)
        if value_bytes > size:
            raise CorruptImageError(f"{name}: truncated, tag {tag} claims more bytes than the file has; {AGAIN}")
        if layout is NDPI:
            if (tag in PLACES and values > SHOWN) or values > MCU_STARTS:
                raise UnsupportedImageError(f"{name}: tag {tag} claims {values} values; {AGAIN}")
            continue  # its pieces are listed by a tag of its own, and it has no SubIFDs
        if tag in PLACES and values > SHOWN and kind in OFFSET_TYPES:
            start = struct.unpack(order + next_format, data)[0]
            tables.setdefault(offset, {})[tag] = Table(start, values, order + OFFSET_TYPES[kind])
            place = offset + count_bytes + number * entry_bytes + 4
            reader.show_instead(place, struct.pack(order + next_format, SHOWN))
        if tag != SUB_IFDS:
            continue
        if values > limits.ifds or kind not in OFFSET_TYPES:
            raise UnsupportedImageError(f"{name}: claims {values} images inside one; {AGAIN}")
        if value_bytes > len(data):
            data = reader.read_at(struct.unpack(order + next_format, data)[0], value_bytes)
        if len(data) < value_bytes:
            raise CorruptImageError(f"{name}: truncated inside a list of image directories; {AGAIN}")
        below += struct.unpack(f"{order}{values}{OFFSET_TYPES[kind]}", data[:value_bytes])
    return below, int(struct.unpack(order + next_format, body[-tail_bytes:])[0])
