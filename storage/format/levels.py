"""The levels of a slide, whoever wrote it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


MIN_LEVEL_SIZE = 64  # pixels; our levels go on until the longer side is no more than this


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a slide; level 0 is the finest.

    ``chunk`` is what is decoded at once and ``shard`` what is one file: of arrays of other writers, whose chunks need
    not be square, the longer sides; of an image in memory its longer side.
    """

    shape_yx: tuple[int, int]  # pixels
    downsample: float  # level-0 pixels per pixel
    mpp: float | None  # micrometres per pixel
    chunk: int  # side of a chunk, pixels
    shard: int  # side of a shard, pixels
    scale_yx: tuple[float, float]  # size of a pixel in the pyramid's unit (micrometres, or pixels if unknown)
    translation_yx: tuple[float, float]  # centre of the first pixel in that unit
    made_of: float | None = None  # downsample of the level whose pixels are averaged at each read; None: it is stored


def name_channels(labels: Sequence[str], count: int) -> tuple[str, ...]:
    """Name ``count`` channels by their labels, or by number where there are more or fewer of these."""
    return tuple(labels) if len(labels) == count else tuple(str(i) for i in range(count))


def level_sizes(height: int, width: int, smallest: int, count: int | None = None) -> list[tuple[int, int]]:
    """Heights and widths of our levels, at least two, halved until the longer side is no more than ``smallest``.

    With ``count`` there are so many.
    """
    sizes = [(height, width)]
    while len(sizes) < count if count else len(sizes) < 2 or max(sizes[-1]) > smallest:
        sizes.append(half_size(*sizes[-1]))
    return sizes


def half_size(height: int, width: int) -> tuple[int, int]:
    """Height and width of the next coarser level; an odd edge is rounded up."""
    return (-(-height // 2), -(-width // 2))


def coarsened(
    factor: float, scale_yx: tuple[float, float], first_yx: tuple[float, float]
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Pixel size and centre of the first pixel of a level that is ``factor`` times coarser than one with these.

    A mean lies in the middle of what it is of.
    """
    (y, x), (first_y, first_x) = scale_yx, first_yx
    return (y * factor, x * factor), (first_y + y * (factor - 1) / 2, first_x + x * (factor - 1) / 2)


def check_levels(shapes_yx: Sequence[tuple[int, int]], scales_yx: Sequence[tuple[float, float]]) -> None:
    """See that levels come finest first, and that each one's pixels are as large as its size says.

    Raises
    ------
    ValueError
        They do not.
    """
    previous = 0.0
    for number, (shape_yx, scale_yx) in enumerate(zip(shapes_yx, scales_yx, strict=True)):
        down_y, down_x = (scale / finest for scale, finest in zip(scale_yx, scales_yx[0], strict=True))
        pairs = zip(shape_yx, (down_y, down_x), shapes_yx[0], strict=True)
        fits = all(abs(size * down - base) <= 2 * down for size, down, base in pairs)
        if not fits or abs(down_y / down_x - 1) * max(shape_yx) >= 1 or down_y <= previous:
            raise ValueError(
                f"level {number} of {shape_yx} pixels is said to be level 0 of {shapes_yx[0]} pixels "
                f"scaled by {down_y:g}, {down_x:g}; correct the scales in its metadata"
            )
        previous = down_y
