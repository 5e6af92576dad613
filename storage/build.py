"""Builds the shards of a pyramid: one task per shard, run by Dask.

A level-0 task reads its box from the source; a task of a coarser level decodes its up to four children and averages
them. Tasks hand on receipts only, never pixels, and depend on nothing but files: so each can be repeated, skipped
when its shard is already there, or run elsewhere, and memory is a few shards per worker whatever the image's size.
A compressed TIFF in long strips is first decoded in bands of shard height to scratch files, each strip once.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from storage.shard import decode_shard, encode_shard

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from storage.ome_zarr import LevelInfo
    from storage.target import PartialPyramid, Receipt

ShardKey = tuple[int, int, int]  # level, row, column
# Tasks by name, each with the names of those it depends on; besides shards, bands are filled and dropped.
Graph = dict["Hashable", "tuple[Callable[[], None], Sequence[Hashable]]"]
BLOCK_ROWS = 128  # averaged at once
SUM_TYPES = {"uint8": np.uint16, "uint16": np.uint32, "float32": np.float32}  # of four pixels
BAND_READ_BYTES = 32 * 2**20  # decoded at once when a band is filled


class PixelSource(Protocol):
    """Where level 0 comes from; ``read`` must be thread safe."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels, in native byte order."""
        ...

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Return the (C, h, w) pixels of a box inside the image."""
        ...


@dataclass(frozen=True)
class ArraySource:
    """A (C, H, W) array in memory."""

    array: NDArray[Any]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W)."""
        channels, height, width = self.array.shape
        return (channels, height, width)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the pixels."""
        return self.array.dtype

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Return a view of the box."""
        return self.array[:, y : y + h, x : x + w]


class Bands:
    """Bands of ``rows`` image rows decoded to scratch files, cut in columns as wide as a shard.

    A band's file holds, one after another, the (C, band rows, column width) blocks of its columns, so that one shard
    is one read. Bands are as high as a shard, or higher where one strip is.
    """

    def __init__(self, source: PixelSource, folder: Path, shard: int, segment_rows: int) -> None:
        self.rows = shard * -(-segment_rows // shard)
        self._source = source
        self._folder = folder
        self._shard = shard
        self._segment_rows = segment_rows

    def fill(self, band: int) -> None:
        """Decode one band, each of its strips once."""
        channels, height, width = self._source.shape
        top, bottom = band * self.rows, min((band + 1) * self.rows, height)
        row_bytes = channels * width * self._source.dtype.itemsize
        step = max(1, BAND_READ_BYTES // (row_bytes * self._segment_rows)) * self._segment_rows
        self._folder.mkdir(exist_ok=True)
        with open(self._path(band), "wb", buffering=0) as file:
            y = top
            while y < bottom:
                y1 = min((y // step + 1) * step, bottom)  # strips end at multiples of their height
                self._store(file.fileno(), self._source.read(y, 0, y1 - y, width), y - top, bottom - top)
                y = y1

    def _store(self, fd: int, pixels: NDArray[Any], row: int, band_rows: int) -> None:
        channels, _, width = pixels.shape
        item = pixels.itemsize
        for x in range(0, width, self._shard):
            columns = min(self._shard, width - x)
            for c in range(channels):
                block = np.ascontiguousarray(pixels[c, :, x : x + columns])
                position = (channels * band_rows * x + (c * band_rows + row) * columns) * item
                _pwrite_all(fd, block.data.cast("B"), position)

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Return the (C, h, w) pixels of a shard; the box must be a shard's."""
        channels, height, _ = self._source.shape
        band = y // self.rows
        band_rows = min(self.rows, height - band * self.rows)
        dtype = self._source.dtype
        out = np.empty((channels, h, w), dtype)
        with open(self._path(band), "rb", buffering=0) as file:
            for c in range(channels):
                start = channels * band_rows * x + (c * band_rows + y - band * self.rows) * w
                _pread_all(file.fileno(), out[c].data.cast("B"), start * dtype.itemsize)
        return out

    def drop(self, band: int) -> None:
        """Delete a band whose shards are all written."""
        self._path(band).unlink(missing_ok=True)

    def _path(self, band: int) -> Path:
        return self._folder / f"band-{band}"


@dataclass
class Build:
    """One pyramid under construction: its levels, where level 0 comes from, where shards go.

    ``done`` holds the receipts of finished shards, those of an earlier run included.
    """

    source: PixelSource
    levels: tuple[LevelInfo, ...]
    partial: PartialPyramid
    bands: Bands | None = None
    progress: Callable[[int, int], None] | None = None
    done: dict[ShardKey, Receipt] = field(default_factory=dict)
    _done_bytes: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, workers: int) -> list[Receipt]:
        """Build every shard that is not done yet and return the receipts of all, finest level first."""
        for key in self.done:
            self._report(key)
        graph = self.graph()
        single = all(level.shard_grid == (1, 1) for level in self.levels)
        if workers == 1 or single:  # a chain of tasks is run here: Dask's threads would gain nothing
            for action, _ in graph.values():
                action()
        else:
            _run_dask(graph, workers)
        return [self.done[key] for key in self.keys()]

    def keys(self) -> list[ShardKey]:
        """All shards, children before their parents."""
        grids = [level.shard_grid for level in self.levels]
        return [(i, y, x) for i, (rows, columns) in enumerate(grids) for y in range(rows) for x in range(columns)]

    def children(self, key: ShardKey) -> list[ShardKey]:
        """Return the one to four shards of the next finer level that a shard is averaged from."""
        level, y, x = key
        if level == 0:
            return []
        rows, columns = self.levels[level - 1].shard_grid
        return [
            (level - 1, i, j)
            for i in range(2 * y, min(2 * y + 2, rows))
            for j in range(2 * x, min(2 * x + 2, columns))
        ]

    def graph(self) -> Graph:
        """Tasks left to do, in an order in which they can be run, each with the tasks it depends on."""
        todo = [key for key in self.keys() if key not in self.done]
        graph: Graph = {key: (partial(self.build, key), self.children(key)) for key in todo}
        return graph if self.bands is None else self._with_bands(graph, self.bands)

    def _with_bands(self, graph: Graph, bands: Bands) -> Graph:
        """Add the filling of each band before its shards, and its deletion after them.

        A band waits for the deletion of the last but one before it, so that at most two fill the disk.
        """
        shard = self.levels[0].layout.shard
        by_band: dict[int, Graph] = {}
        for key in [key for key in self.keys() if key[0] == 0 and key in graph]:
            band = key[1] * shard // bands.rows
            by_band.setdefault(band, {})[key] = (graph.pop(key)[0], [("fill", band)])
        banded: Graph = {}
        order = list(by_band)
        for number, band in enumerate(order):
            after: list[Hashable] = [("drop", order[number - 2])] if number > 1 else []
            banded[("fill", band)] = (partial(bands.fill, band), after)
            banded |= by_band[band]
            banded[("drop", band)] = (partial(bands.drop, band), list(by_band[band]))
        return banded | graph

    def build(self, key: ShardKey) -> None:
        """Compute, encode and store one shard."""
        level, y, x = key
        info = self.levels[level]
        pixels = self._read_source(key) if level == 0 else self._average_children(key)
        encoded = encode_shard(pixels, info.layout)
        receipt = self.partial.write_shard(level, y, x, encoded)
        self.done[key] = receipt
        self._report(key)

    def _report(self, key: ShardKey) -> None:
        """Count a finished shard and tell the progress callback, from one thread at a time."""
        info = self.levels[key[0]]
        pixel_bytes = info.shape[0] * info.layout.dtype.itemsize
        with self._lock:
            self._done_bytes += pixel_bytes * math.prod(info.shard_shape(key[1], key[2]))
            if self.progress is not None:
                self.progress(self._done_bytes, sum(level.nbytes for level in self.levels))

    def _read_source(self, key: ShardKey) -> NDArray[Any]:
        _, y, x = key
        info = self.levels[0]
        source = self.bands or self.source
        return source.read(y * info.layout.shard, x * info.layout.shard, *info.shard_shape(y, x))

    def _average_children(self, key: ShardKey) -> NDArray[Any]:
        level, y, x = key
        info, finer = self.levels[level], self.levels[level - 1]
        pixels = np.zeros((info.shape[0], *info.shard_shape(y, x)), info.layout.dtype)
        half = finer.layout.shard // 2
        for child in self.children(key):
            if self.done[child].empty:
                continue
            _, i, j = child
            data = self.partial.read(self.done[child].key)
            part = downsample(decode_shard(data, finer.layout, finer.shard_shape(i, j)))
            top, left = (i - 2 * y) * half, (j - 2 * x) * half
            pixels[:, top : top + part.shape[1], left : left + part.shape[2]] = part
        return pixels


def _run_dask(graph: Graph, workers: int) -> None:
    """Run a graph on threads; on an error or an interrupt, wait for the tasks in flight, start no others."""
    from dask.threaded import get

    tasks = {key: (_call, action, [d for d in needs if d in graph]) for key, (action, needs) in graph.items()}
    pool = ThreadPoolExecutor(workers, thread_name_prefix="storage-convert")
    try:
        get(tasks, list(tasks), pool=pool, num_workers=workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _call(action: Callable[[], None], _needs: object) -> None:
    action()


def downsample(pixels: NDArray[Any]) -> NDArray[Any]:
    """Mean of 2x2 pixels.

    Parameters
    ----------
    pixels
        (C, H, W) uint8, uint16 or float32.

    Returns
    -------
    (C, ceil(H / 2), ceil(W / 2)) of the same type
        Integers are rounded half up, ``(a + b + c + d + 2) >> 2``. At an odd edge the mean is over the one or two
        pixels there are, which is what repeating the edge gives.
    """
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    channels, height, width = pixels.shape
    out = np.empty((channels, height // 2, width // 2), pixels.dtype)
    for c in range(channels):
        for y in range(0, height, BLOCK_ROWS):  # in parts that stay in the processor's cache
            _mean_2x2(pixels[c, y : y + BLOCK_ROWS], out[c, y // 2 : (y + BLOCK_ROWS) // 2])
    return out


def _mean_2x2(pixels: NDArray[Any], out: NDArray[Any]) -> None:
    """Average (H, W) into (H / 2, W / 2), both even: first pairs of rows, which lie side by side in memory."""
    rows = np.add(pixels[0::2], pixels[1::2], dtype=SUM_TYPES[pixels.dtype.name])
    total = rows[:, 0::2] + rows[:, 1::2]
    if total.dtype.kind == "f":
        np.multiply(total, np.float32(0.25), out=out)
    else:
        total += 2
        np.right_shift(total, 2, out=out, casting="unsafe")


def _pwrite_all(fd: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(fd, data, position)
        data, position = data[written:], position + written


def _pread_all(fd: int, out: memoryview, position: int) -> None:
    while out:
        count = os.preadv(fd, [out], position)
        if count == 0:
            raise OSError(f"a scratch file ended early at {position}")
        out, position = out[count:], position + count
