"""The pixels of a TIFF, read box by box or segment by segment.

Notable: only the tiles or strips that a box touches are read (threads share one descriptor or connection) and
decoded, by tifffile's own decoder, so level 0 equals ``tifffile.imread``. What tifffile reads silently wrong, a
segment that is not stored, too few segments or one that is cut short, is refused first: what is read at all is told
in ``storage.images.tiff_structure``.

Shape letters: C channels, H height, W width, S samples of a pixel stored together.
"""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.images.codestreams import (
    j2k_header,
    jxl_header,
    lerc_header,
    png_header,
    webp_header,
    whole_jpeg_header,
)
from storage.images.orientation import UPRIGHT, stored_box, upright
from storage.images.tiff_log import named
from storage.images.tiff_structure import TiffStructure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from storage.images.tiff_segments import Part, Plane
    from storage.place.files import Range

_JPEG_TABLES = b"\xff\xdb"  # the marker of tables of quantisation
SAMPLED_BYTES = 2**16  # of a segment
STREAM_HEADERS = {
    "JPEG": whole_jpeg_header,
    "JPEG 2000": j2k_header,
    "JPEG XL": jxl_header,
    "LERC": lerc_header,
    "PNG": png_header,
    "WebP": webp_header,
}


class TiffImage(TiffStructure):
    """Random access to the baseline image of a TIFF file; thread safe; see ``TiffStructure`` for its parameters."""

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
        if self.orientation == UPRIGHT:
            return self._read_stored(y, x, h, w)
        pixels = self._read_stored(*stored_box((y, x, h, w), self.shape[1:], self.orientation))
        return upright(pixels.transpose(1, 2, 0), self.orientation).transpose(2, 0, 1)

    def as_alpha(self, mask: NDArray[Any]) -> NDArray[Any]:
        """Turn the pixels of a mask into an alpha channel of this image: 0, or the largest value that there is."""
        largest = 1 if self.dtype.kind == "f" else 2**self.bits - 1 if self.bits else np.iinfo(self.dtype).max
        alpha: NDArray[Any] = (mask > 0) * self.dtype.type(largest)
        return alpha

    def _read_stored(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """Decode one box of the image as it is stored."""
        out = np.empty((self.shape[0], h, w), self.dtype)
        if self.mask is not None:
            out[-1:] = self.as_alpha(self.mask._read_stored(y, x, h, w))
        if h == 0 or w == 0:
            return out
        parts = list(product(self.planes, self._cut.parts(y, x, h, w)))
        data = self._file.read_ranges([wanted for plane, part in parts for wanted in self._ranges(plane, part)])
        for plane, part in parts:
            channels = slice(plane.first_channel, plane.first_channel + self._made)
            pixels = self._held(self._segment(plane, part.index, part, data))
            out[channels, *part.place] = pixels.transpose(2, 0, 1)
        return out

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return self._file.size

    @property
    def columns(self) -> int:
        """Segments side by side."""
        return self._cut.grid[1]

    def sample(self, count: int) -> Iterator[bytes]:
        """What is stored of some segments of the first plane, always the same ones."""
        plane = self.planes[0]
        stored = np.flatnonzero(plane.counts)
        chosen = stored[np.linspace(0, len(stored) - 1, min(count, len(stored))).astype(np.int64)]
        places = zip(plane.offsets[chosen].tolist(), plane.counts[chosen].tolist(), strict=True)
        return self._file.read_ranges([(offset, min(length, SAMPLED_BYTES)) for offset, length in places])

    def segments(self, plane: Plane, indexes: NDArray[np.int64]) -> Iterator[NDArray[Any]]:
        """Decode segments of a plane, as they are stored: (h, w, C) pixels of each, and of its channels, whole.

        Raises
        ------
        CorruptImageError, TransferError
            As `read`.
        """
        whole = [self._cut.whole(i) for i in indexes.tolist()]
        data = self._file.read_ranges([wanted for part in whole for wanted in self._ranges(plane, part)])
        for part in whole:
            yield self._held(self._segment(plane, part.index, part, data))

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
        stride = self._cut.segment_yx[1] * pixel
        if self._whole_rows(part):
            return [(offset + part.y0 * stride, (part.y1 - part.y0) * stride)]
        length = (part.x1 - part.x0) * pixel
        return [(offset + y * stride + part.x0 * pixel, length) for y in range(part.y0, part.y1)]

    def _whole_rows(self, part: Part) -> bool:
        return (part.x1 - part.x0) * 4 >= self._cut.segment_yx[1]

    def _segment(self, plane: Plane, i: int, part: Part, data: Iterator[bytes]) -> NDArray[Any]:
        """Make the (y1 - y0, x1 - x0, S) pixels of segment ``i`` of a plane, whose bytes come next in ``data``."""
        shape = (part.y1 - part.y0, part.x1 - part.x0, self._stored)
        wanted = self._ranges(plane, part)
        if not wanted:
            return np.full(shape, self._blank, self._file_dtype)
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
            with named(self.location):
                own = {"jpegheader": self._key.jpegheader} if self._key.jpegheader else {}  # of the pieces of an NDPI
                pixels, _, _ = self._decode(data, plane.first_index + i, jpegtables=plane.jpegtables, **own)
        except MemoryError as error:
            raise self._unsupported(
                f"{self._cut.where(i)} needs more memory than there is; use fewer workers"
            ) from error
        except Exception as error:  # each codec has its own errors
            bare = self._codec == "JPEG" and plane.jpegtables is None and _JPEG_TABLES not in data
            why = ": neither it nor the file has the tables of its quantisation" if bare else ""
            raise self._corrupt(f"{self._cut.where(i)} does not decode as {self._codec}{why}") from error
        if pixels is not None and self._codec == "CCITT":
            pixels = pixels.astype(bool)  # they came as bytes
        height, width = self._cut.inside(i)
        if pixels is None or pixels.shape[1] < height or pixels.shape[2] < width or pixels.dtype != self._key.dtype:
            raise self._corrupt(f"{self._cut.where(i)} decodes to other pixels than its header says")
        return np.asarray(pixels[0])

    def _check_stream(self, i: int, data: bytes) -> None:
        """Refuse an inner image that claims more pixels than the TIFF gives it, or is cut short."""
        if self._codec not in STREAM_HEADERS or self._key.jpegheader:
            return
        try:
            header = STREAM_HEADERS[self._codec](data)
        except ValueError as error:
            raise self._corrupt(f"{self._cut.where(i)} is damaged ({error})") from error
        too_many = self._codec != "WebP" and header.samples > self._stored
        height, width = self._cut.segment_yx
        if header.height > height or header.width > width or too_many:
            claim = f"{header.height} x {header.width} pixels of {header.samples} samples"
            raise self._corrupt(f"{self._cut.where(i)} is damaged ({self._codec} of {claim})")
