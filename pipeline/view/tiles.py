"""Tiles of a slide at halves, quarters and so on of its size, from the nearest finer level that the slide has.

Tiles are those of Deep Zoom without overlap. A level that the slide has is copied; another is the mean, by area, of
the next finer one, so that as a rule less than four times the pixels of a tile are read. Where a file has no coarse
levels there is more to read (`cost`): that happens in pieces, which bound its memory and between which it can
be stopped.

Shape letters: C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from storage import Slide

TILE = 256  # pixels, side of a tile
_PIECE_PIXELS = 2**22  # of the file, that are read between two looks at whether somebody still waits
_PIECE_BYTES = 2**26
_SAMPLED = 1024  # pixels, that the longer side of a sampled level has at least
_SAME = 0.01  # by which the downsample of a slide's level may differ from that of a tile, and is resampled from

Paint = Callable[[NDArray[Any]], NDArray[np.uint8]]
"""Makes a picture (H, W, 3), or (H, W, 4) with opacity, of pixels (C, H, W)."""


class Tile(NamedTuple):
    """A tile: how often the slide is halved, and its row and column."""

    halvings: int
    row: int
    column: int


def coarsest(shape_yx: tuple[int, int]) -> int:
    """How often a slide is halved until one tile shows all of it."""
    return max(0, math.ceil(math.log2(max(shape_yx) / TILE)))


def whole(shape_yx: tuple[int, int]) -> Tile:
    """The tile that shows all of a slide."""
    return Tile(coarsest(shape_yx), 0, 0)


def is_there(tile: Tile, shape_yx: tuple[int, int]) -> bool:
    """Tell whether a slide of a shape has a tile."""
    if not 0 <= tile.halvings <= coarsest(shape_yx):
        return False
    height, width = _size(shape_yx, tile.halvings)
    return 0 <= tile.row < -(-height // TILE) and 0 <= tile.column < -(-width // TILE)


def cost(slide: Slide, tile: Tile) -> float:
    """How many pixels of the file are read for a tile."""
    height, width = _size(slide.shape_yx, tile.halvings)
    seen = min(TILE, height - tile.row * TILE) * min(TILE, width - tile.column * TILE)
    return seen * _oversampling(slide, tile.halvings) ** 2


def _oversampling(slide: Slide, halvings: int) -> float:
    """How many pixels of the file lie along a side of one pixel of a tile, on the level that is read."""
    number = _level(slide, halvings)
    return float(2**halvings) / (slide.levels[number].made_of or slide.levels[number].downsample)


def draw_tile(slide: Slide, tile: Tile, paint: Paint, check: Callable[[], None]) -> Image.Image:
    """Draw a tile.

    Parameters
    ----------
    slide
        An open slide.
    tile
        One that is there (`is_there`).
    paint
        Makes a picture of pixels. It sees those of the file; means are of its pictures.
    check
        Is called between pieces; what it raises ends the drawing.

    Raises
    ------
    storage.StorageError
        The slide cannot be read there.
    """
    height, width = _size(slide.shape_yx, tile.halvings)
    top, left = tile.row * TILE, tile.column * TILE
    size_yx = min(TILE, height - top), min(TILE, width - left)
    drawn: Image.Image | None = None
    for (y0, y1), (x0, x1) in product(*(_pieces(slide, tile.halvings, side) for side in size_yx)):
        check()
        piece = _draw(slide, tile.halvings, (top + y0, left + x0, y1 - y0, x1 - x0), paint)
        if piece.size == size_yx[::-1]:
            return piece
        drawn = drawn or Image.new("RGBA", size_yx[::-1])
        drawn.paste(piece, (x0, y0))
    assert drawn is not None  # noqa: S101 - a tile that is there has pixels
    return drawn if drawn.getextrema()[-1][0] < 255 else drawn.convert("RGB")  # type: ignore[index]


def sample(slide: Slide) -> NDArray[Any]:
    """Read (C, N) pixels from all over a slide, at most 2**20, on a coarse level that is stored."""
    stored = [i for i, level in enumerate(slide.levels) if level.made_of is None]
    number = max(i for i in stored if i == 0 or max(slide.levels[i].shape_yx) >= _SAMPLED)
    height, width = slide.levels[number].shape_yx
    side = max(1, min(TILE, int(math.sqrt(_PIECE_BYTES / (len(slide.channels) * slide.dtype.itemsize * 16)))))
    corners = list(product(_spread(height, side), _spread(width, side)))
    boxes = [(y, x, min(side, height), min(side, width)) for y, x in corners]
    pixels = slide.read_many(number, boxes)
    return np.moveaxis(pixels, 1, 0).reshape(len(slide.channels), -1)


def _spread(length: int, side: int) -> list[int]:
    """Where to begin with up to four stretches of `side` along a length."""
    return sorted({round(start) for start in np.linspace(0, max(0, length - side), min(4, -(-length // side)))})


def _size(shape_yx: tuple[int, int], halvings: int) -> tuple[int, int]:
    return -(-shape_yx[0] // 2**halvings), -(-shape_yx[1] // 2**halvings)


def _level(slide: Slide, halvings: int) -> int:
    """Number of the slide's level that tiles are made of."""
    wanted = 2**halvings * (1 + _SAME)
    return max(i for i, level in enumerate(slide.levels) if level.downsample <= wanted or i == 0)


def _pieces(slide: Slide, halvings: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut a side of a tile so that a piece is read within the limits."""
    level = slide.levels[_level(slide, halvings)]
    pixel_bytes = len(slide.channels) * slide.dtype.itemsize
    step = min(
        math.sqrt(_PIECE_PIXELS) / _oversampling(slide, halvings),
        math.sqrt(_PIECE_BYTES / pixel_bytes) * level.downsample / 2**halvings,
    )
    whole = min(TILE, max(1, int(step)))
    return ((start, min(start + whole, length)) for start in range(0, length, whole))


def _draw(slide: Slide, halvings: int, box: tuple[int, int, int, int], paint: Paint) -> Image.Image:
    """Draw a box (y, x, h, w) of the slide so often halved."""
    number = _level(slide, halvings)
    level = slide.levels[number]
    ratio = 2**halvings / level.downsample
    if abs(ratio - 1) * max(level.shape_yx) < 0.5:  # they differ by no pixel anywhere
        ratio = 1.0
    y, x, h, w = box
    (top, bottom), (left, right) = ((first * ratio, (first + side) * ratio) for first, side in ((y, h), (x, w)))
    pixels = _read(slide, number, (math.floor(top), math.floor(left)), (math.ceil(bottom), math.ceil(right)))
    picture = Image.fromarray(paint(pixels))
    if ratio == 1:
        return picture
    if ratio == int(ratio):
        return picture.reduce(int(ratio))
    part = (left - math.floor(left), top - math.floor(top), right - math.floor(left), bottom - math.floor(top))
    return picture.resize((w, h), Image.Resampling.BOX, box=part)


def _read(slide: Slide, level: int, first_yx: tuple[int, int], end_yx: tuple[int, int]) -> NDArray[Any]:
    """Read a box of a level; its last pixels go on where it leaves the level, whose sides may be rounded down."""
    pairs = zip(first_yx, end_yx, slide.levels[level].shape_yx, strict=True)
    (top, bottom), (left, right) = ((min(first, side - 1), min(end, side)) for first, end, side in pairs)
    pixels = slide.read(level, (top, left, bottom - top, right - left))
    missing = [end - first - there for first, end, there in zip(first_yx, end_yx, pixels.shape[1:], strict=True)]
    return np.pad(pixels, [(0, 0), *((0, each) for each in missing)], mode="edge") if any(missing) else pixels
