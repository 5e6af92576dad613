"""What lies behind a ``Slide``: one kind of source per kind of storage, all with the same levels and counters."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray


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


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What a slide has read since it was opened; subtract an earlier snapshot to measure a part."""

    requests: int = 0  # range reads or objects fetched whole, absent ones included, repeats after failures not
    bytes_read: int = 0
    chunks_decoded: int = 0
    cached_chunks: int = 0  # of those decoded, found in the local cache

    def __sub__(self, other: ReadStatistics) -> ReadStatistics:
        return ReadStatistics(
            self.requests - other.requests,
            self.bytes_read - other.bytes_read,
            self.chunks_decoded - other.chunks_decoded,
            self.cached_chunks - other.cached_chunks,
        )


class Counters:
    """Sums behind ``ReadStatistics``, added to by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = self._bytes = self._chunks = self._cached = 0

    def add(self, *, requests: int = 0, read: int = 0, chunks: int = 0, cached: int = 0) -> None:
        """Count what was done; ``read`` in bytes."""
        with self._lock:
            self._requests += requests
            self._bytes += read
            self._chunks += chunks
            self._cached += cached

    def snapshot(self) -> ReadStatistics:
        """Sums so far."""
        with self._lock:
            return ReadStatistics(self._requests, self._bytes, self._chunks, self._cached)


def name_channels(labels: Sequence[str], count: int) -> tuple[str, ...]:
    """Name ``count`` channels by their labels, or by number where there are more or fewer of these."""
    return tuple(labels) if len(labels) == count else tuple(str(i) for i in range(count))


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


class Source(Protocol):
    """An image at several levels; thread safe."""

    name: str
    channels: tuple[str, ...]
    dtype: np.dtype[Any]  # in native byte order
    levels: tuple[Level, ...]
    memory_bytes: int  # of pixels held as long as it is open

    @property
    def identity(self) -> str | None:
        """Digest of the pixels of all levels, which is another wherever these are; None where none is known."""
        ...

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the parts of (N, 4) boxes that lie inside the image into ``out`` (N, C, h, w); h and w are not 0."""
        ...

    def close(self) -> None:
        """Give descriptors, connections and memory back."""
        ...
