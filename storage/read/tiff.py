"""TIFF slides where they lie (SVS, OME-TIFF, COG and other GeoTIFF, tiled pyramids): only touched tiles are read.

The structure is trusted only after the checks of ``storage.images.tiff_structure``.

Shape letters: N boxes, K tiles touched, C channels, H height, W width.
"""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.format.shard import CHECKSUM_BYTES, crc32c
from storage.images.orientation import UPRIGHT
from storage.images.tiff import TiffImage
from storage.place.files import RandomFile
from storage.read.boxes import cut
from storage.read.halved import HalvedSource, fill_apart

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from storage.place.files import Range
    from storage.place.location import Pages
    from storage.read.cache import ChunkCache
    from storage.read.source import Counters

FORMAT = 2  # part of an identity: raise it when the same file comes to be read as other pixels
SAMPLED_TILES = 16  # read for an identity
CACHED_TOGETHER = 64  # ranges looked up in the cache before the others are fetched


class TiffSource(HalvedSource):
    """A TIFF file; see ``Source``.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    def __init__(
        self, location: str, counters: Counters, cache: ChunkCache | None = None, pages: Pages = None
    ) -> None:
        self._image = first = TiffImage(_File(location, counters, cache), coarser=True, pages=pages)
        self._counters = counters
        self.name = PurePosixPath(location.rstrip("/")).stem + ("" if pages is None else f"_p{pages}")
        self._images = [first, *sorted(first.coarser, key=lambda each: -max(each.shape[1:]))]
        shapes_yx = [(each.shape[1], each.shape[2]) for each in self._images]
        super().__init__(first, shapes_yx, [max(each.segment_yx) for each in self._images])

    @cached_property
    def identity(self) -> str:
        """Digest of the file's length, of the table of tiles and of some tiles; see ``Source``."""
        image = self._image
        described = (image.file_bytes, self.channels, self.dtype.str, image.orientation)
        alpha = () if image.alpha is None else (image.alpha,)  # it decides coarser levels
        digest = hashlib.sha256(repr((FORMAT, *described, *alpha)).encode())
        for image in self._images:
            digest.update(repr(image.shape).encode())
            for plane in (*image.planes, *(image.mask.planes if image.mask else ())):
                digest.update(plane.offsets.tobytes() + plane.counts.tobytes())
        for data in self._image.sample(SAMPLED_TILES):
            digest.update(data)
        return digest.hexdigest()

    def _fill_stored(self, number: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Decode each tile once; plain pixels are read row by row."""
        image = self._images[number]
        if image.direct or image.orientation != UPRIGHT:
            fill_apart(boxes, out, (image.shape[1], image.shape[2]), image.read)
            return
        self._decode(image, boxes, out)
        if image.mask is not None:
            shown = np.zeros((len(out), 1, *out.shape[2:]), image.mask.dtype)
            self._decode(image.mask, boxes, shown)
            out[:, -1:] = image.as_alpha(shown)

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


class _File(RandomFile):
    """A file that counts the bytes read from it, and keeps them in a cache if there is one."""

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
