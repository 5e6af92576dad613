"""Plain PNG, JPEG and BMP files, decoded once and held in memory with their coarser levels."""

from __future__ import annotations

import hashlib
from contextlib import closing
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.format.levels import MIN_LEVEL_SIZE, Level, coarsened, level_sizes
from storage.images.halving import downsample
from storage.images.raster import RasterImage
from storage.place.files import RandomFile
from storage.read.boxes import cut

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from storage.format.georeference import Georeference
    from storage.read.source import Counters


class MemorySource:
    """A PNG, JPEG or BMP file; see ``Source``. Its levels are those that a conversion would make.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    bits: int | None = None
    nodata: float | None = None
    georeference: Georeference | None = None

    def __init__(self, location: str, counters: Counters) -> None:
        with closing(RandomFile(location)) as file:
            self.name, size = file.name, file.size
        with RasterImage(location) as image:
            _, height, width = image.shape
            pixels = np.ascontiguousarray(image.read(0, 0, height, width))
            self.channels, self.alpha = image.channels, image.alpha
        counters.add(requests=1, read=size)
        self.dtype = pixels.dtype
        self._pixels = [pixels]
        sizes = level_sizes(height, width, MIN_LEVEL_SIZE)
        for _ in sizes[1:]:
            self._pixels.append(downsample(self._pixels[-1], alpha=self.alpha))
        self.levels = tuple(_level(number, size_yx) for number, size_yx in enumerate(sizes))
        self.memory_bytes = sum(level.nbytes for level in self._pixels)

    @cached_property
    def identity(self) -> str:
        """Digest of the pixels of level 0, from which all others are made; see ``Source``."""
        pixels = self._pixels[0]
        return hashlib.sha256(repr((pixels.shape, pixels.dtype.str)).encode() + pixels.tobytes()).hexdigest()

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy from the level's pixels; see ``Source``."""
        pixels = self._pixels[level]
        shape_yx = (pixels.shape[1], pixels.shape[2])
        for parts in cut(boxes, shape_yx, shape_yx)[-1]:
            for b, y0, y1, x0, x1, py0, py1, px0, px1 in parts:
                out[b, :, y0:y1, x0:x1] = pixels[:, py0:py1, px0:px1]

    def close(self) -> None:
        """Do nothing, since the memory is freed with the slide."""


def _level(number: int, size_yx: tuple[int, int]) -> Level:
    scale_yx, first_yx = coarsened(2**number, (1.0, 1.0), (0.0, 0.0))
    return Level(
        shape_yx=size_yx,
        downsample=scale_yx[0],
        mpp=None,
        chunk=max(size_yx),
        shard=max(size_yx),
        scale_yx=scale_yx,
        translation_yx=first_yx,
    )
