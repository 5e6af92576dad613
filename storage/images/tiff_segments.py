"""Where the tiles or strips of a TIFF's planes lie in the image and in the file.

Shape letters: S samples of a pixel stored together.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray


@dataclass(frozen=True)
class Plane:
    """The segments of the channels ``first .. first + S``, which are stored together, in row-major order."""

    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    first_channel: int
    first_index: int  # the page's own number of the first of these segments
    jpegtables: bytes | None


@dataclass(frozen=True, slots=True)
class Part:
    """What a box takes of one segment: rows ``y0 .. y1`` and columns ``x0 .. x1`` of the segment."""

    index: int
    y0: int
    y1: int
    x0: int
    x1: int
    place: tuple[slice, slice]  # where the part lies in the box


@dataclass(frozen=True, slots=True)
class Cut:
    """How each plane is cut into segments, which are numbered row by row; heights and widths in pixels."""

    name: str  # "tile", all of one size, or "strip", the last of which is shorter
    image_yx: tuple[int, int]
    segment_yx: tuple[int, int]

    @property
    def grid(self) -> tuple[int, int]:
        """How many rows and columns of segments there are."""
        return (-(-self.image_yx[0] // self.segment_yx[0]), -(-self.image_yx[1] // self.segment_yx[1]))

    def where(self, i: int) -> str:
        """Name a segment."""
        return f"{self.name} {divmod(i, self.grid[1])}"

    def inside(self, i: int) -> tuple[int, int]:
        """Return the height and width of the part of a segment that lies inside the image."""
        row, column = divmod(i, self.grid[1])
        height, width = self.segment_yx
        return min(height, self.image_yx[0] - row * height), min(width, self.image_yx[1] - column * width)

    def whole(self, i: int) -> Part:
        """All of a segment that lies inside the image."""
        height, width = self.inside(i)
        return Part(i, 0, height, 0, width, (slice(0, height), slice(0, width)))

    def plain_bytes(self, pixel_bits: int) -> NDArray[np.int64]:
        """Return the bytes that each segment of a plane has uncompressed; rows begin at whole bytes."""
        rows, columns = self.grid
        heights = np.full(rows, self.segment_yx[0], np.int64)
        if self.name == "strip":
            heights[-1] = self.image_yx[0] - (rows - 1) * self.segment_yx[0]
        row_bytes = -(-self.segment_yx[1] * pixel_bits // 8)
        return np.broadcast_to((heights * row_bytes)[:, None], (rows, columns)).reshape(-1)

    def parts(self, y: int, x: int, h: int, w: int) -> Iterator[Part]:
        """Cut a box at the borders of segments, row by row."""
        height, width = self.segment_yx
        columns = self.grid[1]
        rows_touched = range(y // height, (y + h - 1) // height + 1)
        for row, column in product(rows_touched, range(x // width, (x + w - 1) // width + 1)):
            top, left = row * height, column * width
            y0, y1 = max(y, top), min(y + h, top + height)
            x0, x1 = max(x, left), min(x + w, left + width)
            place = (slice(y0 - y, y1 - y), slice(x0 - x, x1 - x))
            yield Part(row * columns + column, y0 - top, y1 - top, x0 - left, x1 - left, place)


def why_misplaced(offsets: NDArray[np.int64], counts: NDArray[np.int64], file_bytes: int) -> str:
    """Tell what is wrong with the places of stored segments in the file; the answer is empty if they are sound.

    Each must lie inside the file and must not overlap another, but segments may share all their bytes.
    """
    if (offsets <= 0).any() or (counts <= 0).any():
        return "tiles or strips with an offset but no length, or a length but no offset"
    if (offsets > file_bytes).any() or (counts > file_bytes - offsets).any():
        return "truncated, tiles or strips lie past the end of the file"
    if (offsets[1:] - offsets[:-1] >= counts[:-1]).all():  # one after the other, as most writers store them
        return ""
    order = np.lexsort((-counts, offsets))  # the longest of segments that share bytes comes first
    starts, first = np.unique(offsets[order], return_index=True)
    ends = starts + counts[order][first]
    return "tiles or strips overlap in the file" if (ends[:-1] > starts[1:]).any() else ""
