"""``Slide``: random boxes of an image at several levels, fetching only the chunks they touch.

Four kinds of source lie behind it, chosen as it is opened: our own pyramids (``sharded``, the fast one), any other
OME-Zarr 0.4 or 0.5 image (``foreign``), TIFF slides such as SVS where they lie (``tiff``), and PNG, JPEG and BMP
files (``memory``). Whatever the source, each chunk or tile is fetched and decoded once however many boxes of a batch
share it.

Shape letters: N boxes, C channels, H height, W width.
"""

from __future__ import annotations

import os
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from storage.errors import NotAPyramidError, UnsupportedImageError
from storage.format.levels import Level
from storage.format.ngff import load_json
from storage.format.nodata import holds_data
from storage.format.ome_zarr import is_own, pyramid_info
from storage.images.image import RASTER_SUFFIXES, TIFF_SUFFIXES, series_files
from storage.place.location import files_of, split_page
from storage.place.stores import open_store
from storage.place.urls import is_remote
from storage.read.boxes import check_boxes
from storage.read.sharded import ShardedSource
from storage.read.source import Counters, ReadStatistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

    from storage.read.cache import ChunkCache
    from storage.read.source import Source

__all__ = ["Level", "ReadStatistics", "Slide"]


class Slide:
    """An image opened for reading: a pyramid, a TIFF slide, or a PNG, JPEG or BMP file, by path or URL.

    It is a context manager and thread safe. It is pickled as its location and opened again when unpickled.

    Parameters
    ----------
    location
        Folder, file or URL (http, https, s3, gs, az); ``FILE#page=2`` is a page of a TIFF, numbered from 0, and
        ``B04.tif;B03.tif`` are the bands of one scene (``storage.images.bands``).
    cache
        Keeps chunks of our own pyramids and tiles of TIFFs, also for other processes; meant for URLs.

    Attributes
    ----------
    location, cache : what it was opened with
    name : name of the image
    levels : the levels, finest first
    channels : channel names
    nodata : value of pixels that hold no data, each channel for itself, None where none is known; coarser levels are
        means of the other pixels. NaN holds no data in any case
    alpha : number of the channel, from 0, that is the opacity of the others or the mask of the file: where it is 0,
        none holds data, and coarser levels are means of the other pixels. None where there is no such channel
    data_channels : numbers of all other channels
    dtype : uint8, int8, uint16, int16, uint32, int32, float32 or float64
    bits : bits of a sample where it has fewer than its type, as of cameras with 12; None elsewhere
    mpp : micrometres per pixel of level 0, None where unknown, as of scenes, whose pixels measure metres or degrees
    georeference : where on the Earth level 0 lies (``storage.format.georeference``), None where it is unknown
    shape_yx : height and width of level 0
    memory_bytes : bytes of pixels held while it is open; a PNG, JPEG or BMP is decoded whole

    Raises
    ------
    MissingImageError, NotAPyramidError, UnsupportedImageError, CorruptImageError, TransferError
    """

    def __init__(self, location: str | os.PathLike[str], *, cache: ChunkCache | None = None) -> None:
        self.location, self.cache = os.fspath(location), cache
        self._counters = Counters()
        self._source = _open_source(self.location, self._counters, cache)
        self.name, self.channels, self.dtype = self._source.name, self._source.channels, self._source.dtype
        self.nodata, self.bits, self.alpha = self._source.nodata, self._source.bits, self._source.alpha
        self.data_channels = [c for c in range(len(self.channels)) if c != self.alpha]
        self.georeference = self._source.georeference
        self.levels, self.memory_bytes = self._source.levels, self._source.memory_bytes
        self.mpp, self.shape_yx = self.levels[0].mpp, self.levels[0].shape_yx

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
            A chunk is damaged or, in a pyramid of ours, missing.
        TransferError
            The server failed to answer, after a bounded number of attempts.
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
        CorruptImageError, TransferError
            For the reasons given in ``read``.
        """
        if not 0 <= level < len(self.levels):
            raise ValueError(f"level {level} of a slide with {len(self.levels)}")
        boxes = check_boxes(boxes)
        channels = len(self.channels)
        if not len(boxes):
            return np.empty((0, channels, 0, 0), self.dtype)
        height, width = self.levels[level].shape_yx
        h, w = int(boxes[0, 2]), int(boxes[0, 3])
        y, x = boxes[:, 0], boxes[:, 1]
        inside = y.min() >= 0 and x.min() >= 0 and y.max() + h <= height and x.max() + w <= width
        shape = (len(boxes), channels, h, w)
        out = np.empty(shape, self.dtype) if inside else np.full(shape, fill, self.dtype)
        if h and w:
            self._source.fill(level, boxes, out)
        return out

    @property
    def largest_value(self) -> int:
        """The largest value that pixels can have, by their type and `bits`; 1 for floating point."""
        if self.dtype.kind == "f":
            return 1
        return 2**self.bits - 1 if self.bits else int(np.iinfo(self.dtype).max)

    def valid(self, level: int, boxes: ArrayLike) -> NDArray[np.bool_] | None:
        """Tell which pixels of boxes hold data: those that lie in the image and have data in any channel.

        Parameters
        ----------
        level, boxes
            As ``read_many`` takes them; it reads the same pixels.

        Returns
        -------
        (N, h, w) bool, or None where every pixel of the image holds data (``has_gaps``)

        Raises
        ------
        CorruptImageError, TransferError
            As ``read``.
        """
        if not self.has_gaps:
            return None
        usual = np.nan if self.dtype.kind == "f" else 0
        pixels = self.read_many(level, boxes, fill=usual if self.nodata is None else self.nodata)
        valid: NDArray[np.bool_] = np.logical_or.reduce(self.holds_data(pixels)[:, self.data_channels], axis=1)
        return valid

    @property
    def has_gaps(self) -> bool:
        """Whether there may be pixels that hold no data: it has `nodata` or `alpha`, or numbers that may be NaN."""
        return self.nodata is not None or self.alpha is not None or self.dtype.kind == "f"

    def holds_data(self, pixels: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether each of some pixels (..., C, h, w) of this slide, of all its channels, holds data."""
        return holds_data(pixels, self.nodata, self.alpha)

    @property
    def identity(self) -> str | None:
        """Digest of the pixels of all levels, whatever the location; None for pyramids of other writers.

        For our own pyramids it is made of their shards' checksums and takes no request; for a TIFF, of its table of
        tiles and of some tiles, which are read for it; for a PNG, JPEG or BMP, of the decoded pixels.
        """
        return self._source.identity

    @property
    def is_own(self) -> bool:
        """Whether it is a pyramid of this package, which may hold labels (``read_label``)."""
        return isinstance(self._source, ShardedSource)

    @property
    def statistics(self) -> ReadStatistics:
        """Counts of what was read since opening, metadata included."""
        return self._counters.snapshot()

    def close(self) -> None:
        """Close descriptors and connections."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.location, self.cache)

    def __repr__(self) -> str:
        return f"Slide({self.location!r})"


def _reopen(location: str, cache: ChunkCache | None) -> Slide:
    return Slide(location, cache=cache)


def _open_source(location: str, counters: Counters, cache: ChunkCache | None) -> Source:
    """Choose the kind of source."""
    if len(files_of(location)) > 1:
        from storage.read.bands import BandsSource

        return BandsSource(location, counters, cache)
    location, pages = split_page(dicom_file(location) or location)
    kind = _kind_of_file(location)
    if kind is None:
        return _open_pyramid(location, counters, cache)
    from storage.images.openslide_image import instead_of
    from storage.read.memory import MemorySource
    from storage.read.openslide_source import OpenSlideSource
    from storage.read.tiff import TiffSource  # tifffile takes a while to import

    try:
        match kind:
            case "TIFF":
                return TiffSource(location, counters, cache, pages)
            case "raster" if pages not in (None, 0):
                raise UnsupportedImageError(f"{location}: one image, which has no other pages")
            case "raster":
                return MemorySource(location, counters)
            case other:
                raise NotAPyramidError(f"{location}: {other}; give a TIFF, PNG, JPEG or BMP, or a pyramid")
    except (UnsupportedImageError, NotAPyramidError) as error:
        if pages is not None:  # OpenSlide has none to choose
            raise
        return OpenSlideSource(instead_of(error, location), counters)


def _kind_of_file(location: str) -> str | None:
    """Kind of an image file as by ``image_kind``, at a URL by its name; None for what may be a pyramid."""
    if is_remote(location):
        suffix = PurePosixPath(location.partition("?")[0]).suffix.lower()
        return "raster" if suffix in RASTER_SUFFIXES else "TIFF" if suffix in TIFF_SUFFIXES else None
    if not os.path.isfile(location):
        return None
    from storage.images.opening import image_kind

    return image_kind(location)


def dicom_file(location: str) -> str:
    """First file of a DICOM series in a folder, by which OpenSlide finds the others; "" if there is none."""
    if is_remote(location) or not os.path.isdir(location):
        return ""
    return min(series_files(location), default="")


def _open_pyramid(location: str, counters: Counters, cache: ChunkCache | None) -> Source:
    """Open our own pyramids, known by their ``nested_ats`` block, or those of others."""
    store = open_store(location)

    def read(key: str) -> bytes:
        counters.add(requests=1)
        data = store.get(key)
        counters.add(read=len(data))
        return data

    try:
        data = read("zarr.json")
        root = load_json(lambda _: data, "zarr.json", location)
    except FileNotFoundError:
        root = {}
    if is_own(root):
        info = pyramid_info(root, read, location)
        return ShardedSource(location, store, counters, data, info, cache)
    from storage.format.ngff import find_image
    from storage.read.foreign import ForeignSource  # the codecs of others take a while to import

    return ForeignSource(location, store, counters, find_image(read, location, root), read)
