"""``Slide``: random boxes of a pyramid, fetching only the chunks they touch.

Notable: many boxes are read at once. The chunks under all of them are found with array arithmetic, each is fetched
and decoded once however many boxes share it, and its parts are copied into all of them. Nothing is ever filled in:
a shard or chunk that the pyramid should have and does not is an error, as is one whose checksum fails.

Shape letters: N boxes, C channels, H height, W width.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from storage.errors import CorruptImageError
from storage.ome_zarr import LevelInfo, parse_pyramid
from storage.shard import decode_chunk, decode_index
from storage.stores import open_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from types import TracebackType

    from numpy.typing import ArrayLike, NDArray

POOL_THREADS = 32
MAX_RUN_BYTES = 8 * 2**20  # of neighbouring chunks fetched by one request


@dataclass(frozen=True, slots=True)
class Level:
    """One level of a slide; level 0 is the finest."""

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

    requests: int = 0  # range reads, or objects fetched whole
    bytes_read: int = 0
    chunks_decoded: int = 0

    def __sub__(self, other: ReadStatistics) -> ReadStatistics:
        return ReadStatistics(
            self.requests - other.requests,
            self.bytes_read - other.bytes_read,
            self.chunks_decoded - other.chunks_decoded,
        )


@dataclass(slots=True)
class _Run:
    """Neighbouring chunks of one shard, fetched by one request; ``chunks`` holds (number, offset, length)."""

    key: str
    start: int
    end: int
    chunks: list[tuple[int, int, int]]


class Slide:
    """A pyramid opened for reading: a folder, or an http, s3 or gs URL.

    A context manager; thread safe; pickles as its location and opens again where it is unpickled.

    Attributes
    ----------
    location : what it was opened with
    name : name of the image
    levels : the levels, finest first
    channels : channel names
    dtype : uint8, uint16 or float32
    mpp : micrometres per pixel of level 0, None where unknown
    shape_yx : height and width of level 0

    Raises
    ------
    MissingImageError, NotAPyramidError, CorruptImageError, TransferError
    """

    def __init__(self, location: str | os.PathLike[str]) -> None:
        self.location = os.fspath(location)
        self._store = open_store(self.location)
        self._lock = threading.Lock()
        self._requests = self._bytes = self._chunks = 0
        self._indexes: dict[str, NDArray[np.int64]] = {}
        info = parse_pyramid(self._get, self._store.name)
        self._infos = info.levels
        self.name = info.name
        self.channels = info.channels
        self.dtype = info.levels[0].layout.dtype
        known = info.unit == "micrometer"
        self.levels = tuple(_level(level, info.levels[0], known=known) for level in info.levels)
        self.mpp = self.levels[0].mpp
        self.shape_yx = self.levels[0].shape_yx

    def read(self, level: int, box: Sequence[int], *, fill: float = 0) -> NDArray[Any]:
        """Read one box.

        Parameters
        ----------
        level
            Number of the level.
        box
            (y, x, h, w) in pixels of that level; it may leave the image.
        fill
            Value of pixels outside the image.

        Returns
        -------
        (C, h, w) array of ``dtype``

        Raises
        ------
        CorruptImageError
            A chunk is missing or damaged.
        """
        pixels: NDArray[Any] = self.read_many(level, [tuple(box)], fill=fill)[0]
        return pixels

    def read_many(self, level: int, boxes: ArrayLike, *, fill: float = 0) -> NDArray[Any]:
        """Read boxes of one size, fetching and decoding each chunk once.

        Parameters
        ----------
        level
            Number of the level.
        boxes
            (N, 4) integers (y, x, h, w) in pixels of that level, all with the same h and w.
        fill
            Value of pixels outside the image.

        Returns
        -------
        (N, C, h, w) array of ``dtype``

        Raises
        ------
        CorruptImageError
            A chunk is missing or damaged.
        """
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level {level} of a slide with {len(self.levels)}")
        boxes = _checked_boxes(boxes)
        info = self._infos[level]
        channels, height, width = info.shape
        if not len(boxes):
            return np.empty((0, channels, 0, 0), self.dtype)
        h, w = int(boxes[0, 2]), int(boxes[0, 3])
        y, x = boxes[:, 0], boxes[:, 1]
        inside = y.min() >= 0 and x.min() >= 0 and y.max() + h <= height and x.max() + w <= width
        shape = (len(boxes), channels, h, w)
        out = np.empty(shape, self.dtype) if inside else np.full(shape, fill, self.dtype)
        if h and w:
            self._fill(level, info, boxes, out)
        return out

    @property
    def statistics(self) -> ReadStatistics:
        """Snapshot of what was read since opening, metadata included."""
        with self._lock:
            return ReadStatistics(self._requests, self._bytes, self._chunks)

    def close(self) -> None:
        """Give descriptors and connections back."""
        self._store.close()
        self._indexes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> tuple[type[Slide], tuple[str]]:
        return (Slide, (self.location,))

    def __repr__(self) -> str:
        return f"Slide({self.location!r})"

    def _fill(self, level: int, info: LevelInfo, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the image into ``out``, chunk by chunk."""
        numbers, parts = _cut(boxes, info)
        if not parts:
            return
        runs, empty = self._locate(level, info, numbers)
        for number in empty:
            for b, y0, y1, x0, x1, _, _ in parts[number]:
                out[b, :, y0:y1, x0:x1] = 0

        def work(share: list[_Run]) -> None:
            buffer = np.empty(info.layout.chunk_shape, info.layout.dtype)
            for run in share:
                data = self._fetch(level, run)
                for number, offset, length in run.chunks:
                    start = offset - run.start
                    try:
                        decode_chunk(data[start : start + length], buffer)
                    except CorruptImageError as error:
                        raise self._damaged(level, info, number, str(error)) from None
                    for b, y0, y1, x0, x1, y, x in parts[number]:
                        out[b, :, y0:y1, x0:x1] = buffer[:, y : y + y1 - y0, x : x + x1 - x0]
            decoded = sum(len(run.chunks) for run in share)
            self._count(requests=len(share), read=sum(run.end - run.start for run in share), chunks=decoded)

        _spread(work, runs, self._store.concurrency)

    def _locate(self, level: int, info: LevelInfo, numbers: NDArray[np.int64]) -> tuple[list[_Run], list[int]]:
        """Group chunks (by number, ascending) in runs of neighbours, and list those that are all zeros."""
        grid = info.layout.grid
        columns = info.shard_grid[1] * grid
        row, column = np.divmod(numbers, columns)
        shard = (row // grid) * info.shard_grid[1] + column // grid
        inner = (row % grid) * grid + column % grid
        order = np.argsort(shard, kind="stable")
        shard, inner, numbers = shard[order], inner[order], numbers[order]
        starts = np.flatnonzero(np.diff(shard, prepend=-1))
        shards = shard[starts].tolist()
        self._load_indexes(level, info, shards)
        runs: list[_Run] = []
        empty: list[int] = []
        for s, a, b in zip(shards, starts.tolist(), [*starts[1:].tolist(), len(numbers)], strict=True):
            key = info.shard_key(*divmod(s, info.shard_grid[1]))
            index = self._indexes.get(key)
            if index is None:
                empty += numbers[a:b].tolist()
                continue
            places = index[inner[a:b]]
            for number, (offset, length) in zip(numbers[a:b].tolist(), places.tolist(), strict=True):
                if offset < 0:
                    empty.append(number)
                else:
                    self._extend(runs, key, number, offset, length)
        return runs, empty

    def _extend(self, runs: list[_Run], key: str, number: int, offset: int, length: int) -> None:
        """Add a chunk to the last run if it lies close behind it, else begin a new run."""
        last = runs[-1] if runs else None
        if last is not None and last.key == key:
            near = 0 <= offset - last.end <= self._store.merge_gap
            if near and offset + length - last.start <= MAX_RUN_BYTES:
                last.chunks.append((number, offset, length))
                last.end = offset + length
                return
        runs.append(_Run(key, offset, offset + length, [(number, offset, length)]))

    def _load_indexes(self, level: int, info: LevelInfo, shards: Iterable[int]) -> None:
        """Read the indexes of shards that were not read yet; empty shards have none."""
        columns = info.shard_grid[1]
        missing = [divmod(s, columns) for s in shards]
        missing = [place for place in missing if info.shard_key(*place) not in self._indexes]
        if info.shards is not None:
            missing = [place for place in missing if info.shards.length[place]]

        def work(share: list[tuple[int, int]]) -> None:
            for place in share:
                self._indexes[info.shard_key(*place)] = self._read_index(level, info, place)

        _spread(work, missing, self._store.concurrency)

    def _read_index(self, level: int, info: LevelInfo, place: tuple[int, int]) -> NDArray[np.int64]:
        key = info.shard_key(*place)
        where = f"{self.location}: level {level}, shard {place}"
        try:
            length = int(info.shards.length[place]) if info.shards is not None else self._store.size(key)
            start = max(0, length - info.layout.index_bytes)
            tail = self._store.get_range(key, start, info.layout.index_bytes)
        except FileNotFoundError:
            raise CorruptImageError(f"{where} is missing; convert the image again") from None
        self._count(requests=1, read=len(tail))
        try:
            index = decode_index(tail, info.layout)
        except CorruptImageError as error:
            raise CorruptImageError(f"{where}: {error}; convert the image again") from None
        ends = index[:, 0] + index[:, 1]
        stored = index[:, 0] >= 0
        if ((index[:, 1] <= 0) | (index[:, 1] > length) | (ends > start))[stored].any():
            raise CorruptImageError(f"{where}: its index points outside it; convert the image again")
        return index

    def _fetch(self, level: int, run: _Run) -> bytes:
        length = run.end - run.start
        try:
            data = self._store.get_range(run.key, run.start, length)
        except FileNotFoundError:
            raise CorruptImageError(f"{self.location}: level {level}, {run.key} is missing") from None
        if len(data) != length:
            raise CorruptImageError(f"{self.location}: level {level}, {run.key} is truncated")
        return data

    def _damaged(self, level: int, info: LevelInfo, number: int, reason: str) -> CorruptImageError:
        place = divmod(number, info.shard_grid[1] * info.layout.grid)
        return CorruptImageError(f"{self.location}: level {level}, chunk {place}: {reason}; convert again")

    def _get(self, key: str) -> bytes:
        data = self._store.get(key)
        self._count(requests=1, read=len(data))
        return data

    def _count(self, *, requests: int = 0, read: int = 0, chunks: int = 0) -> None:
        with self._lock:
            self._requests += requests
            self._bytes += read
            self._chunks += chunks


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


def _checked_boxes(boxes: ArrayLike) -> NDArray[np.int64]:
    array = np.asarray(boxes)
    if array.size == 0:
        return np.empty((0, 4), np.int64)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iu":
        raise ValueError(f"boxes must be (N, 4) integers y, x, h, w, not {array.shape} {array.dtype}")
    array = array.astype(np.int64, copy=False)
    if (array[:, 2:] != array[0, 2:]).any() or (array[0, 2:] < 0).any():
        raise ValueError("boxes must all have the same height and width, not negative")
    return array


def _cut(boxes: NDArray[np.int64], info: LevelInfo) -> tuple[NDArray[np.int64], dict[int, list[list[int]]]]:
    """Cut boxes at chunk borders.

    Returns
    -------
    numbers
        Chunks touched, ascending; a chunk's number is row * (chunk columns of all shards) + column.
    parts
        By chunk number, the parts in it: (box, y0, y1, x0, x1 in the box, y, x in the chunk).
    """
    step = info.layout.chunk
    rows = _cut_axis(boxes[:, 0], int(boxes[0, 2]), info.shape[1], step)  # (N, R) each
    columns = _cut_axis(boxes[:, 1], int(boxes[0, 3]), info.shape[2], step)  # (N, Q) each
    n, r, q = np.nonzero((rows.stop > rows.start)[:, :, None] & (columns.stop > columns.start)[:, None, :])
    if not len(n):
        return n, {}
    per_row = info.shard_grid[1] * info.layout.grid
    number = rows.chunk[n, r] * per_row + columns.chunk[n, q]
    table = np.stack(
        [
            n,
            rows.start[n, r],
            rows.stop[n, r],
            columns.start[n, q],
            columns.stop[n, q],
            rows.inner[n, r],
            columns.inner[n, q],
        ],
        axis=1,
    )
    order = np.argsort(number, kind="stable")
    number = number[order]
    lines = table[order].tolist()
    starts = np.flatnonzero(np.diff(number, prepend=-1))
    numbers = number[starts]
    ends = [*starts[1:].tolist(), len(lines)]
    parts = {c: lines[a:b] for c, a, b in zip(numbers.tolist(), starts.tolist(), ends, strict=True)}
    return numbers, parts


@dataclass(frozen=True, slots=True)
class _AxisParts:
    """Parts of boxes along one axis, (N, K) each; where ``stop <= start`` there is none."""

    chunk: NDArray[np.int64]
    start: NDArray[np.int64]  # in the box
    stop: NDArray[np.int64]
    inner: NDArray[np.int64]  # in the chunk


def _cut_axis(begin: NDArray[np.int64], extent: int, size: int, step: int) -> _AxisParts:
    """Cut ``begin .. begin + extent`` (N boxes) at multiples of ``step`` within ``0 .. size``."""
    first = np.maximum(begin, 0) // step
    count = (extent + step - 2) // step + 1
    chunk = first[:, None] + np.arange(count)
    low = np.maximum(chunk * step, begin[:, None])
    low = np.maximum(low, 0)
    high = np.minimum(np.minimum((chunk + 1) * step, begin[:, None] + extent), size)
    return _AxisParts(chunk, low - begin[:, None], high - begin[:, None], low - chunk * step)


@cache
def _pool() -> ThreadPoolExecutor:
    """Threads shared by all slides of this process."""
    return ThreadPoolExecutor(POOL_THREADS, thread_name_prefix="storage-read")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child inherits the pool without its threads


def _spread(work: Callable[[list[Any]], None], items: list[Any], concurrency: int) -> None:
    """Run ``work`` on shares of ``items`` in up to ``concurrency`` threads; the first error is raised."""
    shares = min(concurrency, len(items))
    if shares <= 1:
        if items:
            work(items)
        return
    futures = [_pool().submit(work, items[i::shares]) for i in range(shares)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise errors[0]
