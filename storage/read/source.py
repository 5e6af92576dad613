"""The protocol behind ``Slide``, which each kind of storage implements, and the counters of what is read."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from storage.format.georeference import Georeference
    from storage.format.levels import Level


@dataclass(frozen=True, slots=True)
class ReadStatistics:
    """What a slide has read since it was opened; subtract an earlier snapshot to measure a part."""

    requests: int = 0  # range reads and whole objects; absent ones count, repeats after failures do not
    bytes_read: int = 0
    chunks_decoded: int = 0
    cached_chunks: int = 0  # decoded chunks that were found in the local cache

    def __add__(self, other: ReadStatistics) -> ReadStatistics:
        return ReadStatistics(
            self.requests + other.requests,
            self.bytes_read + other.bytes_read,
            self.chunks_decoded + other.chunks_decoded,
            self.cached_chunks + other.cached_chunks,
        )

    def __sub__(self, other: ReadStatistics) -> ReadStatistics:
        return ReadStatistics(
            self.requests - other.requests,
            self.bytes_read - other.bytes_read,
            self.chunks_decoded - other.chunks_decoded,
            self.cached_chunks - other.cached_chunks,
        )


class Counters:
    """The sums behind ``ReadStatistics``, to which many threads add."""

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


class Source(Protocol):
    """An image at several levels; thread safe."""

    name: str
    channels: tuple[str, ...]
    dtype: np.dtype[Any]  # in native byte order
    levels: tuple[Level, ...]
    bits: int | None  # bits of a sample, where it has fewer than its type
    nodata: float | None  # value of pixels that hold no data, each channel for itself
    alpha: int | None  # channel whose zeros say that no channel holds data there
    georeference: Georeference | None  # where on the Earth it lies
    memory_bytes: int  # bytes of pixels held while it is open

    @property
    def identity(self) -> str | None:
        """Digest of the pixels of all levels, which differs wherever they do; None where it is unknown."""
        ...

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the parts of (N, 4) boxes that lie inside the image into ``out`` (N, C, h, w); h and w are not 0."""
        ...

    def close(self) -> None:
        """Close descriptors and connections, and free memory."""
        ...
