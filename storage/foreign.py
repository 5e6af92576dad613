"""OME-Zarr images of other writers, read with zarr-python: any chunks, codecs and shards that it knows.

Notable: slower than our own pyramids, and trusting where those are not. Zarr says that a chunk that is absent holds
the fill value, and nothing lists the chunks that should be there, so an absent one is filled in; damage is found only
where a codec has a checksum or fails to decode.

Shape letters: N boxes, C channels.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import zarr
from zarr.abc.store import SuffixByteRequest
from zarr.storage import LocalStore, ObjectStore, WrapperStore

from storage.boxes import cut
from storage.errors import CorruptImageError, NotAPyramidError, StorageError, TransferError
from storage.limits import LIMITS
from storage.ome_zarr import DTYPES
from storage.source import Level, name_channels
from storage.stores import BACKOFF_S, RETRIES, check_not_forked, connect, first_line, was_cut
from storage.threads import spread

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray
    from zarr.abc.store import ByteRequest, Store
    from zarr.core.buffer import Buffer, BufferPrototype

    from storage.ngff import Dataset, Multiscale
    from storage.source import Counters

    Array = zarr.Array[Any]

T = TypeVar("T", int, float)
LOCAL_CONCURRENCY, URL_CONCURRENCY = 4, 16  # chunks in flight


class ForeignSource:
    """An image that another program wrote; see ``Source``.

    Raises
    ------
    NotAPyramidError
        It is of a kind that is not read.
    CorruptImageError
        A level is missing, or its metadata is damaged.
    TransferError
    """

    memory_bytes = 0

    def __init__(self, location: str, counters: Counters, image: Multiscale) -> None:
        self._location, self._counters, self._axes = location, counters, image.axes
        self._concurrency = URL_CONCURRENCY if "://" in location else LOCAL_CONCURRENCY
        self._store = _CountingStore(_zarr_store(location), counters, location)
        arrays: dict[str, Array] = {}

        def work(share: list[Dataset]) -> None:
            for dataset in share:
                arrays[dataset.path] = self._open(dataset.path, image.zarr_format)

        spread(work, list(image.datasets), self._concurrency)
        self._arrays = [arrays[dataset.path] for dataset in image.datasets]
        for dataset, array in zip(image.datasets, self._arrays, strict=True):
            self._check(dataset, array)
        self.name = image.name
        self.dtype = self._arrays[0].dtype.newbyteorder("=")
        self.channels = name_channels(image.labels, self._size(self._arrays[0], "c"))
        self.levels = tuple(self._level(image, i) for i in range(len(self._arrays)))

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the image into ``out``, chunk by chunk, each fetched once; see ``Source``."""
        array = self._arrays[level]
        chunk_yx = self._yx(array.chunks)
        rows, columns, parts = cut(boxes, self.levels[level].shape_yx, chunk_yx)

        def work(share: list[int]) -> None:
            for i in share:
                pixels = self._read(level, int(rows[i]), int(columns[i]))
                for b, y0, y1, x0, x1, cy0, cy1, cx0, cx1 in parts[i]:
                    out[b, :, y0:y1, x0:x1] = pixels[:, cy0:cy1, cx0:cx1]

        spread(work, list(range(len(parts))), self._concurrency)
        stacked = math.ceil(len(self.channels) / array.chunks[self._axes.index("c")]) if "c" in self._axes else 1
        self._counters.add(chunks=len(parts) * stacked)

    def close(self) -> None:
        """Nothing to give back: connections close with the object."""

    def _open(self, path: str, zarr_format: int) -> Array:
        where = f"{self._location}: level {path!r}"
        try:
            return zarr.open_array(self._store, path=path, mode="r", zarr_format=zarr_format)  # type: ignore[arg-type]
        except StorageError:
            raise
        except FileNotFoundError:
            raise CorruptImageError(f"{where} is missing") from None
        except Exception as error:
            raise NotAPyramidError(f"{where} is no array that zarr-python reads ({first_line(error)})") from error

    def _check(self, dataset: Dataset, array: Array) -> None:
        """See that an array is one that this class reads, and as large as it may be."""
        where = f"{self._location}: level {dataset.path!r}"
        first = self._arrays[0]
        if array.dtype.newbyteorder("=").name not in DTYPES:
            raise NotAPyramidError(f"{where} holds {array.dtype}; only {', '.join(DTYPES)} are read")
        if len(array.shape) != len(self._axes) or array.dtype != first.dtype or min(array.shape) < 1:
            raise CorruptImageError(f"{where} is {array.shape} {array.dtype}, unlike what the image says")
        for axis in "tz":
            if self._size(array, axis) > 1:
                raise NotAPyramidError(
                    f"{where} has {self._size(array, axis)} planes along {axis}; store one of them as an image"
                )
        if self._size(array, "c") != self._size(first, "c"):
            raise CorruptImageError(f"{where} has other channels than level 0")
        if math.prod(array.shape) > LIMITS.samples or max(array.shape) > LIMITS.side:
            raise NotAPyramidError(f"{where} has the shape {array.shape}, larger than images that are read")
        decoded = math.prod(array.chunks) * array.dtype.itemsize
        if decoded > LIMITS.segment_bytes:
            raise NotAPyramidError(
                f"{where} has chunks of {decoded} bytes, over {LIMITS.segment_bytes}; store it in smaller chunks"
            )

    def _read(self, level: int, row: int, column: int) -> NDArray[Any]:
        """(C, h, w) pixels of one chunk, all channels, as far as it lies inside the image."""
        array = self._arrays[level]
        height, width = self._yx(array.chunks)
        at = {
            "y": slice(row * height, (row + 1) * height),
            "x": slice(column * width, (column + 1) * width),
            "c": slice(None),
        }
        try:
            pixels = np.asarray(array[tuple(at.get(axis, 0) for axis in self._axes)])
        except StorageError:
            raise
        except Exception as error:  # each codec has its own
            raise CorruptImageError(
                f"{self._location}: level {level}, chunk ({row}, {column}) is damaged ({first_line(error)})"
            ) from error
        kept = [axis for axis in self._axes if axis in at]
        pixels = pixels.transpose([kept.index(axis) for axis in "cyx" if axis in kept])
        return pixels if "c" in kept else pixels[None]

    def _level(self, image: Multiscale, number: int) -> Level:
        """The level as slides tell it, where its scale agrees with its size."""
        array, dataset, first = self._arrays[number], image.datasets[number], image.datasets[0]
        shape_yx, base_yx = self._yx(array.shape), self._yx(self._arrays[0].shape)
        scale_yx, finest_yx = self._yx(dataset.scale), self._yx(first.scale)
        down_y, down_x = scale_yx[0] / finest_yx[0], scale_yx[1] / finest_yx[1]
        fits = all(
            abs(size * down - base) <= 2 * down
            for size, down, base in zip(shape_yx, (down_y, down_x), base_yx, strict=True)
        )
        if not fits or abs(down_y / down_x - 1) * max(shape_yx) >= 1 or (number and down_y <= 1):
            raise NotAPyramidError(
                f"{self._location}: level {number} of {shape_yx} pixels is said to be level 0 of {base_yx} pixels "
                f"scaled by {down_y:g}, {down_x:g}; correct the scales in its metadata"
            )
        # Without a unit that is known, positions are told in pixels of level 0.
        unit_y, unit_x = image.micrometers_yx or (1 / finest_yx[0], 1 / finest_yx[1])
        first_yx = self._yx(dataset.translation)
        scale_yx = (scale_yx[0] * unit_y, scale_yx[1] * unit_x)
        return Level(
            shape_yx=shape_yx,
            downsample=down_y,
            mpp=scale_yx[0] if image.micrometers_yx else None,
            chunk=max(self._yx(array.chunks)),
            shard=max(self._yx(array.shards or array.chunks)),
            scale_yx=scale_yx,
            translation_yx=(first_yx[0] * unit_y, first_yx[1] * unit_x),
        )

    def _yx(self, by_axis: tuple[T, ...]) -> tuple[T, T]:
        return by_axis[self._axes.index("y")], by_axis[self._axes.index("x")]

    def _size(self, array: Array, axis: str) -> int:
        return int(array.shape[self._axes.index(axis)]) if axis in self._axes else 1


class _CountingStore(WrapperStore["Store"]):
    """Counts what zarr reads, keeps the ends of files that it asks for (shard indexes), and fails with our errors."""

    def __init__(self, store: Store, counters: Counters, location: str) -> None:
        super().__init__(store)
        self._counters, self._location = counters, location
        self._ends: dict[tuple[str, int], asyncio.Task[Buffer | None]] = {}

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return an object or a range of it, None if it is absent."""
        if not isinstance(byte_range, SuffixByteRequest):
            return await self._fetch(key, prototype, byte_range)
        # All of zarr's requests run on one event loop, so that there is no other thread to mind.
        name = (key, byte_range.suffix)
        if name not in self._ends:
            self._ends[name] = asyncio.ensure_future(self._fetch(key, prototype, byte_range))
        try:
            return await self._ends[name]
        except BaseException:
            self._ends.pop(name, None)  # to be asked again
            raise

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several ranges, each counted."""
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _fetch(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None) -> Buffer | None:
        if "://" in self._location:
            check_not_forked(self._location)
        for repeat in range(RETRIES + 1):
            try:
                data = await self._store.get(key, prototype, byte_range)
            except Exception as error:  # each kind of store has its own
                if repeat == RETRIES or not was_cut(error):
                    raise TransferError(
                        f"{self._location}/{key}: the request failed ({first_line(error)})"
                    ) from error
                await asyncio.sleep(BACKOFF_S * 2**repeat)
            else:
                self._counters.add(requests=1, read=0 if data is None else len(data))
                return data
        raise AssertionError("the last attempt returns or raises")


def _zarr_store(location: str) -> Store:
    if "://" in location:
        return ObjectStore(connect(location), read_only=True)
    return LocalStore(location, read_only=True)
