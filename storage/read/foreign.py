"""OME-Zarr images of other writers, zarr v2 and v3: chunks of any shape, in shards or not, by the codecs on our list.

Notable: this is less strict than the reader of our own pyramids. Zarr says that an absent chunk holds the fill value,
and nothing lists the chunks that should exist, so an absent one is filled in; damage is found only where a codec has
a checksum or fails to decode. Sizes in metadata are never trusted: see ``storage.format.zarr_array``.

Shape letters: N boxes, C channels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from storage.errors import CorruptImageError, NotAPyramidError, TransferError
from storage.format.levels import Level, check_levels, name_channels
from storage.format.zarr_array import ZarrArray, read_array
from storage.limits import LIMITS
from storage.place.objects import first_line
from storage.read.boxes import cut
from storage.threads import spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray

    from storage.format.georeference import Georeference
    from storage.format.ngff import Dataset, Multiscale
    from storage.format.zarr_array import Place
    from storage.place.stores import Store
    from storage.read.source import Counters

T = TypeVar("T", int, float)
MIN_CONCURRENCY = 4  # chunks decoded at the same time; other codecs are slower than ours
ABSENT = 2**64 - 1  # offset and length of a chunk that is not in its shard
MAX_OFFSET = 2**62


class ForeignSource:
    """An image that another program wrote; see ``Source``.

    Raises
    ------
    NotAPyramidError
        The image is of a kind that is not read.
    CorruptImageError
        A level is missing, or its metadata is damaged.
    TransferError
    """

    memory_bytes = 0
    bits: int | None = None
    alpha: int | None = None
    georeference: Georeference | None = None
    identity = None  # nothing lists the chunks, so any of them may change unnoticed

    def __init__(
        self, location: str, store: Store, counters: Counters, image: Multiscale, read: Callable[[str], bytes]
    ) -> None:
        self._location, self._counters, self._axes, self._store = location, counters, image.axes, store
        self._concurrency = max(MIN_CONCURRENCY, store.concurrency)
        self._indexes: dict[str, NDArray[np.uint64] | None] = {}  # by key; None if there is no file
        arrays: dict[str, ZarrArray] = {}

        def work(share: list[Dataset]) -> None:
            for dataset in share:
                arrays[dataset.path] = self._open(read, dataset.path, image.zarr_format)

        spread(work, list(image.datasets), self._concurrency)
        self._arrays = [arrays[dataset.path] for dataset in image.datasets]
        for array in self._arrays:
            self._check(array)
        try:
            check_levels([self._yx(a.shape) for a in self._arrays], [self._yx(d.scale) for d in image.datasets])
        except ValueError as error:
            raise NotAPyramidError(f"{location}: {error}") from None
        self.name = image.name
        self.dtype, self.nodata = self._arrays[0].dtype.newbyteorder("="), self._arrays[0].nodata
        self.channels = name_channels(image.labels, self._size(self._arrays[0], "c"))
        self.levels = tuple(self._level(image, i) for i in range(len(self._arrays)))

    def fill(self, level: int, boxes: NDArray[np.int64], out: NDArray[Any]) -> None:
        """Copy the image into ``out``, chunk by chunk, each fetched once; see ``Source``."""
        array = self._arrays[level]
        rows, columns, parts = cut(boxes, self.levels[level].shape_yx, self._yx(array.chunks))
        step = array.chunks[self._axes.index("c")] if "c" in self._axes else 1
        stacked = range(math.ceil(len(self.channels) / step))
        places = [(c, y, x) for y, x in zip(rows.tolist(), columns.tolist(), strict=True) for c in stacked]
        self._fetch_indexes(level, places)

        def work(share: list[int]) -> None:
            for i in share:
                first = places[i][0] * step
                pixels = self._read(level, places[i])[: len(self.channels) - first]
                for b, y0, y1, x0, x1, cy0, cy1, cx0, cx1 in parts[i // len(stacked)]:
                    out[b, first : first + step, y0:y1, x0:x1] = pixels[:, cy0:cy1, cx0:cx1]

        spread(work, list(range(len(places))), self._concurrency)
        self._counters.add(chunks=len(places))

    def close(self) -> None:
        """Close descriptors and connections."""
        self._store.close()

    def _open(self, read: Callable[[str], bytes], path: str, zarr_format: int) -> ZarrArray:
        where = f"{self._location}: level {path!r}"
        try:
            return read_array(read, path, zarr_format, where)
        except FileNotFoundError:
            raise CorruptImageError(f"{where} is missing") from None
        except ValueError as error:
            raise CorruptImageError(f"{where} has damaged metadata ({error})") from error

    def _check(self, array: ZarrArray) -> None:
        """Check that an array fits this image."""
        where = f"{self._location}: level {array.path!r}"
        first = self._arrays[0]
        if len(array.shape) != len(self._axes) or array.dtype != first.dtype:
            raise CorruptImageError(f"{where} is {array.shape} {array.dtype}, unlike what the image says")
        for axis in "tz":
            if self._size(array, axis) > 1:
                raise NotAPyramidError(
                    f"{where} has {self._size(array, axis)} planes along {axis}; store one of them as an image"
                )
        if self._size(array, "c") != self._size(first, "c"):
            raise CorruptImageError(f"{where} has other channels than level 0")
        if self._size(array, "c") > LIMITS.channels:
            raise NotAPyramidError(f"{where} has more than {LIMITS.channels} channels, which is not read")

    def _read(self, level: int, place: Place) -> NDArray[Any]:
        """(C, h, w) pixels of one chunk by its number along c, y and x, also those outside the image."""
        array = self._arrays[level]
        try:
            data = self._fetch(array, self._by_axis(place))
            pixels = None if data is None else array.encoding.decode(data, array.chunks)
        except (TransferError, NotAPyramidError):
            raise
        except Exception as error:  # each codec raises its own
            raise CorruptImageError(
                f"{self._location}: level {level}, chunk {place[1:]} is damaged ({first_line(error)})"
            ) from error
        if pixels is None:
            pixels = np.broadcast_to(np.array(array.fill_value, array.dtype), array.chunks)
        pixels = pixels[tuple(0 if axis in "tz" else slice(None) for axis in self._axes)]
        kept = [axis for axis in self._axes if axis not in "tz"]
        pixels = pixels.transpose([kept.index(axis) for axis in "cyx" if axis in kept])
        return pixels if "c" in kept else pixels[None]

    def _fetch(self, array: ZarrArray, place: Place) -> bytes | None:
        """The stored bytes of a chunk, None where it is absent."""
        try:
            if array.index is None:
                data = self._store.get(array.key(place), array.stored_bytes)
            else:
                shard, inner = array.index.locate(place)
                index = self._indexes[array.key(shard)]
                offset, length = (ABSENT, ABSENT) if index is None else index[inner].tolist()
                if offset == length == ABSENT:
                    return None
                if length > array.stored_bytes or offset > MAX_OFFSET:
                    raise ValueError(f"its shard says {length} bytes at {offset}")
                data = next(self._store.get_ranges([(array.key(shard), offset, length)]))
        except FileNotFoundError:
            self._counters.add(requests=1)
            return None
        self._counters.add(requests=1, read=len(data))
        return data

    def _fetch_indexes(self, level: int, places: Iterable[Place]) -> None:
        """Fetch the indexes of the shards that hold chunks, each once."""
        array = self._arrays[level]
        index = array.index
        if index is None:
            return
        shards = {array.key(shard): shard for shard in (index.locate(self._by_axis(p))[0] for p in places)}

        def work(share: list[str]) -> None:
            for key in share:
                start = -index.nbytes if index.at_end else 0
                try:
                    data = next(self._store.get_ranges([(key, start, index.nbytes)]))
                    self._indexes[key] = index.decode(data)
                except FileNotFoundError:
                    data, self._indexes[key] = b"", None
                except ValueError as error:
                    raise CorruptImageError(f"{self._location}: shard {key} is damaged ({error})") from error
                self._counters.add(requests=1, read=len(data))

        spread(work, [key for key in shards if key not in self._indexes], self._concurrency)

    def _by_axis(self, place: Place) -> Place:
        """Number of a chunk along each axis of the array, from its numbers along c, y and x."""
        numbers = dict(zip("cyx", place, strict=True))
        return tuple(numbers.get(axis, 0) for axis in self._axes)

    def _level(self, image: Multiscale, number: int) -> Level:
        """The level as a `Slide` describes it."""
        array, dataset = self._arrays[number], image.datasets[number]
        scale_yx, finest_yx = self._yx(dataset.scale), self._yx(image.datasets[0].scale)
        downsample = scale_yx[0] / finest_yx[0]
        # Without a known unit, positions are in pixels of level 0.
        unit_y, unit_x = image.micrometers_yx or (1 / finest_yx[0], 1 / finest_yx[1])
        first_yx = self._yx(dataset.translation)
        scale_yx = (scale_yx[0] * unit_y, scale_yx[1] * unit_x)
        return Level(
            shape_yx=self._yx(array.shape),
            downsample=downsample,
            mpp=scale_yx[0] if image.micrometers_yx else None,
            chunk=max(self._yx(array.chunks)),
            shard=max(self._yx(array.shards)),
            scale_yx=scale_yx,
            translation_yx=(first_yx[0] * unit_y, first_yx[1] * unit_x),
        )

    def _yx(self, by_axis: tuple[T, ...]) -> tuple[T, T]:
        return by_axis[self._axes.index("y")], by_axis[self._axes.index("x")]

    def _size(self, array: ZarrArray, axis: str) -> int:
        return int(array.shape[self._axes.index(axis)]) if axis in self._axes else 1
