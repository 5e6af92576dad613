"""Read a plain PNG, JPEG or BMP file.

Notable: such a file is decoded whole, so it is held in memory; what its header claims is checked before.

- A PNG is grey or RGB, with or without alpha, of 8 or 16 bits, and kept as it is. As with libpng, palette colours
  become the RGB (or RGBA) that they stand for, a transparent colour becomes an alpha channel, and grey of 1, 2 or 4
  bits becomes the 8 bits that it stands for (ISO 15948, 13.12).
- A JPEG has 8 bits and is grey or in colour (read as RGB). CMYK is refused, because files disagree on its sign.
- A BMP is uncompressed: of 24 or 32 bits (read as RGB), or of up to 8 with a palette, which becomes the RGB or grey
  that it stands for. Compressed rows and 16 bits are refused.
- The EXIF orientation is applied, so the image lies as viewers show it. Other metadata, such as colour profiles, is
  ignored.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

import imagecodecs

from storage.images.bmp import HEADERS, PLAIN, bmp_decode, bmp_header
from storage.images.codestreams import (
    JPEG_FRAMES,
    JPEG_MAGIC,
    PNG_MAGIC,
    StreamHeader,
    png_header,
    whole_jpeg_header,
)
from storage.images.image import ACCEPTED, Image
from storage.images.orientation import upright
from storage.images.tiff_kinds import REWRITE
from storage.limits import LIMITS, Limits
from storage.place.files import RandomFile

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAGIC_BYTES = 18  # they tell a file's kind; "BM" alone could begin a text
BMP_AS_PNG = "python -c \"from PIL import Image; Image.open('IN.bmp').save('OUT.png')\""
JPEG_AS_TIFF = (
    "store it as TIFF: python -c \"import imagecodecs as i, tifffile as t; t.imwrite('OUT.tif', i.imread('IN.jpg'))\""
)
CHANNELS = {1: ("0",), 2: ("0", "A"), 3: ("R", "G", "B"), 4: ("R", "G", "B", "A")}


def raster_kind(first: bytes) -> str:
    """Tell "png", "jpeg" or "bmp" from a file's first ``MAGIC_BYTES``; the answer is empty for anything else."""
    if first.startswith(PNG_MAGIC):
        return "png"
    if first.startswith(JPEG_MAGIC):
        return "jpeg"
    return "bmp" if first[:2] == b"BM" and int.from_bytes(first[14:18], "little") in HEADERS else ""


class RasterImage(Image):
    """A PNG, JPEG or BMP that is decoded whole, so that the image is its one segment; see ``Image``.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """

    def __init__(self, path: str | os.PathLike[str], *, limits: Limits = LIMITS) -> None:
        with closing(RandomFile(path)) as file:
            super().__init__(file.location, limits)
            pixels = self._decode(self._read(file))  # (H, W, C)
        height, width, channels = pixels.shape
        self.shape = (channels, height, width)
        self.dtype = pixels.dtype
        self._pixels: NDArray[Any] | None = pixels
        self.segment_yx = (height, width)
        self.channels = CHANNELS[channels]
        self.alpha = channels - 1 if self.channels[-1] == "A" else None

    def _read(self, file: RandomFile) -> bytes:
        """Return the file's bytes, which must be no more than the pixels may have."""
        if file.size > self._limits.raster_bytes:
            raise self._unsupported(
                f"{file.size} bytes, and more than {self._limits.raster_bytes} are not read; {REWRITE}"
            )
        data = file.read_at(0, file.size)
        if len(data) != file.size:
            raise self._corrupt(f"{len(data)} of {file.size} bytes can be read")
        return data

    def _decode(self, data: bytes) -> NDArray[Any]:
        """Decode to (H, W, C) pixels that are upright."""
        kind = raster_kind(data)
        if not kind:  # a URL may be named like an image and lead to something else
            raise self._unsupported(f"not a PNG, JPEG or BMP; give {ACCEPTED}")
        read_header = {"png": png_header, "jpeg": whole_jpeg_header, "bmp": bmp_header}[kind]
        try:
            header = read_header(data)
        except ValueError as error:
            raise self._corrupt(f"damaged ({error})") from error
        if kind != "png":
            {"jpeg": self._check_jpeg, "bmp": self._check_bmp}[kind](header)
        self._check_size(header, len(data))
        try:
            pixels = bmp_decode(data) if kind == "bmp" else getattr(imagecodecs, f"{kind}_decode")(data)
        except Exception as error:  # each codec has its own errors
            raise self._corrupt(f"damaged, it does not decode as {kind.upper()}") from error
        if pixels.shape[:2] != (header.height, header.width) or pixels.dtype.name not in ("uint8", "uint16"):
            raise self._corrupt("decodes to other pixels than its header says")
        pixels = pixels.reshape(header.height, header.width, -1)
        return upright(pixels, header.orientation)

    def _check_jpeg(self, header: StreamHeader) -> None:
        if header.kind not in JPEG_FRAMES or header.bits != 8:
            raise self._unsupported(
                f"a JPEG of a rare kind (lossless, arithmetic or of {header.bits} bits); {JPEG_AS_TIFF}"
            )
        if header.samples not in (1, 3):
            raise self._unsupported(
                f"a JPEG of {header.samples} channels (CMYK?); store it as RGB: vips colourspace IN.jpg OUT.png srgb"
            )

    def _check_bmp(self, header: StreamHeader) -> None:
        if header.kind != PLAIN:
            what = f"of {header.bits} bits, compressed or of a rare depth"
            raise self._unsupported(f"a BMP {what}; store it as PNG: {BMP_AS_PNG}")

    def _check_size(self, header: StreamHeader, file_bytes: int) -> None:
        height, width = header.height, header.width
        if height < 1 or width < 1:
            raise self._corrupt("an image without pixels")
        raw = height * width * header.samples * (2 if header.bits == 16 else 1)
        most = self._limits.raster_bytes
        if raw > most:
            raise self._unsupported(f"{height} x {width} pixels decode to {raw} bytes, over {most}; {REWRITE}")
        self._check_ratio(raw, file_bytes, self._limits.raster_ratio)

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
        self._check_box(y, x, h, w)
        return self._pixels[y : y + h, x : x + w].transpose(2, 0, 1)

    def close(self) -> None:
        """Forget the pixels."""
        self._pixels = None
