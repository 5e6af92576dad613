"""Slides in files of other programs, at the levels of the file and at levels made by halving.

A level that the file lacks is the mean of the next finer one, as in a conversion, computed only for the boxes that
are read.

Shape letters: N boxes, C channels, H height, W width.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from storage.format.levels import MIN_LEVEL_SIZE, Level, coarsened, half_size
from storage.images.halving import downsample, whole_ratio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from numpy.typing import NDArray

    from storage.images.image import Image

BLOCK = 1024  # pixels, side of what is halved at once


class _Step(NamedTuple):
    """A level of the file, by its number there, or one that is made from the level before it."""

    shape_yx: tuple[int, int]
    downsample: float
    number: int | None
    stored: float  # downsample of the pixels that it is read from


class HalvedSource:
    """Base of the sources of such files; see ``Source``. A subclass fills boxes of the file's own levels.

    Parameters
    ----------
    image
        The finest level.
    shapes_yx
        Height and width of each level of the file, finest first.
    pieces
        For each of these levels, the longer side of what is decoded at once.
    """

    memory_bytes = 0

    def __init__(self, image: Image, shapes_yx: Sequence[tuple[int, int]], pieces: Sequence[int]) -> None:
        self.channels, self.dtype, self.nodata, self.bits = image.channels, image.dtype, image.nodata, image.bits
        self.alpha = image.alpha
        self.georeference = image.georeference
        self._steps = _steps(shapes_yx)
        self.levels = tuple(_level(step, pieces[step.number or 0], image.mpp_yx) for step in self._steps)

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the image into ``out``; see ``Source``."""
        number = self._steps[level].number
        if number is not None:
            self._fill_stored(number, boxes, out)
            return
        for box, own in zip(boxes, out, strict=True):
            self._make(level, box, own)

    def _fill_stored(self, number: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Do as `fill` for a level of the file, by its number there."""
        raise NotImplementedError

    def _make(self, level: int, box: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill one box (C, h, w) of a level that the file lacks, in blocks to save memory."""
        y, x = box[:2].tolist()
        y0, x0, y1, x1 = inside(box, self._steps[level].shape_yx)
        height, width = self._steps[level - 1].shape_yx
        for (top, bottom), (left, right) in product(_blocks(y0, y1), _blocks(x0, x1)):
            finer_yx = (min(2 * bottom, height) - 2 * top, min(2 * right, width) - 2 * left)
            finer = np.empty((1, len(out), *finer_yx), self.dtype)
            self.fill(level - 1, np.array([[2 * top, 2 * left, *finer_yx]]), finer)
            out[:, top - y : bottom - y, left - x : right - x] = downsample(
                finer[0], nodata=self.nodata, alpha=self.alpha
            )


def fill_apart(
    boxes: NDArray[np.int64], out: NDArray[Any], shape_yx: tuple[int, int], read: Callable[..., NDArray[Any]]
) -> int:
    """Fill boxes one by one by ``read(y, x, h, w)`` of their part in the image; return the number of reads."""
    asked = 0
    for box, own in zip(boxes, out, strict=True):
        y, x = box[:2].tolist()
        y0, x0, y1, x1 = inside(box, shape_yx)
        if y0 < y1 and x0 < x1:
            own[:, y0 - y : y1 - y, x0 - x : x1 - x] = read(y0, x0, y1 - y0, x1 - x0)
            asked += 1
    return asked


def inside(box: NDArray[np.int64], shape_yx: tuple[int, int]) -> tuple[int, int, int, int]:
    """The part of a box (y, x, h, w) in the image: its first row and column, and the ends of both."""
    y, x, h, w = box.tolist()
    return max(y, 0), max(x, 0), min(y + h, shape_yx[0]), min(x + w, shape_yx[1])


def _blocks(first: int, last: int) -> Iterable[tuple[int, int]]:
    """Cut the pixels from ``first`` to ``last`` at multiples of ``BLOCK``."""
    while first < last:
        end = min(first - first % BLOCK + BLOCK, last)
        yield first, end
        first = end


def _steps(shapes_yx: Sequence[tuple[int, int]]) -> list[_Step]:
    """The levels of the file, and those made by halving between and after them."""
    steps: list[_Step] = []
    for number, shape_yx in enumerate(shapes_yx):
        ratios = [finest / own for finest, own in zip(shapes_yx[0], shape_yx, strict=True)]
        scale = float(whole_ratio(shapes_yx[0], shape_yx) or sum(ratios) / 2)
        while steps and steps[-1].downsample * 2 < scale * 0.99:
            steps.append(_halved(steps[-1]))
        if not steps or scale > steps[-1].downsample * 1.01:
            steps.append(_Step(shape_yx, scale, number, scale))
    while len(steps) < 2 or max(steps[-1].shape_yx) > MIN_LEVEL_SIZE:
        steps.append(_halved(steps[-1]))
    return steps


def _halved(step: _Step) -> _Step:
    return _Step(half_size(*step.shape_yx), step.downsample * 2, None, step.stored)


def _level(step: _Step, piece: int, known_yx: tuple[float, float] | None) -> Level:
    scale_yx, translation_yx = coarsened(step.downsample, known_yx or (1.0, 1.0), (0.0, 0.0))
    return Level(
        shape_yx=step.shape_yx,
        downsample=step.downsample,
        mpp=scale_yx[0] if known_yx else None,
        chunk=piece,
        shard=piece,
        scale_yx=scale_yx,
        translation_yx=translation_yx,
        made_of=None if step.number is not None else step.stored,
    )
