"""Band files as one slide where they lie; see ``storage.images.bands``.

Shape letters: N boxes, C channels.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.images.bands import BandsImage
from storage.place.location import scene_name
from storage.read.halved import HalvedSource
from storage.read.tiff import TiffSource

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from storage.images.bands import Grid
    from storage.read.cache import ChunkCache
    from storage.read.source import Counters

    _Level = tuple[TiffSource, int, Grid]  # the number of a level of a file, and where the scene's pixels lie in it

SAME = 0.01  # by which a number of pixels may differ from a whole one


class BandsSource(HalvedSource):
    """Band files; see ``Source``. A level is read from files where each has it, or its finest pixels are no finer.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    def __init__(self, location: str, counters: Counters, cache: ChunkCache | None = None) -> None:
        with BandsImage(location) as image:
            self._image = image
        self._sources = [TiffSource(file, counters, cache) for file in image.files]
        self.name = scene_name(image.files)
        self._stored: list[list[_Level]] = []  # for each level of the scene, of each file
        shapes_yx, pieces = [], []
        for level in self._sources[image.finest].levels:
            found = [self._find(number, level.downsample) for number in range(len(image.files))]
            if level.made_of is None and None not in found:
                self._stored.append([each for each in found if each])
                shapes_yx.append(level.shape_yx)
                pieces.append(max(source.levels[own].chunk for source, own, _ in self._stored[-1]))
        super().__init__(image, shapes_yx, pieces)
        self._shapes_yx = shapes_yx

    @property
    def identity(self) -> str:
        """Digest of what the files are, and how they lie on each other; see ``Source``."""
        parts = [(source.identity, grid) for source, grid in zip(self._sources, self._image.grids, strict=True)]
        return hashlib.sha256(repr((self.channels, parts)).encode()).hexdigest()

    def close(self) -> None:
        """Close the files."""
        for source in self._sources:
            source.close()

    def _find(self, number: int, downsample: float) -> _Level | None:
        """Find the level of a file that is read for one of the scene.

        So many whole pixels of the scene's level lie in one of the file's that no mean is over two of these.
        """
        source, grid = self._sources[number], self._image.grids[number]
        for own, level in enumerate(source.levels):
            ratio = level.downsample / (downsample * abs(grid.step_yx[0]))
            places = (ratio, *(first / level.downsample for first in grid.first_yx))
            whole = all(abs(each - round(each)) < SAME for each in places)
            fits = round(ratio) == 1 or (own == 0 and ratio > 1)
            if level.made_of is None and ((whole and fits) or (downsample == 1 and own == 0)):
                return source, own, grid.between(downsample, level.downsample, level.shape_yx)
        return None

    def _fill_stored(self, number: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        pixels = self._image.joined([_read(*level, boxes) for level in self._stored[number]])
        (h, w), (height, width) = out.shape[2:], self._shapes_yx[number]
        y, x = boxes[:, 0, None] + np.arange(h), boxes[:, 1, None] + np.arange(w)
        inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[:, None, None, :]
        np.copyto(out, pixels, where=inside)


def _read(source: TiffSource, level: int, grid: Grid, boxes: NDArray[np.int64]) -> NDArray[Any]:
    """Read boxes (N, 4) of a scene's level from a file's, (N, C, h, w); what lies outside is of any value."""
    h, w = boxes[0, 2:].tolist()
    rows = np.stack([grid.indexes(0, y, h) for y in boxes[:, 0].tolist()])  # (N, h)
    columns = np.stack([grid.indexes(1, x, w) for x in boxes[:, 1].tolist()])
    top, left = rows.min(1), columns.min(1)
    rows, columns = rows - top[:, None], columns - left[:, None]
    own_h, own_w = int(rows.max()) + 1, int(columns.max()) + 1
    own = np.column_stack([top, left, np.full_like(top, own_h), np.full_like(left, own_w)])
    pixels = np.zeros((len(boxes), len(source.channels), own_h, own_w), source.dtype)
    source.fill(level, own, pixels)
    n = np.arange(len(boxes))[:, None, None]
    return pixels[n, :, rows[:, :, None], columns[:, None, :]].transpose(0, 3, 1, 2)
