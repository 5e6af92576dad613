"""TIFF slides where they lie (SVS, OME-TIFF, COG and other GeoTIFF, tiled pyramids): only touched tiles are read.

Notable: a level that the file lacks is the mean of the next finer one, as in a conversion, made for the boxes that
are asked for. What the structure says is believed only after the checks of ``storage.images.tiff``, which decodes.

Shape letters: N boxes, K tiles touched, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from itertools import product
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from storage.format.levels import Level
from storage.format.shard import CHECKSUM_BYTES, crc32c
from storage.images.halving import downsample
from storage.images.tiff import TiffImage
from storage.images.tiff_structure import whole_ratio
from storage.place.files import RandomFile
from storage.read.boxes import cut

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from storage.place.files import Range
    from storage.read.cache import ChunkCache
    from storage.read.source import Counters

MIN_LEVEL_SIZE = 64  # pixels; levels go on until the longer side is no more than this, as in a conversion
BLOCK = 1024  # pixels, side of what is made of the next finer level at once
FORMAT = 1  # of an identity: raise it where other pixels come to be read of the same file
SAMPLED_TILES = 16  # for an identity
CACHED_TOGETHER = 64  # ranges looked up in the cache before the others are fetched


class _Step(NamedTuple):
    """A level of the file, or one that is made of the level before it."""

    shape_yx: tuple[int, int]
    downsample: float
    image: TiffImage | None
    stored: float  # downsample of the pixels that are read for it


class TiffSource:
    """A TIFF file; see ``Source``.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    memory_bytes = 0

    def __init__(self, location: str, counters: Counters, cache: ChunkCache | None = None) -> None:
        self._image = first = TiffImage(_File(location, counters, cache), coarser=True)
        self._counters = counters
        self.name = PurePosixPath(location.rstrip("/")).stem
        self.channels, self.dtype = first.channels, first.dtype
        self._steps = _steps(first)
        self.levels = tuple(_level(step, first) for step in self._steps)

    @cached_property
    def identity(self) -> str:
        """Digest of the file's length, of where each tile lies and of some tiles; see ``Source``."""
        digest = hashlib.sha256(repr((FORMAT, self._image.file_bytes, self.channels, self.dtype.str)).encode())
        for step in self._steps:
            digest.update(repr((step.shape_yx, step.downsample)).encode())
            for plane in step.image.planes if step.image else []:
                digest.update(plane.offsets.tobytes() + plane.counts.tobytes())
        for data in self._image.sample(SAMPLED_TILES):
            digest.update(data)
        return digest.hexdigest()

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the image into ``out``, tile by tile, each decoded once; see ``Source``."""
        image, shape_yx = self._steps[level].image, self._steps[level].shape_yx
        if image is None:
            for box, own in zip(boxes, out, strict=True):
                self._make(level, box, own)
        elif image.direct:  # plain pixels are read row by row
            for box, own in zip(boxes, out, strict=True):
                y0, x0, y1, x1 = _inside(box, shape_yx)
                if y0 < y1 and x0 < x1:
                    y, x = int(box[0]), int(box[1])
                    own[:, y0 - y : y1 - y, x0 - x : x1 - x] = image.read(y0, x0, y1 - y0, x1 - x0)
        else:
            self._decode(image, boxes, out)

    def close(self) -> None:
        """Close the file."""
        self._image.close()

    def _decode(self, image: TiffImage, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        rows, columns, parts = cut(boxes, (image.shape[1], image.shape[2]), image.segment_yx)
        tiles = rows * image.columns + columns
        for plane in image.planes:
            for pixels, own in zip(image.segments(plane, tiles), parts, strict=True):
                turned = pixels.transpose(2, 0, 1)
                channels = slice(plane.first_channel, plane.first_channel + len(turned))
                for b, y0, y1, x0, x1, ty0, ty1, tx0, tx1 in own:
                    out[b, channels, y0:y1, x0:x1] = turned[:, ty0:ty1, tx0:tx1]
        self._counters.add(chunks=len(tiles) * len(image.planes))

    def _make(self, level: int, box: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Fill one box (C, h, w) of a level that the file lacks, in blocks, so that little is held at once."""
        y0, x0, y1, x1 = _inside(box, self._steps[level].shape_yx)
        height, width = self._steps[level - 1].shape_yx
        for top, left in product(_starts(y0, y1), _starts(x0, x1)):
            bottom, right = min(top - top % BLOCK + BLOCK, y1), min(left - left % BLOCK + BLOCK, x1)
            finer_yx = (min(2 * bottom, height) - 2 * top, min(2 * right, width) - 2 * left)
            finer = np.empty((1, len(out), *finer_yx), self.dtype)
            self.fill(level - 1, np.array([[2 * top, 2 * left, *finer_yx]]), finer)
            y, x = int(box[0]), int(box[1])
            out[:, top - y : bottom - y, left - x : right - x] = downsample(finer[0])


class _File(RandomFile):
    """A file that counts what is read of it, and keeps that in a cache, if there is one."""

    def __init__(self, location: str, counters: Counters, cache: ChunkCache | None) -> None:
        super().__init__(location)
        self._counters, self._cache = counters, cache
        self._cached_prefix = f"{location}\n{self.identity()}"

    def read_ranges(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        """Yield the bytes of each range; see ``RandomFile.read_ranges``."""
        if self._cache is None:
            yield from super().read_ranges(ranges)
            return
        for group in (ranges[first : first + CACHED_TOGETHER] for first in range(0, len(ranges), CACHED_TOGETHER)):
            names = [f"{self._cached_prefix}\n{offset}\n{length}" for offset, length in group]
            kept = [self._cache.get(name) for name in names]
            fetched = super().read_ranges([pair for pair, data in zip(group, kept, strict=True) if data is None])
            self._counters.add(cached=sum(data is not None for data in kept))
            for name, data in zip(names, kept, strict=True):
                if data is None:
                    data = next(fetched)
                    self._cache.put(name, data + crc32c(data))
                    yield data
                else:
                    yield data[:-CHECKSUM_BYTES]

    def _get(self, ranges: Sequence[Range]) -> Iterator[bytes]:
        for data in super()._get(ranges):
            self._counters.add(requests=1, read=len(data))
            yield data


def _inside(box: NDArray[np.int64], shape_yx: tuple[int, int]) -> tuple[int, int, int, int]:
    """What of a box (y, x, h, w) lies in the image: first and last row and column."""
    y, x, h, w = box.tolist()
    return max(y, 0), max(x, 0), min(y + h, shape_yx[0]), min(x + w, shape_yx[1])


def _starts(first: int, last: int) -> range | list[int]:
    """Where the blocks between two pixels begin; all but the first at a multiple of ``BLOCK``."""
    return [first, *range(first - first % BLOCK + BLOCK, last, BLOCK)] if first < last else []


def _steps(first: TiffImage) -> list[_Step]:
    """The levels: those of the file, and between and after them what halving makes."""
    steps: list[_Step] = []
    for image in [first, *sorted(first.coarser, key=lambda each: -max(each.shape[1:]))]:
        scale = _downsample(image, first)
        while steps and steps[-1].downsample * 2 < scale * 0.99:
            steps.append(_halved(steps[-1]))
        if not steps or scale > steps[-1].downsample * 1.01:
            steps.append(_Step((image.shape[1], image.shape[2]), scale, image, scale))
    while len(steps) < 2 or max(steps[-1].shape_yx) > MIN_LEVEL_SIZE:
        steps.append(_halved(steps[-1]))
    return steps


def _halved(step: _Step) -> _Step:
    height, width = step.shape_yx
    return _Step((-(-height // 2), -(-width // 2)), step.downsample * 2, None, step.stored)


def _downsample(image: TiffImage, first: TiffImage) -> float:
    """How many times smaller a level is; the mean of both sides where that is no whole number."""
    finest_yx, own_yx = first.shape[1:], image.shape[1:]
    ratios = [finest / own for finest, own in zip(finest_yx, own_yx, strict=True)]
    return float(whole_ratio(finest_yx, own_yx) or sum(ratios) / 2)


def _level(step: _Step, first: TiffImage) -> Level:
    mpp_yx = first.mpp_yx or (1.0, 1.0)
    tile = max((step.image or first).segment_yx)
    return Level(
        shape_yx=step.shape_yx,
        downsample=step.downsample,
        mpp=first.mpp_yx[0] * step.downsample if first.mpp_yx else None,
        chunk=tile,
        shard=tile,
        scale_yx=(mpp_yx[0] * step.downsample, mpp_yx[1] * step.downsample),
        translation_yx=(mpp_yx[0] * (step.downsample - 1) / 2, mpp_yx[1] * (step.downsample - 1) / 2),
        made_of=None if step.image else step.stored,
    )
