"""Check the baseline image of a TIFF before it is decoded, then read it box by box.

Notable: only the tiles or strips that a box touches are read (threads share one descriptor or connection) and
decoded, by tifffile's own decoder, so level 0 equals ``tifffile.imread``. Some things tifffile reads wrongly without
a word: a segment that is not stored or is cut short, and too few segments. They are refused here first.

A TIFF may be tiled or striped, planar or not, classic or BigTIFF, OME-TIFF, SVS, SCN, Philips or another whole-slide
TIFF. It may have the axes YX, YXS, SYX or CYX, and be grey, RGB, YCbCr (as JPEG), CMYK (kept as four channels) or a
palette (read as the RGB that it stands for), in one of ``DTYPES`` or a type that one of them holds exactly.
Everything else is refused by name: see ``storage.images.tiff_kinds``. tifffile's log lines name no file, so they go
to this module's log, at debug.

Shape letters: C channels, H height, W width, S samples of a pixel stored together.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import product
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
import tifffile

from storage.errors import StorageError
from storage.images.codestreams import j2k_header, webp_header, whole_jpeg_header
from storage.images.image import Image
from storage.images.tiff_header import check_directories
from storage.images.tiff_kinds import (
    AGAIN,
    COMPRESSIONS,
    DIFFERENT_PLANES,
    GDAL,
    PALETTE,
    REWRITE,
    REWRITE_SLIDE,
    held_as,
    palette,
    why_a_stack,
    why_refused,
)
from storage.images.tiff_metadata import channel_names, check_claims, mpp_yx
from storage.images.tiff_segments import Cut, Part, Plane, why_misplaced
from storage.limits import LIMITS, Limits
from storage.place.files import BlockReader, open_file

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from storage.place.files import Range

STREAM_HEADERS = {"JPEG": whole_jpeg_header, "JPEG 2000": j2k_header, "WebP": webp_header}
# These decide how a page's segments are decoded.
STORED_AS = (
    "compression",
    "predictor",
    "fillorder",
    "photometric",
    "planarconfig",
    "samplesperpixel",
    "bitspersample",
    "dtype",
    "imagelength",
    "imagewidth",
    "tilelength",
    "tilewidth",
    "rowsperstrip",
)
_reading: ContextVar[str] = ContextVar("reading", default="")
_logger = logging.getLogger(__name__)


def _ours(record: logging.LogRecord) -> bool:
    """Let pass what tifffile logs about files that others read, and send what it logs about ours to our own log."""
    if location := _reading.get():
        _logger.debug("%s: %s", location, record.getMessage())
    return not location


tifffile.logger().addFilter(_ours)


@contextmanager
def _named(location: str) -> Iterator[None]:
    """Have tifffile's log lines name this file."""
    token = _reading.set(location)
    try:
        yield
    finally:
        _reading.reset(token)


class TiffImage(Image):
    """Gives random access to the baseline image of a TIFF file, also to several threads; see ``Image``.

    Parameters
    ----------
    path
        A path or a URL (http, https, s3, gs, az).
    allow_sparse
        Whether to read tiles that are not stored as zeros (or the file's own "no data" value), rather than refuse the
        file.
    limits
        The limits of what the file may claim.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    def __init__(self, path: str | os.PathLike[str], *, allow_sparse: bool = False, limits: Limits = LIMITS) -> None:
        self._file = open_file(path)
        super().__init__(self._file.location, limits, allow_sparse=allow_sparse)
        try:
            self._open()
            self._check_segments(allow_sparse=allow_sparse)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with BlockReader(self._file) as reader:
            check_directories(reader, self._limits)
            try:
                with (
                    _named(self.location),
                    tifffile.TiffFile(cast("IO[bytes]", reader), name=self._file.name) as tif,
                ):
                    self._describe(tif)
            except StorageError:
                raise
            except Exception as error:  # tifffile raises whatever a damaged header makes it run into
                if isinstance(error, RuntimeError) and "keyframe" in str(error):
                    raise self._unsupported(DIFFERENT_PLANES) from error
                if reader.failure is None:
                    raise self._corrupt("its headers are damaged or contradict each other") from error
            if reader.failure is not None:  # tifffile goes on without what it could not read
                raise reader.failure

    def _describe(self, tif: tifffile.TiffFile) -> None:
        self._check_format(tif)
        series = _baseline(tif)
        axes = self._checked_axes(series)
        self._key = key = series.keyframe
        samples = key.samplesperpixel if axes != "CYX" else len(series.pages)
        if reason := why_refused(key, samples):
            raise self._unsupported(reason)
        self._colours = palette(key) if key.photometric == PALETTE else None
        self._stored = key.samplesperpixel if key.planarconfig == 1 else 1  # S
        self._made = self._stored if self._colours is None else 3  # channels that S samples become
        self.shape = (samples * self._made // max(self._stored, 1), key.imagelength, key.imagewidth)
        self.dtype = held_as(key)
        self._file_dtype = np.dtype(key.dtype).newbyteorder(tif.byteorder)
        tile = (key.tilelength, key.tilewidth)
        strip = (min(key.rowsperstrip, key.imagelength), key.imagewidth)
        self.segment_yx = tile if key.is_tiled else strip
        self._cut = Cut("tile" if key.is_tiled else "strip", self.shape[1:], self.segment_yx)
        self._codec = COMPRESSIONS[key.compression]
        self._check_sizes(key)
        whole = key.bitspersample == self._file_dtype.itemsize * 8
        self.direct = whole and key.compression == 1 and key.predictor == 1 and key.fillorder == 1
        self._nodata = key.nodata
        self._planes = list(self._collect_planes(series))
        self._decode = key.decode
        self.mpp_yx = mpp_yx(tif, key)
        self.channels = channel_names(tif, key, self.shape[0])

    def _check_format(self, tif: tifffile.TiffFile) -> None:
        """Refuse metadata that would be too much for tifffile, and tiles that must be stitched."""
        check_claims(tif, self.location, self._limits)
        if tif.is_bif and any(_bif_overlaps(page) for page in tif.pages):
            raise self._unsupported(f"a BIF whose tiles overlap, which are not stitched; {REWRITE_SLIDE}")

    def _checked_axes(self, series: tifffile.TiffPageSeries) -> str:
        """Reduce the axes to YX, YXS, SYX or CYX, or refuse."""
        pages = list(series.pages)
        if None in pages:
            raise self._unsupported("some of its planes are missing or in other files; join them in one file")
        sizes = list(zip(series.get_axes(squeeze=False), series.get_shape(squeeze=False), strict=True))
        axes = "".join(axis for axis, size in sizes if size != 1 or axis in "YX")
        if axes not in ("YX", "YXS", "SYX", "CYX"):
            found, shape = series.get_axes(squeeze=True), series.get_shape(squeeze=True)
            raise self._unsupported(why_a_stack(found, shape))
        if len(pages) != (dict(sizes)["C"] if axes == "CYX" else 1):
            raise self._corrupt(f"it has {len(pages)} pages where its metadata tells of others")
        return axes

    def _check_sizes(self, key: tifffile.TiffPage) -> None:
        """Refuse what could not be held in memory."""
        channels, height, width = self.shape
        if channels > self._limits.channels:
            raise self._unsupported(
                f"{channels} channels, and at most {self._limits.channels} are read; keep those that you need, here "
                f"the first three: {GDAL} -b 1 -b 2 -b 3 IN.tif OUT.tif"
            )
        if max(height, width) > self._limits.side or channels * height * width > self._limits.samples:
            raise self._unsupported(
                f"claims {height} x {width} pixels of {channels} channels, more than any scanner makes; {AGAIN}"
            )
        if min(height, width, self._stored, *self.segment_yx) < 1:
            raise self._corrupt("an image, tile or strip without pixels")
        pixel = max(self._stored * self._file_dtype.itemsize, self._made * self.dtype.itemsize)
        segment = self.segment_yx[0] * self.segment_yx[1] * pixel
        if segment > self._limits.segment_bytes and not (key.compression == 1 and key.predictor == 1):
            most = self._limits.segment_bytes
            raise self._unsupported(f"one tile or strip decodes to {segment} bytes, over {most}; {REWRITE}")

    def _collect_planes(self, series: tifffile.TiffPageSeries) -> Iterator[Plane]:
        area = math.prod(self._cut.grid)
        for number, page in enumerate(series.pages):
            assert page is not None  # noqa: S101  checked in _checked_axes
            self._check_alike(page)
            offsets, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
            planes = 1 if self._key.planarconfig == 1 else self._key.samplesperpixel
            if len(offsets) != planes * area or len(counts) != planes * area:
                raise self._corrupt(
                    f"it tells the places of {len(offsets)} and the lengths of {len(counts)} of its {planes * area} "
                    f"{self._cut.name}s"
                )
            for plane in range(planes):
                part = slice(plane * area, (plane + 1) * area)
                yield Plane(
                    offsets[part],
                    counts[part],
                    first_channel=(number * planes + plane) * self._made,
                    first_index=plane * area,
                    jpegtables=page.jpegtables,
                )

    def _check_alike(self, page: tifffile.TiffPage | tifffile.TiffFrame) -> None:
        """Refuse a plane that is not stored like the first, because tifffile would decode it like that one."""
        key = self._key
        own = page.aspage() if page.offset else key  # ImageJ's later planes may have no directory of their own
        if any(getattr(own, name) != getattr(key, name) for name in STORED_AS):
            raise self._unsupported(DIFFERENT_PLANES)

    def _check_segments(self, *, allow_sparse: bool) -> None:
        """Check that every segment is stored, rightly placed and long enough, and that ratios are plausible."""
        offsets = np.concatenate([plane.offsets for plane in self._planes])
        counts = np.concatenate([plane.counts for plane in self._planes])
        stored = (offsets != 0) | (counts != 0)
        if not allow_sparse and not stored.all():
            missing = int(np.count_nonzero(~stored))
            raise self._unsupported(
                f"a sparse TIFF: {missing} of its {len(stored)} {self._cut.name}s are not stored; "
                "if they are meant to be blank, read them as zeros with --allow-sparse (allow_sparse=True)"
            )
        plain_bytes = self._cut.plain_bytes(self._stored * self._key.bitspersample)
        plain_bytes = np.tile(plain_bytes, len(self._planes))[stored]
        offsets, counts = offsets[stored], counts[stored]
        if reason := why_misplaced(offsets, counts, self._file.size):
            raise self._corrupt(reason)
        if self._key.compression == 1 and (counts < plain_bytes).any():
            raise self._corrupt("uncompressed tiles or strips are shorter than their pixels")
        self._check_ratio(int(plain_bytes.sum()), self._file.size, self._limits.ratio)

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Decode one box inside the image.

        Returns
        -------
        (C, h, w) array of ``dtype``

        Raises
        ------
        CorruptImageError
            A segment cannot be decoded.
        TransferError
            A segment does not arrive.
        ValueError
            The box leaves the image.
        """
        self._check_box(y, x, h, w)
        out = np.empty((self.shape[0], h, w), self.dtype)
        if h == 0 or w == 0:
            return out
        parts = list(product(self._planes, self._cut.parts(y, x, h, w)))
        data = self._file.read_ranges([wanted for plane, part in parts for wanted in self._ranges(plane, part)])
        for plane, part in parts:
            channels = slice(plane.first_channel, plane.first_channel + self._made)
            pixels = self._held(self._segment(plane, part.index, part, data))
            out[channels, *part.place] = pixels.transpose(2, 0, 1)
        return out

    def _held(self, pixels: NDArray[Any]) -> NDArray[Any]:
        """Turn (h, w, S) into (h, w, C): a palette's numbers become colours, bits 0 and 255, others stay."""
        if self._colours is not None:
            return self._colours[pixels[..., 0].astype(np.uint16, copy=False)]
        return pixels * np.uint8(255) if pixels.dtype == bool else pixels

    def _ranges(self, plane: Plane, part: Part) -> list[Range]:
        """List the bytes of the file that a part needs; of plain pixels only its rows, or its columns if few."""
        offset, count = int(plane.offsets[part.index]), int(plane.counts[part.index])
        if not self.direct or not count:
            return [(offset, count)] if count else []
        pixel = self._stored * self._file_dtype.itemsize
        stride = self.segment_yx[1] * pixel
        if self._whole_rows(part):
            return [(offset + part.y0 * stride, (part.y1 - part.y0) * stride)]
        length = (part.x1 - part.x0) * pixel
        return [(offset + y * stride + part.x0 * pixel, length) for y in range(part.y0, part.y1)]

    def _whole_rows(self, part: Part) -> bool:
        return (part.x1 - part.x0) * 4 >= self.segment_yx[1]

    def _segment(self, plane: Plane, i: int, part: Part, data: Iterator[bytes]) -> NDArray[Any]:
        """Make the (y1 - y0, x1 - x0, S) pixels of segment ``i`` of a plane, whose bytes come next in ``data``."""
        shape = (part.y1 - part.y0, part.x1 - part.x0, self._stored)
        wanted = self._ranges(plane, part)
        if not wanted:
            return np.full(shape, self._nodata, self._file_dtype)
        pieces = [next(data) for _ in wanted]
        if any(len(piece) != length for piece, (_, length) in zip(pieces, wanted, strict=True)):
            raise self._corrupt(f"{self._cut.where(i)} is truncated")
        if self.direct:
            rows = np.frombuffer(b"".join(pieces), self._file_dtype).reshape(shape[0], -1, self._stored)
            return rows[:, part.x0 : part.x1] if self._whole_rows(part) else rows
        return self._decoded(plane, i, pieces[0])[part.y0 : part.y1, part.x0 : part.x1]

    def _decoded(self, plane: Plane, i: int, data: bytes) -> NDArray[Any]:
        """Decode the (h, w, S) pixels of a compressed segment."""
        self._check_stream(i, data)
        try:
            with _named(self.location):
                pixels, _, _ = self._decode(data, plane.first_index + i, jpegtables=plane.jpegtables)
        except MemoryError as error:
            raise self._unsupported(
                f"{self._cut.where(i)} needs more memory than there is; use fewer workers"
            ) from error
        except Exception as error:  # each codec has its own errors
            raise self._corrupt(f"{self._cut.where(i)} does not decode as {self._codec}") from error
        if pixels is not None and self._codec == "CCITT":
            pixels = pixels.astype(bool)  # they came as bytes
        height, width = self._cut.inside(i)
        if pixels is None or pixels.shape[1] < height or pixels.shape[2] < width or pixels.dtype != self._key.dtype:
            raise self._corrupt(f"{self._cut.where(i)} decodes to other pixels than its header says")
        return np.asarray(pixels[0])

    def _check_stream(self, i: int, data: bytes) -> None:
        """Refuse an inner image that claims more pixels than the TIFF gives it, or is cut short."""
        if self._codec not in STREAM_HEADERS:
            return
        try:
            header = STREAM_HEADERS[self._codec](data)
        except ValueError as error:
            raise self._corrupt(f"{self._cut.where(i)} is damaged ({error})") from error
        too_many = self._codec != "WebP" and header.samples > self._stored
        if header.height > self.segment_yx[0] or header.width > self.segment_yx[1] or too_many:
            claim = f"{header.height} x {header.width} pixels of {header.samples} samples"
            raise self._corrupt(f"{self._cut.where(i)} is damaged ({self._codec} of {claim})")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _baseline(tif: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """Return the first series that is no reduced copy; in an SCN, where the first is an overview, the largest."""
    if not tif.is_scn:
        return next((series for series in tif.series if not series.keyframe.is_reduced), tif.series[0])
    return max(tif.series, key=lambda series: series.keyframe.imagelength * series.keyframe.imagewidth)


def _bif_overlaps(page: tifffile.TiffPage | tifffile.TiffFrame) -> bool:
    """Tell whether a BIF's XMP joins its tiles by more than their edges."""
    xmp = page.tags.valueof(700) if isinstance(page, tifffile.TiffPage) else None
    text = xmp.decode(errors="replace") if isinstance(xmp, bytes) else str(xmp or "")
    return any(int(n) for n in re.findall(r'\bOverlap[XY]="(-?\d+)"', text))
