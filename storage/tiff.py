"""The baseline image of a TIFF: checked before decoding, then read box by box.

Notable: only the tiles or strips that a box touches are read (``pread``, so threads share one descriptor) and
decoded, by tifffile's own decoder, so level 0 equals ``tifffile.imread``. What tifffile reads silently wrong, a
segment offset of zero or too few segments, is refused here first.

Accepted: tiled or striped, classic or BigTIFF, OME-TIFF, SVS; axes YX, YXS, SYX or CYX; uint8, uint16, float32;
grey, RGB and YCbCr (as JPEG). Everything else is refused by name. The only module that imports tifffile.

Shape letters: C channels, H height, W width, S samples of a pixel stored together.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import tifffile

from storage.errors import (
    ConversionError,
    CorruptImageError,
    MissingImageError,
    StorageError,
    UnsupportedImageError,
)
from storage.limits import LIMITS, Limits
from storage.tiff_header import check_directories

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import TracebackType

    from numpy.typing import NDArray

COMPRESSIONS = {
    1: "none",
    5: "lzw",
    7: "jpeg",
    8: "deflate",
    32773: "packbits",
    32946: "deflate",
    34925: "lzma",
    50000: "zstd",
}
PHOTOMETRICS = {0: "white is zero", 1: "black is zero", 2: "RGB", 6: "YCbCr"}
DTYPES = ("uint8", "uint16", "float32")
# Resolution tags often hold a screen's or printer's dots per inch; above this they are not a microscope's.
MAX_PLAUSIBLE_MPP = 10.0
MICROMETRES = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "μm": 1.0, "um": 1.0, "nm": 1e-3}


@dataclass(frozen=True)
class _Plane:
    """Segments of the channels ``first .. first + S``, which are stored together, in row-major order."""

    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]
    first_channel: int
    first_index: int  # of these segments in the page's own numbering
    jpegtables: bytes | None


class TiffImage:
    """Random access to the baseline image of a TIFF file; thread safe, and a context manager.

    Attributes
    ----------
    shape : (C, H, W)
    dtype : uint8, uint16 or float32
    mpp_yx : micrometres per pixel (y, x), or None where the file does not tell
    channels : channel names
    segment_yx : height and width of a tile or strip, in pixels
    direct : whether pixels are stored plainly, so that a box is read without decoding whole segments

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError
    """

    def __init__(self, path: str | os.PathLike[str], *, limits: Limits = LIMITS) -> None:
        self.path = Path(path)
        self._limits = limits
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            raise MissingImageError(f"{self.path}: does not exist; check the path") from None
        except OSError as error:
            raise StorageError(f"{self.path}: cannot be opened ({error.strerror})") from error
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        if self.path.is_dir():
            raise UnsupportedImageError(f"{self.path}: a folder, not a TIFF file")
        check_directories(self._fd, str(self.path), self._limits)
        try:
            with tifffile.TiffFile(self.path) as tif:
                self._describe(tif)
        except StorageError:
            raise
        except Exception as error:  # tifffile raises whatever a damaged header makes it run into
            reason = f"{type(error).__name__}: {error}"
            raise CorruptImageError(f"{self.path}: its headers cannot be read ({reason})") from error
        self._check_segments()

    def _describe(self, tif: tifffile.TiffFile) -> None:
        if tif.is_ndpi:
            raise UnsupportedImageError(f"{self.path}: NDPI is not read; rewrite it as a tiled TIFF")
        series = tif.series[0]
        self._key = key = series.keyframe
        self._axes = self._checked_axes(series)
        samples = key.samplesperpixel if self._axes != "CYX" else len(series.pages)
        self.shape = (samples, key.imagelength, key.imagewidth)
        self.dtype = np.dtype(key.dtype).newbyteorder("=")
        self._stored = key.samplesperpixel if key.planarconfig == 1 else 1  # S
        tile = (key.tilelength, key.tilewidth)
        strip = (min(key.rowsperstrip, key.imagelength), key.imagewidth)
        self.segment_yx = tile if key.is_tiled else strip
        self._check_page(key)
        self.direct = key.compression == 1 and key.predictor == 1 and key.fillorder == 1
        self._file_dtype = self.dtype.newbyteorder(tif.byteorder)
        self._planes = list(self._collect_planes(series))
        self._decode = key.decode
        self.mpp_yx = _mpp_yx(tif, key)
        self.channels = _channel_names(tif, self.shape[0])

    def _checked_axes(self, series: tifffile.TiffPageSeries) -> str:
        """Reduce the axes to YX, YXS, SYX or CYX, or refuse."""
        pairs = zip(series.get_axes(squeeze=False), series.get_shape(squeeze=False), strict=True)
        axes = "".join(axis for axis, size in pairs if size != 1 or axis in "YX")
        if axes not in ("YX", "YXS", "SYX", "CYX") or None in list(series.pages):
            found = series.get_axes(squeeze=True)
            raise UnsupportedImageError(
                f"{self.path}: axes {found}; only one plane of grey, colour or channels (YX, YXS, SYX, CYX) is read"
            )
        return axes

    def _check_page(self, key: tifffile.TiffPage) -> None:
        """Refuse what would be decoded wrongly or could not be held."""
        channels, height, width = self.shape
        refusals = [
            (self.dtype.name not in DTYPES, f"pixels of type {key.dtype}; only {', '.join(DTYPES)} are kept"),
            (key.bitspersample != self.dtype.itemsize * 8, f"{key.bitspersample} bits per sample"),
            (key.compression not in COMPRESSIONS, f"compression {key.compression!s} is not supported"),
            (key.photometric not in PHOTOMETRICS, f"photometric interpretation {key.photometric!s}"),
            (key.photometric == 6 and key.compression != 7, "YCbCr pixels outside JPEG"),
            (key.imagedepth != 1 or key.tiledepth != 1, "a volume, not an image"),
            (channels > self._limits.channels, f"{channels} channels; at most {self._limits.channels}"),
            (max(height, width) > self._limits.side, f"{height} x {width} pixels"),
            (channels * height * width > self._limits.samples, f"{channels} x {height} x {width} samples"),
        ]
        for refused, reason in refusals:
            if refused:
                raise UnsupportedImageError(f"{self.path}: {reason}")
        if min(height, width, *self.segment_yx) < 1:
            raise CorruptImageError(f"{self.path}: an image or segment without pixels")
        segment = self.segment_yx[0] * self.segment_yx[1] * self._stored * self.dtype.itemsize
        if segment > self._limits.segment_bytes and not (key.compression == 1 and key.predictor == 1):
            raise UnsupportedImageError(
                f"{self.path}: one tile or strip decodes to {segment} bytes, over {self._limits.segment_bytes}; "
                "rewrite it with tiles (for example: vips tiffsave --tile)"
            )

    def _collect_planes(self, series: tifffile.TiffPageSeries) -> Iterator[_Plane]:
        rows, columns = self.segment_grid
        area = rows * columns
        for number, page in enumerate(series.pages):
            assert page is not None  # noqa: S101  checked in _checked_axes
            offsets, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
            planes = 1 if self._key.planarconfig == 1 else self._key.samplesperpixel
            if len(offsets) != planes * area or len(counts) != planes * area:
                raise CorruptImageError(
                    f"{self.path}: {len(offsets)} offsets and {len(counts)} lengths of {planes * area} segments"
                )
            for plane in range(planes):
                part = slice(plane * area, (plane + 1) * area)
                yield _Plane(
                    offsets[part],
                    counts[part],
                    first_channel=(number * planes + plane) * self._stored,
                    first_index=plane * area,
                    jpegtables=page.jpegtables,
                )

    def _check_segments(self) -> None:
        """Every segment must lie inside the file, not be sparse, and not overlap another; ratios must be sane."""
        size = os.fstat(self._fd).st_size
        offsets = np.concatenate([plane.offsets for plane in self._planes])
        counts = np.concatenate([plane.counts for plane in self._planes])
        if (offsets <= 0).any() or (counts <= 0).any():
            raise UnsupportedImageError(f"{self.path}: a sparse TIFF, with tiles that are not stored")
        if (offsets > size).any() or (counts > size - offsets).any():
            raise CorruptImageError(f"{self.path}: truncated, tiles or strips lie past the end of the file")
        starts, order = np.unique(offsets, return_index=True)
        ends = starts + counts[order]
        if (ends[:-1] > starts[1:]).any():
            raise CorruptImageError(f"{self.path}: tiles or strips overlap in the file")
        if self.direct and (counts < self._plain_bytes()).any():
            raise CorruptImageError(f"{self.path}: uncompressed tiles or strips are shorter than their pixels")
        raw = self.nbytes
        if raw > self._limits.ratio_free_bytes and raw > size * self._limits.ratio:
            raise UnsupportedImageError(f"{self.path}: claims {raw} bytes of pixels in a file of {size}")

    def _plain_bytes(self) -> NDArray[np.int64]:
        """Bytes that each uncompressed segment must have, in the order of all planes."""
        rows, columns = self.segment_grid
        heights = np.full(rows, self.segment_yx[0], np.int64)
        if not self._key.is_tiled:
            heights[-1] = self.shape[1] - (rows - 1) * self.segment_yx[0]
        row_bytes = self.segment_yx[1] * self._stored * self.dtype.itemsize
        return np.tile(np.repeat(heights * row_bytes, columns), len(self._planes))

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded image."""
        return int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize

    @property
    def segment_grid(self) -> tuple[int, int]:
        """Rows and columns of segments."""
        return (-(-self.shape[1] // self.segment_yx[0]), -(-self.shape[2] // self.segment_yx[1]))

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Decode one box inside the image.

        Returns
        -------
        (C, h, w) array of ``dtype``

        Raises
        ------
        CorruptImageError
            A segment cannot be decoded.
        ValueError
            The box leaves the image.
        """
        if not (0 <= y <= y + h <= self.shape[1] and 0 <= x <= x + w <= self.shape[2]):
            raise ValueError(f"the box y={y} x={x} h={h} w={w} leaves the image of shape {self.shape}")
        out = np.empty((self.shape[0], h, w), self.dtype)
        if h == 0 or w == 0:
            return out
        height, width = self.segment_yx
        columns = self.segment_grid[1]
        for plane in self._planes:
            part = out[plane.first_channel : plane.first_channel + self._stored]
            for row in range(y // height, (y + h - 1) // height + 1):
                for column in range(x // width, (x + w - 1) // width + 1):
                    top, left = row * height, column * width
                    y0, y1 = max(y, top), min(y + h, top + height)
                    x0, x1 = max(x, left), min(x + w, left + width)
                    pixels = self._segment(plane, row * columns + column, y0 - top, y1 - top, x0 - left, x1 - left)
                    part[:, y0 - y : y1 - y, x0 - x : x1 - x] = pixels.transpose(2, 0, 1)
        return out

    def _segment(self, plane: _Plane, i: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """(y1 - y0, x1 - x0, S) pixels of segment ``i`` of a plane, in the segment's own coordinates."""
        if self.direct:
            return self._plain_rows(plane, i, y0, y1, x0, x1)
        data = self._pread(plane, i, 0, int(plane.counts[i]))
        try:
            self._check_jpeg(data)
            pixels, _, _ = self._decode(data, plane.first_index + i, jpegtables=plane.jpegtables)
        except Exception as error:  # each codec has its own errors
            raise CorruptImageError(f"{self.path}: {self._where(i)} does not decode ({error})") from error
        if pixels is None or pixels.shape[1] < y1 or pixels.shape[2] < x1:
            raise CorruptImageError(f"{self.path}: {self._where(i)} decodes to too few pixels")
        return np.asarray(pixels[0, y0:y1, x0:x1])

    def _plain_rows(self, plane: _Plane, i: int, y0: int, y1: int, x0: int, x1: int) -> NDArray[Any]:
        """Pixels of an uncompressed segment: only the wanted rows are read, only their columns if few."""
        pixel = self._stored * self.dtype.itemsize
        stride = self.segment_yx[1] * pixel
        if (x1 - x0) * 4 >= self.segment_yx[1]:  # nearly whole rows: one read
            data = self._pread(plane, i, y0 * stride, (y1 - y0) * stride)
            rows = np.frombuffer(data, self._file_dtype).reshape(y1 - y0, self.segment_yx[1], self._stored)
            return rows[:, x0:x1]
        length = (x1 - x0) * pixel
        data = b"".join(self._pread(plane, i, y * stride + x0 * pixel, length) for y in range(y0, y1))
        return np.frombuffer(data, self._file_dtype).reshape(y1 - y0, x1 - x0, self._stored)

    def _pread(self, plane: _Plane, i: int, start: int, length: int) -> bytes:
        data = os.pread(self._fd, length, int(plane.offsets[i]) + start)
        if len(data) != length:
            raise CorruptImageError(f"{self.path}: {self._where(i)} is truncated")
        return data

    def _check_jpeg(self, data: bytes) -> None:
        """Refuse a JPEG segment whose own header claims more pixels than the TIFF gives it."""
        if self._key.compression == 7:
            height, width = _jpeg_shape(data)
            if height > self.segment_yx[0] or width > self.segment_yx[1]:
                raise ValueError(f"JPEG of {height} x {width} pixels")

    def _where(self, i: int) -> str:
        row, column = divmod(i, self.segment_grid[1])
        return f"segment ({row}, {column}) of level 0"

    def close(self) -> None:
        """Close the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _jpeg_shape(data: bytes) -> tuple[int, int]:
    """Height and width in a JPEG's frame header (ITU T.81, B.2.2)."""
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return (
                int.from_bytes(data[position + 5 : position + 7], "big"),
                int.from_bytes(data[position + 7 : position + 9], "big"),
            )
        position += 1 if marker == 0xFF else 2 + length  # fill bytes may precede a marker
    raise ValueError("no JPEG frame header")


def _mpp_yx(tif: tifffile.TiffFile, key: tifffile.TiffPage) -> tuple[float, float] | None:
    """Micrometres per pixel (y, x): from the SVS description, OME-XML, or plausible resolution tags."""
    if tif.is_svs:
        found = re.search(r"\bMPP\s*=\s*([0-9.eE+-]+)", key.description)
        return _plausible(*[float(found[1])] * 2) if found else None
    if tif.is_ome:
        pixels = _ome_pixels(tif)
        sizes = [_ome_size(pixels, axis) for axis in "YX"]
        return _plausible(*sizes)
    unit = {2: 25400.0, 3: 10000.0}.get(int(key.resolutionunit))
    x, y = key.resolution
    if unit is None or x <= 0 or y <= 0 or max(unit / y, unit / x) > MAX_PLAUSIBLE_MPP:
        return None
    return _plausible(unit / y, unit / x)


def _plausible(y: float, x: float) -> tuple[float, float] | None:
    return (y, x) if 0 < y < np.inf and 0 < x < np.inf else None


def _ome_pixels(tif: tifffile.TiffFile) -> str:
    """Return the first Pixels element of the OME-XML, as text."""
    found = re.search(r"<(?:\w+:)?Pixels\b.*?(?:/>|</(?:\w+:)?Pixels>)", tif.ome_metadata or "", re.DOTALL)
    return found[0] if found else ""


def _ome_size(pixels: str, axis: str) -> float:
    """Physical size of a pixel along an axis in micrometres; 0 where it is not given in metres."""
    size = re.search(rf'\bPhysicalSize{axis}="([0-9.eE+-]+)"', pixels)
    unit = re.search(rf'\bPhysicalSize{axis}Unit="([^"]*)"', pixels)
    return float(size[1]) * MICROMETRES.get(unit[1] if unit else "µm", 0.0) if size else 0.0


def _channel_names(tif: tifffile.TiffFile, channels: int) -> tuple[str, ...]:
    names = re.findall(r'<(?:\w+:)?Channel\b[^>]*?\bName="([^"]*)"', _ome_pixels(tif)) if tif.is_ome else []
    if len(names) == channels:
        return tuple(names)
    return ("R", "G", "B") if channels == 3 else tuple(str(i) for i in range(channels))


def write_tiff(
    path: str | os.PathLike[str],
    tiles: Iterable[NDArray[Any]],
    *,
    shape: tuple[int, ...],
    dtype: str | np.dtype[Any],
    tile: int = 512,
    compression: str | None = None,
    mpp: float | None = None,
) -> None:
    """Write a tiled (Big)TIFF tile by tile, in memory of a few tiles; the file appears when it is whole.

    Parameters
    ----------
    path
        File to make or replace.
    tiles
        Tiles of (h, w, C) or (h, w) in row-major order; those at the lower and right edges may be cut to the image.
    shape
        (H, W, C) or (H, W) of the image.
    dtype
        uint8, uint16 or float32.
    tile
        Side of a tile in pixels, a multiple of 16.
    compression
        None, "deflate", "lzw", "zstd", or "jpeg" (uint8 only; quality 80, colours as YCbCr 4:2:0).
    mpp
        Micrometres per pixel, stored as resolution tags.
    """
    if compression not in (None, "deflate", "lzw", "zstd", "jpeg"):
        raise ValueError(f"compression {compression!r} is not one of None, deflate, lzw, zstd, jpeg")
    path = Path(path)
    dtype = np.dtype(dtype)
    colour = len(shape) == 3 and shape[2] >= 3
    settings: dict[str, Any] = {"photometric": "rgb" if colour else "minisblack", "compression": compression}
    if compression == "jpeg":
        settings["compressionargs"] = {"level": 80}  # tifffile turns RGB to YCbCr 4:2:0
    if mpp is not None:
        settings |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    big = math.prod(shape) * dtype.itemsize > 2**32 - 2**25
    try:
        with tifffile.TiffWriter(temporary, bigtiff=big) as writer:
            padded = (_pad_tile(part, tile, dtype) for part in tiles)
            writer.write(padded, shape=shape, dtype=dtype, tile=(tile, tile), metadata=None, maxworkers=1, **settings)
        os.replace(temporary, path)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written ({error.strerror})") from error
    finally:
        temporary.unlink(missing_ok=True)


def _pad_tile(part: NDArray[Any], tile: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Fill a cut tile by repeating its edge, which costs least under JPEG."""
    if part.dtype != dtype:
        raise ValueError(f"a tile of type {part.dtype}, expected {dtype}")
    missing = [(0, tile - part.shape[0]), (0, tile - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
    return np.ascontiguousarray(part if part.shape[:2] == (tile, tile) else np.pad(part, missing, mode="edge"))
