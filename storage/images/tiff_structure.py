"""The structure of a TIFF, described by tifffile and checked before anything is decoded.

Accepted: tiled or striped, planar or not, classic or BigTIFF, OME-TIFF, SVS, SCN, Philips and other whole-slide
TIFFs; axes YX, YXS, SYX or CYX; grey, RGB, YCbCr (as JPEG), CMYK (kept as four channels) and palettes (as the RGB
that they stand for); the types of ``DTYPES`` and those that one of them holds exactly. Everything else is refused by
name: see ``storage.images.tiff_kinds``.

Shape letters: C channels, H height, W width, S samples of a pixel stored together.
"""

from __future__ import annotations

import math
import re
from contextlib import contextmanager, suppress
from typing import IO, TYPE_CHECKING, Self, cast

import numpy as np
import tifffile

from storage.errors import CorruptImageError, StorageError, UnsupportedImageError
from storage.images.geotiff import georeference_of
from storage.images.halving import whole_ratio
from storage.images.image import Image
from storage.images.orientation import TRANSPOSED
from storage.images.tiff_header import check_directories, is_ndpi
from storage.images.tiff_kinds import (
    AGAIN,
    COMPRESSIONS,
    DIFFERENT_PLANES,
    GDAL,
    OUT,
    PALETTE,
    REWRITE,
    REWRITE_SLIDE,
    bits_of,
    held_as,
    orientation_of,
    palette,
    why_a_stack,
    why_refused,
)
from storage.images.tiff_log import named
from storage.images.tiff_metadata import alpha_of, channel_names, check_claims, mpp_yx, nodata_of
from storage.images.tiff_pages import masks_of, series_of, why_unclear
from storage.images.tiff_segments import Cut, Plane, why_misplaced
from storage.limits import LIMITS, Limits
from storage.place.files import BlockReader, RandomFile
from storage.place.location import Pages

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from storage.images.tiff_header import Table, Tables

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


class TiffStructure(Image):
    """The baseline image of a TIFF file and its coarser levels; see ``Image``.

    Parameters
    ----------
    path
        A path or a URL (http, https, s3, gs, az), or the file, opened, which is closed with this.
    allow_sparse
        Whether to read tiles that are not stored as zeros (or the file's own "no data" value), rather than refuse the
        file.
    pages
        Which of the file's pages is the image, numbered from 0, or "channels" for all of them, each a channel; None
        takes the baseline image, where it is clear which that is.
    limits
        The limits of what the file may claim.
    coarser
        Look for the coarser levels of a pyramid too.

    Attributes
    ----------
    coarser : the coarser levels, which share the file and are closed with it
    mask : the mask that the file has of this image, read as the last channel; None where it has none
    planes : what the image is made of, as it is stored
    orientation : how that is turned or mirrored; see ``storage.images.orientation``

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | RandomFile,
        *,
        allow_sparse: bool = False,
        pages: Pages = None,
        limits: Limits = LIMITS,
        coarser: bool = False,
    ) -> None:
        self._file = path if isinstance(path, RandomFile) else RandomFile(path)
        super().__init__(self._file.location, limits, allow_sparse=allow_sparse, pages=pages)
        self._allow_sparse = allow_sparse
        self._pages = pages
        self.coarser: list[Self] = []
        self.mask: Self | None = None
        self._about = ""
        try:
            self._open(coarser=coarser)
        except BaseException:
            self.close()
            raise

    def _open(self, *, coarser: bool) -> None:
        with self._parsed() as (tif, tables):
            series = self._chosen_series(tif)
            self._describe(tif, series, tables)
            if masks := masks_of(tif, series):
                self._take_mask(tif, masks, tables)
            if coarser:
                self._describe_coarser(tif, series, tables, masks)

    @contextmanager
    def _parsed(self) -> Iterator[tuple[tifffile.TiffFile, Tables]]:
        """Have tifffile read the headers, and turn what it runs into to errors of ours."""
        with BlockReader(self._file) as reader:
            tables = check_directories(reader, self._limits)
            ndpi = is_ndpi(reader, reader.read_at(0, 16))
            try:
                with (
                    named(self.location),
                    tifffile.TiffFile(cast("IO[bytes]", reader), name=self._file.name, is_ndpi=ndpi) as tif,
                ):
                    self._check_format(tif)
                    yield tif, tables
            except StorageError:
                raise
            except Exception as error:  # tifffile raises whatever a damaged header makes it run into
                if isinstance(error, RuntimeError) and "keyframe" in str(error):
                    raise self._unsupported(DIFFERENT_PLANES) from error
                if reader.failure is None:
                    raise self._corrupt("its headers are damaged or contradict each other") from error
            if reader.failure is not None:  # tifffile goes on without what it could not read
                raise reader.failure

    def _chosen_series(self, tif: tifffile.TiffFile) -> tifffile.TiffPageSeries:
        """The pages that are the image."""
        if self._pages is None:
            series = _baseline(tif)
            if reason := why_unclear(tif, series):
                raise self._unsupported(reason)
            return series
        if self._pages == "channels":
            return series_of(list(tif.pages))
        if self._pages >= len(tif.pages):
            raise self._unsupported(f"no page {self._pages}: it has {len(tif.pages)}, numbered from 0")
        return series_of([tif.pages[self._pages]])

    def _describe_coarser(
        self, tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, tables: Tables, masks: list[tifffile.TiffPage]
    ) -> None:
        """Describe the levels below the baseline; one of other pixels, or of a kind that is not read, is left out.

        So is one that lacks a mask where the baseline has one.
        """
        # tifffile wants one and the same step from level to level. Those of a chosen page may be of another.
        series_here = tif.series if self._pages is None else []
        reduced = [one for one in series_here if one.keyframe.is_reduced and not one.keyframe.is_mask]
        whole = [one for one in reduced if whole_ratio(self._cut.image_yx, _shape_yx(one)) not in (None, 1)]
        for level in [*series.levels[1:], *whole]:
            other = cast("Self", self._another())
            with suppress(UnsupportedImageError):
                other._describe(tif, level, tables)
                if masks:
                    other._take_mask(tif, masks, tables)
                alike = ("dtype", "bits", "orientation")
                if other.shape[0] == self.shape[0] and all(getattr(other, a) == getattr(self, a) for a in alike):
                    self.coarser.append(other)

    def _another(self) -> Self:
        """Make an image that is still to be described, of the same file."""
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__ | {"coarser": [], "mask": None}
        return other

    def _take_mask(self, tif: tifffile.TiffFile, masks: Sequence[tifffile.TiffPage], tables: Tables) -> None:
        """Take the mask of this image's size for a last channel of it."""
        size_yx = (self._key.imagelength, self._key.imagewidth)
        found = next((mask for mask in masks if (mask.imagelength, mask.imagewidth) == size_yx), None)
        if found is None:
            other = f"{masks[0].imagelength} x {masks[0].imagewidth}"
            raise self._unsupported(
                f"its mask has {other} pixels, and the image {size_yx[0]} x {size_yx[1]}; take the mask away: "
                "gdal_translate -mask none IN.tif OUT.tif"
            )
        mask = cast("Self", self._another())
        mask._about, mask._allow_sparse = "its mask: ", True  # what is not stored is not shown, as GDAL has it
        mask._describe(tif, series_of([found]), tables)
        if mask.shape[0] != 1:
            raise mask._unsupported(
                "one for each channel; make one of them: gdal_translate -mask mask,1 IN.tif OUT.tif"
            )
        self.mask = mask
        self.alpha, self.shape = self.shape[0], (self.shape[0] + 1, *self.shape[1:])
        self.channels = (*self.channels, "mask")

    def _corrupt(self, reason: str) -> CorruptImageError:
        return super()._corrupt(self._about + reason)

    def _unsupported(self, reason: str) -> UnsupportedImageError:
        return super()._unsupported(self._about + reason)

    def _describe(self, tif: tifffile.TiffFile, series: tifffile.TiffPageSeries, tables: Tables) -> None:
        axes = self._checked_axes(series)
        self._key = key = series.keyframe
        samples = key.samplesperpixel if axes != "CYX" else len(series.pages)
        if reason := why_refused(key, samples):
            raise self._unsupported(reason)
        self._colours = palette(key) if key.photometric == PALETTE else None
        self._stored = key.samplesperpixel if key.planarconfig == 1 else 1  # S
        self._made = self._stored if self._colours is None else 3  # channels that S samples become
        self.shape = (samples * self._made // max(self._stored, 1), key.imagelength, key.imagewidth)
        self.dtype, self.bits = held_as(key), bits_of(key)
        self._file_dtype = np.dtype(key.dtype).newbyteorder(tif.byteorder)
        tile = (key.tilelength, key.tilewidth)
        strip = (min(key.rowsperstrip, key.imagelength), key.imagewidth)
        self.segment_yx = tile if key.is_tiled else strip
        self._cut = Cut("tile" if key.is_tiled else "strip", self.shape[1:], self.segment_yx)  # as it is stored
        self._codec = COMPRESSIONS[key.compression]
        self._check_sizes(key)
        whole = key.bitspersample == self._file_dtype.itemsize * 8
        self.direct = whole and key.compression == 1 and key.predictor == 1 and key.fillorder == 1
        self._blank = key.nodata  # of segments that are not stored; 0 where the file names no value
        self.nodata = nodata_of(key, self.dtype)
        self.planes = list(self._collect_planes(series, tables))
        self._check_segments()
        self._decode = key.decode
        self.mpp_yx = mpp_yx(tif, key)
        self.channels = channel_names(tif, key, self.shape[0])
        self.alpha = alpha_of(key) if axes != "CYX" else None
        self._turn(orientation_of(key))
        self.georeference = georeference_of(key, self.orientation, self.shape[1:])

    def _turn(self, orientation: int) -> None:
        """Describe the image as it is to be shown."""
        self.orientation = orientation
        if orientation not in TRANSPOSED:
            return
        channels, height, width = self.shape
        if not (self._key.is_tiled or self.direct) and self.nbytes > self._limits.raster_bytes:
            raise self._unsupported(
                f"stored turned (orientation {orientation}) in strips, all of which each column crosses; make it "
                f"upright: vips autorot IN.tif {OUT}"
            )
        self.shape, self.segment_yx = (channels, width, height), (self.segment_yx[1], self.segment_yx[0])
        self.mpp_yx = self.mpp_yx and (self.mpp_yx[1], self.mpp_yx[0])

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
            raise self._unsupported(why_a_stack(found, shape, len(series.pages)))
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

    def _collect_planes(self, series: tifffile.TiffPageSeries, tables: Tables) -> Iterator[Plane]:
        area = math.prod(self._cut.grid)
        for number, page in enumerate(series.pages):
            assert page is not None  # noqa: S101  checked in _checked_axes
            self._check_alike(page)
            own = tables.get(page.offset, {})
            offsets = self._numbers(own.get(324, own.get(273)), page.dataoffsets)
            counts = self._numbers(own.get(325, own.get(279)), page.databytecounts)
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

    def _numbers(self, table: Table | None, shown: Sequence[int]) -> NDArray[np.int64]:
        """Numbers of a tag: as tifffile has read them, or, of a long table, as the file has them."""
        if table is None:
            return np.array(shown, np.int64)
        kind = np.dtype(table.kind)
        data = self._file.read_at(table.offset, table.count * kind.itemsize)
        if len(data) < table.count * kind.itemsize:
            raise self._corrupt("truncated inside a table of tiles or strips")
        numbers = np.frombuffer(data, kind)
        return numbers.view(np.int64) if kind == np.uint64 else numbers.astype(np.int64)

    def _check_alike(self, page: tifffile.TiffPage | tifffile.TiffFrame) -> None:
        """Refuse a plane that is not stored like the first, because tifffile would decode it like that one."""
        key = self._key
        own = page.aspage() if page.offset else key  # ImageJ's later planes may have no directory of their own
        if any(getattr(own, name) != getattr(key, name) for name in STORED_AS):
            raise self._unsupported(DIFFERENT_PLANES)

    def _check_segments(self) -> None:
        """Check that every segment is stored, rightly placed and long enough, and that ratios are plausible."""
        offsets, counts = self.planes[0].offsets, self.planes[0].counts
        if len(self.planes) > 1:  # of one plane with millions of tiles nothing is copied
            offsets = np.concatenate([plane.offsets for plane in self.planes])
            counts = np.concatenate([plane.counts for plane in self.planes])
        stored = (offsets != 0) | (counts != 0)
        if not self._allow_sparse and not stored.all():
            missing = int(np.count_nonzero(~stored))
            raise self._unsupported(
                f"a sparse TIFF: {missing} of its {len(stored)} {self._cut.name}s are not stored; "
                "if they are meant to be blank, read them as zeros with --allow-sparse (allow_sparse=True)"
            )
        plain_bytes = self._cut.plain_bytes(self._stored * self._key.bitspersample)
        if len(self.planes) > 1 or not stored.all():
            plain_bytes = np.tile(plain_bytes, len(self.planes))[stored]
            offsets, counts = offsets[stored], counts[stored]
        if reason := why_misplaced(offsets, counts, self._file.size):
            raise self._corrupt(reason)
        if self._key.compression == 1 and (counts < plain_bytes).any():
            raise self._corrupt("uncompressed tiles or strips are shorter than their pixels")
        self._check_ratio(int(plain_bytes.sum()), self._file.size, self._limits.ratio)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _shape_yx(series: tifffile.TiffPageSeries) -> tuple[int, int]:
    return series.keyframe.imagelength, series.keyframe.imagewidth


def _baseline(tif: tifffile.TiffFile) -> tifffile.TiffPageSeries:
    """Return the first series that is no reduced copy; in an SCN, where the first is an overview, the largest."""
    if not tif.is_scn:
        whole = (one for one in tif.series if not (one.keyframe.is_reduced or one.keyframe.is_mask))
        return next(whole, tif.series[0])
    return max(tif.series, key=lambda series: series.keyframe.imagelength * series.keyframe.imagewidth)


def _bif_overlaps(page: tifffile.TiffPage | tifffile.TiffFrame) -> bool:
    """Tell whether a BIF's XMP joins its tiles by more than their edges."""
    xmp = page.tags.valueof(700) if isinstance(page, tifffile.TiffPage) else None
    text = xmp.decode(errors="replace") if isinstance(xmp, bytes) else str(xmp or "")
    return any(int(n) for n in re.findall(r'\bOverlap[XY]="(-?\d+)"', text))
