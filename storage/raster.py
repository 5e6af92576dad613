"""A plain PNG or JPEG file as a source of pixels, and ``open_image``, which tells them from TIFFs by first bytes.

Notable: such a file is decoded whole, so it is held in memory; what its header claims is checked before.

- PNG: grey or RGB, with or without alpha, 8 or 16 bits, kept as they are. Palette colours become the RGB (or RGBA)
  that they stand for, a transparent colour becomes an alpha channel, as libpng does both. Grey of 1, 2 or 4 bits is
  refused, because it would be rescaled.
- JPEG: 8 bits, grey or colour (as RGB). CMYK is refused, because files disagree on its sign.
- EXIF orientation is applied: the image lies as viewers show it. Other metadata, colour profiles included, is not.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Self

import imagecodecs

from storage.codestreams import (
    JPEG_FRAMES,
    JPEG_MAGIC,
    PNG_MAGIC,
    StreamHeader,
    jpeg_header,
    jpeg_is_whole,
    png_header,
)
from storage.errors import CorruptImageError, UnsupportedImageError
from storage.files import RandomFile, open_file
from storage.limits import LIMITS, Limits
from storage.tiff import TiffImage

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
ACCEPTED = "TIFF (BigTIFF, OME-TIFF, SVS and other whole-slide TIFFs), PNG or JPEG"
CHANNELS = {1: ("0",), 2: ("0", "A"), 3: ("R", "G", "B"), 4: ("R", "G", "B", "A")}


def open_image(location: str | os.PathLike[str], *, allow_sparse: bool = False) -> TiffImage | RasterImage:
    """Open a TIFF, PNG or JPEG, told apart by its first bytes and not by its name.

    Parameters
    ----------
    location
        A path or a URL (http, https, s3, gs, az).
    allow_sparse
        Read tiles of a TIFF that are not stored as zeros rather than refuse the file.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """
    file = open_file(location)
    try:
        magic = file.read_at(0, len(PNG_MAGIC))
    finally:
        file.close()
    if magic.startswith(TIFF_MAGICS):
        return TiffImage(location, allow_sparse=allow_sparse)
    if magic.startswith((PNG_MAGIC, JPEG_MAGIC)):
        return RasterImage(location)
    what = "an empty file" if not magic else "not an image of a kind that is read"
    raise UnsupportedImageError(f"{file.location}: {what}; give {ACCEPTED}")


class RasterImage:
    """A PNG or JPEG, decoded whole; with the attributes of a ``TiffImage``.

    Attributes
    ----------
    shape : (C, H, W)
    dtype : uint8 or uint16
    mpp_yx : None; such files hold no microscope's pixel size
    nbytes : bytes of the decoded image
    channels : channel names
    segment_yx : height and width of the image
    direct : True, a box costs only its copy

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    direct = True
    mpp_yx = None

    def __init__(self, path: str | os.PathLike[str], *, limits: Limits = LIMITS) -> None:
        self._limits = limits
        file = open_file(path)
        self.location = file.location
        try:
            pixels = self._decode(self._read(file))  # (H, W, C)
        finally:
            file.close()
        height, width, channels = pixels.shape
        self.shape = (channels, height, width)
        self.dtype = pixels.dtype
        self.nbytes = pixels.nbytes
        self._pixels: NDArray[Any] | None = pixels
        self.segment_yx = (height, width)
        self.channels = CHANNELS[channels]

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.location, self._limits)

    def _read(self, file: RandomFile) -> bytes:
        """Return the file's bytes; none of a kind that is accepted is larger than its pixels may be."""
        if file.size > self._limits.raster_bytes:
            raise self._unsupported(f"{file.size} bytes; larger images are read as tiled TIFFs only")
        data = file.read_at(0, file.size)
        if len(data) != file.size:
            raise CorruptImageError(f"{self.location}: {len(data)} of {file.size} bytes can be read")
        return data

    def _decode(self, data: bytes) -> NDArray[Any]:
        """(H, W, C) pixels, upright."""
        png = data.startswith(PNG_MAGIC)
        try:
            header = png_header(data) if png else jpeg_header(data)
            if not png and not jpeg_is_whole(data):
                raise ValueError("a JPEG that is cut short")
        except (ValueError, IndexError) as error:
            raise CorruptImageError(f"{self.location}: damaged ({error})") from error
        self._check_png(header) if png else self._check_jpeg(header)
        self._check_size(header, len(data))
        try:
            pixels = imagecodecs.png_decode(data) if png else imagecodecs.jpeg_decode(data)
        except Exception as error:  # each codec has its own errors
            raise CorruptImageError(f"{self.location}: does not decode ({error})") from error
        if pixels.shape[:2] != (header.height, header.width) or pixels.dtype.name not in ("uint8", "uint16"):
            raise CorruptImageError(f"{self.location}: decodes to other pixels than its header says")
        pixels = pixels.reshape(header.height, header.width, -1)
        return _upright(pixels, header.orientation)

    def _check_png(self, header: StreamHeader) -> None:
        if header.bits < 8 and header.kind != 3:
            raise self._unsupported(f"grey of {header.bits} bits, which would be rescaled; store it with 8 bits")

    def _check_jpeg(self, header: StreamHeader) -> None:
        if header.kind not in JPEG_FRAMES or header.bits != 8:
            raise self._unsupported(f"a lossless, arithmetic or {header.bits} bit JPEG; store it as PNG")
        if header.samples not in (1, 3):
            raise self._unsupported(
                f"a JPEG of {header.samples} channels (CMYK?); convert it to RGB (for example: vips colourspace "
                "IN OUT srgb)"
            )

    def _check_size(self, header: StreamHeader, file_bytes: int) -> None:
        height, width = header.height, header.width
        if height < 1 or width < 1:
            raise CorruptImageError(f"{self.location}: an image without pixels")
        raw = height * width * header.samples * (2 if header.bits == 16 else 1)
        most = self._limits.raster_bytes
        if raw > most:
            raise self._unsupported(
                f"{height} x {width} pixels decode to {raw} bytes, over {most}; rewrite it as a tiled TIFF "
                "(for example: vips tiffsave IN OUT --tile --compression deflate)"
            )
        if raw > self._limits.ratio_free_bytes and raw > file_bytes * self._limits.raster_ratio:
            raise self._unsupported(f"claims {raw} bytes of pixels in a file of {file_bytes}")

    def _unsupported(self, reason: str) -> UnsupportedImageError:
        return UnsupportedImageError(f"{self.location}: {reason}")

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Return a view of one box inside the image.

        Returns
        -------
        (C, h, w) array of ``dtype``, not to be written to

        Raises
        ------
        ValueError
            The box leaves the image, or the image was closed.
        """
        if self._pixels is None:
            raise ValueError(f"{self.location}: closed")
        if not (0 <= y <= y + h <= self.shape[1] and 0 <= x <= x + w <= self.shape[2]):
            raise ValueError(f"the box y={y} x={x} h={h} w={w} leaves the image of shape {self.shape}")
        return self._pixels[y : y + h, x : x + w].transpose(2, 0, 1)

    def close(self) -> None:
        """Forget the pixels."""
        self._pixels = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _reopen(location: str, limits: Limits) -> RasterImage:
    return RasterImage(location, limits=limits)


def _upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn (H, W, C) pixels as EXIF orientation 1 to 8 says: 5 to 8 are transposed, then rows or columns flipped.

    EXIF 2.32, tag 274: where the stored image's row 0 and column 0 are to be shown.
    """
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    flip_rows, flip_columns = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
