"""Our own pyramids: chunks fetched by range from shard files, each verified by its checksum.

Notable: the chunks under all boxes of a batch are looked up with array arithmetic, those that lie close together in a
file are fetched by one request, and each is decoded once however many boxes share it. Nothing is ever filled in: the
pyramid lists its shards, so one that is missing, damaged or exchanged for another is an error.

Shape letters: N boxes, K chunks touched, C channels.
"""

from __future__ import annotations

import hashlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import CorruptImageError
from storage.format.levels import Level, name_channels
from storage.format.shard import CHECKSUM_BYTES, decode_chunk, decode_index
from storage.read.boxes import cut
from storage.threads import spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from storage.format.ome_zarr import LevelInfo, PyramidInfo
    from storage.place.stores import Store
    from storage.read.cache import ChunkCache
    from storage.read.source import Counters

    Decode = Callable[[int, bytes], None]  # takes the position of a chunk and its stored bytes

MAX_RUN_BYTES = 8 * 2**20  # bytes of neighbouring chunks that one request fetches
UNREAD, ABSENT = -1, -2  # stand for the line of a shard's index; the pixels of an absent shard are all zero


@dataclass(slots=True)
class _Run:
    """Chunks close together in one shard, fetched by one request."""

    shard: int
    start: int
    end: int
    chunks: list[tuple[int, int, int]]  # position among the chunks touched, start within the run, length


class ShardedSource:
    """A pyramid as ``storage.conversion.converter`` writes it; see ``Source``.

    Parameters
    ----------
    location
        Its location, for messages.
    store
        The store of its files.
    counters
        Count what is read.
    root
        The bytes of its root metadata.
    info
        Its parsed root metadata.
    cache
        Keeps chunks, if there is one.
    """

    memory_bytes = 0

    def __init__(
        self,
        location: str,
        store: Store,
        counters: Counters,
        root: bytes,
        info: PyramidInfo,
        cache: ChunkCache | None = None,
    ) -> None:
        self._location, self._store, self._counters, self._cache = location, store, counters, cache
        # The root metadata names the source and has every shard's checksum, so it changes with the content.
        self._cached_prefix = f"{location}\n{hashlib.blake2b(root, digest_size=16).hexdigest()}"
        self.name, self.dtype, self._info = info.name, info.levels[0].layout.dtype, info
        self.nodata, self.bits, self.georeference = info.nodata, info.bits, info.georeference
        self.alpha = info.alpha
        self.channels = name_channels(info.channels, info.levels[0].shape[0])
        known = info.unit == "micrometer"
        self.levels = tuple(_level(level, info.levels[0], known=known) for level in info.levels)
        self._infos = info.levels
        self._keys = [_Keys(level) for level in info.levels]
        self._indexes = [_Indexes(level) for level in info.levels]

    @property
    def identity(self) -> str:
        """Digest of the checksums of all shards; see ``Source``."""
        return self._info.content

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the image into ``out``, chunk by chunk; see ``Source``."""
        info = self._infos[level]
        grid = info.layout.grid
        rows, columns, parts = cut(boxes, (info.shape[1], info.shape[2]), (info.layout.chunk, info.layout.chunk))
        if not parts:
            return
        shard = rows // grid * info.shard_grid[1] + columns // grid
        places = self._find(level, shard, rows % grid * grid + columns % grid)

        def paste(chunk: int, pixels: NDArray[Any]) -> None:
            for b, y0, y1, x0, x1, cy0, cy1, cx0, cx1 in parts[chunk]:
                out[b, :, y0:y1, x0:x1] = pixels[:, cy0:cy1, cx0:cx1]

        def decode(chunk: int, data: bytes) -> None:
            try:
                pixels = decode_chunk(data, info.layout)
            except CorruptImageError as error:
                where = f"chunk ({rows[chunk]}, {columns[chunk]})"
                raise CorruptImageError(f"{self._location}: level {level}, {where}: {error}; convert again") from None
            paste(chunk, pixels)

        stored = places[:, 0] >= 0
        if not stored.all():
            zeros = np.zeros(info.layout.chunk_shape, info.layout.dtype)
            for chunk in np.flatnonzero(~stored).tolist():
                paste(chunk, zeros)
        if self._cache is not None:
            self._from_cache(level, shard, places, stored, decode)
        runs = _group(shard, places, np.flatnonzero(stored), self._store.merge_gap)
        spread(lambda share: self._read(level, share, decode), runs, self._store.threads)

    def close(self) -> None:
        """Close descriptors and connections."""
        self._store.close()

    def _read(self, level: int, runs: list[_Run], decode: Decode) -> None:
        """Fetch runs and decode their chunks."""
        ranges = self._get_ranges(level, [(run.shard, run.start, run.end - run.start) for run in runs])
        for run, data in zip(runs, ranges, strict=True):
            for chunk, start, length in run.chunks:
                own = data[start : start + length]
                decode(chunk, own)
                if self._cache is not None:
                    self._cache.put(self._cached_name(level, run.shard, run.start + start, length), own)
        self._counters.add(
            requests=len(runs),
            read=sum(run.end - run.start for run in runs),
            chunks=sum(len(run.chunks) for run in runs),
        )

    def _from_cache(
        self,
        level: int,
        shard: NDArray[np.int64],
        places: NDArray[np.int64],
        stored: NDArray[np.bool_],
        decode: Decode,
    ) -> None:
        """Decode the chunks that are in the cache, and clear their mark in ``stored``."""
        assert self._cache is not None  # noqa: S101  for the type checker
        found = 0
        for chunk in np.flatnonzero(stored).tolist():
            data = self._cache.get(self._cached_name(level, int(shard[chunk]), *places[chunk].tolist()))
            if data is not None:
                decode(chunk, data)
                stored[chunk] = False
                found += 1
        self._counters.add(chunks=found, cached=found)

    def _find(self, level: int, shard: NDArray[np.int64], inner: NDArray[np.int64]) -> NDArray[np.int64]:
        """(K, 2) offset and length of chunks in their shard, -1 where a chunk is all zeros."""
        indexes = self._indexes[level]
        missing = indexes.missing(shard)

        def work(share: list[int]) -> None:
            for number in share:
                indexes.add(number, self._read_index(level, number))

        spread(work, missing, self._store.concurrency)
        return indexes.find(shard, inner)

    def _read_index(self, level: int, shard: int) -> NDArray[np.int64]:
        """Fetch and check the index of a shard."""
        info, table = self._infos[level], self._indexes[level].table
        length = int(table.length.flat[shard])
        start, size = length - info.layout.index_bytes, info.layout.index_bytes
        where = self._where(level, shard)
        name = self._cached_name(level, shard, start, size)
        kept = self._cache.get(name) if self._cache is not None else None
        tail = kept or next(self._get_ranges(level, [(shard, start, size)]))
        if kept is None:
            self._counters.add(requests=1, read=len(tail))
        try:
            index = decode_index(tail, info.layout, length)
        except CorruptImageError as error:
            raise CorruptImageError(f"{where}: {error}; convert the image again") from None
        if int.from_bytes(tail[-CHECKSUM_BYTES:], "little") != table.index_crc32c.flat[shard]:
            raise CorruptImageError(f"{where}: another shard than the one that was written; convert the image again")
        if self._cache is not None and kept is None:
            self._cache.put(name, tail)
        return index

    def _get_ranges(self, level: int, ranges: list[tuple[int, int, int]]) -> Iterator[bytes]:
        """Fetch ranges of shards: number, start and length each."""
        keys = self._keys[level]
        fetched = self._store.get_ranges([(keys[shard], start, size) for shard, start, size in ranges])
        for shard, _, length in ranges:
            try:
                data = next(fetched)
            except FileNotFoundError:
                raise CorruptImageError(f"{self._where(level, shard)} is missing; convert the image again") from None
            if len(data) != length:
                raise CorruptImageError(f"{self._where(level, shard)} is truncated; convert the image again")
            yield data

    def _where(self, level: int, shard: int) -> str:
        place = divmod(shard, self._infos[level].shard_grid[1])
        return f"{self._location}: level {level}, shard {place}"

    def _cached_name(self, level: int, shard: int, start: int, length: int) -> str:
        """Name of a range of a shard of this very pyramid in the cache."""
        return f"{self._cached_prefix}\n{self._keys[level][shard]}\n{start}\n{length}"


class _Keys(dict[int, str]):
    """Key of each shard of a level by its number, made at first use."""

    def __init__(self, info: LevelInfo) -> None:
        self._info, self._columns = info, info.shard_grid[1]

    def __missing__(self, shard: int) -> str:
        self[shard] = key = self._info.shard_key(*divmod(shard, self._columns))
        return key


class _Indexes:
    """The shard indexes of one level that were read so far; thread safe.

    They are kept in one array, (shards read, chunks of a shard, 2), so that many chunks are looked up at once.
    """

    def __init__(self, info: LevelInfo) -> None:
        self.table = info.table
        self._lock = threading.Lock()
        self._lines = np.empty((0, info.layout.grid**2, 2), np.int64)
        self._line = np.where(self.table.length.ravel() > 0, UNREAD, ABSENT)  # by shard
        self._used = 0

    def missing(self, shards: NDArray[np.int64]) -> list[int]:
        """Those of ``shards`` whose index must be read, each once."""
        unread = shards[self._line[shards] == UNREAD]
        return np.unique(unread).tolist() if len(unread) else []

    def add(self, shard: int, index: NDArray[np.int64]) -> None:
        """Keep the index of a shard."""
        with self._lock:
            if self._used == len(self._lines):
                more = np.empty((max(1, self._used), *self._lines.shape[1:]), np.int64)
                self._lines = np.concatenate([self._lines, more])
            self._lines[self._used] = index
            self._line[shard] = self._used  # last, so that no thread sees an unfinished line
            self._used += 1

    def find(self, shards: NDArray[np.int64], inner: NDArray[np.int64]) -> NDArray[np.int64]:
        """(K, 2) offset and length of chunks by shard and number in the shard, -1 where a chunk is all zeros.

        The indexes of all shards that exist must have been added.
        """
        with self._lock:
            line = self._line[shards]
            absent = line == ABSENT
            if not absent.any():
                return self._lines[line, inner]
            places = np.full((len(shards), 2), -1, np.int64)
            stored = ~absent
            places[stored] = self._lines[line[stored], inner[stored]]
            return places


def _group(shard: NDArray[np.int64], places: NDArray[np.int64], chosen: NDArray[np.int64], gap: int) -> list[_Run]:
    """Group chunks in runs of one shard with at most ``gap`` bytes between neighbours.

    Parameters
    ----------
    shard
        (K,) number of each chunk's shard.
    places
        (K, 2) offset and length.
    chosen
        Positions of the chunks to group.
    gap
        Unneeded bytes that are read to save a request.
    """
    order = chosen[np.lexsort((places[chosen, 0], shard[chosen]))]
    shard, offset, length = shard[order], places[order, 0], places[order, 1]
    between = offset[1:] - (offset + length)[:-1]
    near = (shard[1:] == shard[:-1]) & (between >= 0) & (between <= gap)
    joins = [False, *near.tolist()]
    columns = (order.tolist(), shard.tolist(), offset.tolist(), length.tolist())
    runs: list[_Run] = []
    run = None
    for chunk, number, start, size, joined in zip(*columns, joins, strict=False):
        if run is not None and joined and start + size - run.start <= MAX_RUN_BYTES:
            run.chunks.append((chunk, start - run.start, size))
            run.end = start + size
        else:
            run = _Run(number, start, start + size, [(chunk, 0, size)])
            runs.append(run)
    return runs


def _level(info: LevelInfo, first: LevelInfo, *, known: bool) -> Level:
    return Level(
        shape_yx=(info.shape[1], info.shape[2]),
        downsample=info.scale_yx[0] / first.scale_yx[0],
        mpp=info.scale_yx[0] if known else None,
        chunk=info.layout.chunk,
        shard=info.layout.shard,
        scale_yx=info.scale_yx,
        translation_yx=info.translation_yx,
    )
