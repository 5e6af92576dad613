"""Builds the shards of a pyramid in waves of small tasks that can run anywhere.

A task makes shards of one level and, in a large image, the shard of the next level that is the average of 2x2 of
them, so that pixels are averaged while they are in memory and only every second level is read back. Tasks of a wave
depend on files of earlier waves only, never on each other; they are picklable, hand back receipts and no pixels, and
can be repeated. Memory is thus a few shards per worker whatever the image's size, and any executor can run them: see
``storage.conversion.executors``. A compressed TIFF in long strips is first decoded, band by band, to scratch files.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from storage.conversion.receipts import Receipt, by_place
from storage.errors import ConversionError, CorruptImageError, StorageError
from storage.format.shard import decode_shard, encode_shard
from storage.images.halving import downsample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from storage.conversion.receipts import ShardKey
    from storage.format.ome_zarr import LevelInfo
    from storage.place.stores import Store

PAIRED_SHARDS = 64  # of level 0, from which on there are tasks enough for tasks of five shards
BAND_READ_BYTES = 32 * 2**20  # decoded at once when a band is filled


class PixelSource(Protocol):
    """Where level 0 comes from; ``read`` must be thread safe, and the source picklable to leave this process."""

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


@dataclass(frozen=True)
class Bands:
    """Bands of image rows decoded to scratch files, cut in columns as wide as a shard.

    A band's file holds, one after another, the (C, band rows, column width) blocks of its columns, so that one shard
    is one read. Bands hold whole rows of tasks, and at least one strip.
    """

    source: PixelSource
    folder: Path
    shard: int
    segment_rows: int

    @property
    def rows(self) -> int:
        """Height of a band."""
        return 2 * self.shard * -(-self.segment_rows // (2 * self.shard))

    def fills(self, band: int) -> list[Fill]:
        """Return the tasks that decode a band; none cuts a strip in two, but for those at the band's own ends."""
        channels, height, width = self.source.shape
        row_bytes = channels * width * self.source.dtype.itemsize
        step = max(1, BAND_READ_BYTES // (row_bytes * self.segment_rows)) * self.segment_rows
        top, bottom = band * self.rows, min((band + 1) * self.rows, height)
        cuts = [top, *range((top // step + 1) * step, bottom, step), bottom]
        return [Fill(band, y0, y1) for y0, y1 in pairwise(cuts)]

    def fill(self, band: int, y0: int, y1: int) -> None:
        """Decode rows ``y0 .. y1`` of the image into a band."""
        channels, height, width = self.source.shape
        top = band * self.rows
        band_rows = min(self.rows, height - top)
        pixels = self.source.read(y0, 0, y1 - y0, width)
        self.folder.mkdir(exist_ok=True)
        fd = os.open(self.path(band), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            for x in range(0, width, self.shard):
                columns = min(self.shard, width - x)
                for c in range(channels):
                    block = np.ascontiguousarray(pixels[c, :, x : x + columns])
                    place = channels * band_rows * x + (c * band_rows + y0 - top) * columns
                    _pwrite_all(fd, block.data.cast("B"), place * pixels.itemsize)
        finally:
            os.close(fd)

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Return the (C, h, w) pixels of a shard; the box must be a shard's."""
        channels, height, _ = self.source.shape
        band = y // self.rows
        band_rows = min(self.rows, height - band * self.rows)
        out = np.empty((channels, h, w), self.source.dtype)
        with open(self.path(band), "rb", buffering=0) as file:
            for c in range(channels):
                place = channels * band_rows * x + (c * band_rows + y - band * self.rows) * w
                _pread_all(file.fileno(), out[c].data.cast("B"), place * out.itemsize)
        return out

    def path(self, band: int) -> Path:
        """File of a band."""
        return self.folder / f"band-{band}"


@dataclass(frozen=True, slots=True)
class Fill:
    """Task: decode rows of the image into a band."""

    band: int
    y0: int
    y1: int

    def run(self, job: Job) -> list[Receipt]:
        """Do it; there is nothing to report."""
        assert job.bands is not None  # noqa: S101  there would be no such task
        job.bands.fill(self.band, self.y0, self.y1)
        return []


@dataclass(frozen=True, slots=True)
class Block:
    """Task: make neighbouring shards of one level and, unless ``parent`` is None, the shard that is their average.

    ``finer`` are the receipts of the shards of the level before, of which ``keys`` are made (none at level 0);
    ``done`` those of the block's own shards that an earlier run has made, which are read instead.
    """

    keys: tuple[ShardKey, ...]
    parent: ShardKey | None
    finer: tuple[Receipt, ...]
    done: tuple[Receipt, ...]

    def run(self, job: Job) -> list[Receipt]:
        """Make the shards that are missing and return their receipts."""
        done, finer = by_place(self.done), by_place(self.finer)
        made: list[Receipt] = []
        average = Average(job, self.parent) if self.parent else None
        for key in self.keys:
            if key in done:
                pixels = job.read_back(done[key])
            else:
                pixels = _average(job, key, finer) if key[0] else job.read_source(key)
                made.append(job.write(key, pixels, read_again=average is None))
            if average is not None:
                average.add(key, pixels)
        if average is not None and average.key not in done:
            made.append(job.write(average.key, average.pixels))
        return made


def _average(job: Job, key: ShardKey, finer: dict[ShardKey, Receipt]) -> NDArray[Any] | None:
    """Pixels of a shard from the files of the finer level."""
    average = Average(job, key)
    for child in children(job.levels, key):
        average.add(child, job.read_back(finer[child]))
    return average.pixels


class Average:
    """A shard filled with the averages of those of the finer level; ``pixels`` is None while all are zeros."""

    def __init__(self, job: Job, key: ShardKey) -> None:
        self.key = key
        self.pixels: NDArray[Any] | None = None
        self._info, self._nodata, self._alpha = job.levels[key[0]], job.nodata, job.alpha

    def add(self, child: ShardKey, pixels: NDArray[Any] | None) -> None:
        """Average the (C, h, w) pixels of one of the four; None stands for zeros."""
        if pixels is None:
            return
        _, y, x = self.key
        if self.pixels is None:
            self.pixels = np.zeros((self._info.shape[0], *self._info.shard_shape(y, x)), self._info.layout.dtype)
        half = self._info.layout.shard // 2
        top, left = (child[1] - 2 * y) * half, (child[2] - 2 * x) * half
        part = self.pixels[:, top : top + half, left : left + half]
        downsample(pixels, out=part, nodata=self._nodata, alpha=self._alpha)


@dataclass(frozen=True)
class Job:
    """What every worker needs to run tasks: where pixels come from and where shards go."""

    source: PixelSource
    levels: tuple[LevelInfo, ...]
    output: Store
    bands: Bands | None = None
    target: str = ""  # as messages name it
    nodata: float | None = None  # value of pixels that hold no data
    alpha: int | None = None  # channel whose zeros say that no channel holds data there

    def attempt(self, task: Task) -> list[Receipt] | Exception:
        """Run a task; errors of files and disks are returned, so that they cross processes as they are."""
        try:
            return task.run(self)
        except (StorageError, OSError) as error:
            return error

    def read_source(self, key: ShardKey) -> NDArray[Any]:
        """Return the (C, h, w) pixels of a shard of level 0."""
        _, y, x = key
        shard = self.levels[0].layout.shard
        return (self.bands or self.source).read(y * shard, x * shard, *self.levels[0].shard_shape(y, x))

    def read_back(self, receipt: Receipt) -> NDArray[Any] | None:
        """Return the pixels of a shard that was made before; None for zeros."""
        if receipt.empty:
            return None
        level = self.levels[receipt.level]
        try:
            data = self.output.get(receipt.key, receipt.length)
            return decode_shard(data, level.layout, level.shard_shape(receipt.y, receipt.x))
        except CorruptImageError as error:
            where = f"{self.target}: {receipt.key}"
            raise ConversionError(f"{where} was damaged after it was written ({error}); convert again") from error

    def write(self, key: ShardKey, pixels: NDArray[Any] | None, *, read_again: bool = True) -> Receipt:
        """Encode and store a shard; one of zeros is not stored."""
        encoded = None if pixels is None else encode_shard(pixels, self.levels[key[0]].layout)
        if encoded is None or not encoded.pieces:
            return Receipt(*key, length=0, crc32=0, index_crc32c=0)
        index_crc32c = int.from_bytes(encoded.pieces[-1], "little")  # ends the file
        path = self.levels[key[0]].shard_key(*key[1:])
        tag = self.output.put(path, encoded.pieces, if_absent=True, read_again=read_again)
        return Receipt(*key, encoded.length, encoded.crc32, index_crc32c, tag)


Task = Fill | Block


def build(
    job: Job,
    done: dict[ShardKey, Receipt],
    run: Callable[[Sequence[Task], Callable[[list[Receipt]], None]], None],
    on_made: Callable[[list[Receipt]], None],
) -> list[Receipt]:
    """Build every shard that is not ``done`` and return the receipts of all, finest level first.

    Parameters
    ----------
    job
        Levels, source and output.
    done
        Shards of an earlier run; the new ones are added.
    run
        Runs the tasks of a wave in any order, calling its second argument with what each returns.
    on_made
        Called in this thread with the receipts of each finished task.
    """

    def finish(receipts: list[Receipt]) -> None:
        done.update(by_place(receipts))
        on_made(receipts)

    step = 2 if math.prod(job.levels[0].shard_grid) >= PAIRED_SHARDS else 1
    for level in range(0, len(job.levels), step):
        blocks = _blocks(job, level, done, paired=step == 2)
        if level or job.bands is None:
            run(blocks, finish)
            continue
        for band, wave in _by_band(blocks, job.bands).items():
            run(job.bands.fills(band), finish)
            run(wave, finish)
            job.bands.path(band).unlink(missing_ok=True)
    return [done[key] for key in shard_keys(job.levels)]


def _blocks(job: Job, level: int, done: dict[ShardKey, Receipt], *, paired: bool) -> list[Block]:
    """Blocks of a level that lack a shard: 2x2 shards and their parent if ``paired``, else single shards."""
    last = level == len(job.levels) - 1
    rows, columns = job.levels[level if last or not paired else level + 1].shard_grid
    blocks = []
    for y in range(rows):
        for x in range(columns):
            parent = None if last or not paired else (level + 1, y, x)
            keys = tuple(children(job.levels, parent)) if parent else ((level, y, x),)
            own = (*keys, parent) if parent else keys
            if all(key in done for key in own):
                continue
            finer = tuple(done[child] for key in keys for child in children(job.levels, key))
            blocks.append(Block(keys, parent, finer, tuple(done[key] for key in own if key in done)))
    return blocks


def _by_band(blocks: list[Block], bands: Bands) -> dict[int, list[Block]]:
    """Group the blocks of level 0, which come row by row, by the band that they are cut from."""
    grouped: dict[int, list[Block]] = {}
    for block in blocks:
        grouped.setdefault(block.keys[0][1] * bands.shard // bands.rows, []).append(block)
    return grouped


def shard_keys(levels: Sequence[LevelInfo]) -> list[ShardKey]:
    """All shards, finest level first, row by row."""
    grids = [level.shard_grid for level in levels]
    return [(i, y, x) for i, (rows, columns) in enumerate(grids) for y in range(rows) for x in range(columns)]


def children(levels: Sequence[LevelInfo], key: ShardKey) -> list[ShardKey]:
    """Return the one to four shards of the next finer level that a shard is averaged from; none at level 0."""
    level, y, x = key
    if level == 0:
        return []
    rows, columns = levels[level - 1].shard_grid
    return [
        (level - 1, i, j) for i in range(2 * y, min(2 * y + 2, rows)) for j in range(2 * x, min(2 * x + 2, columns))
    ]


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
