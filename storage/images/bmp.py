"""Read a BMP: uncompressed, of 24 or 32 bits, or of 1, 4 or 8 with a palette (Microsoft, BITMAPINFOHEADER).

Shape letters: H height, W width.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.images.codestreams import StreamHeader

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADERS = (40, 52, 56, 108, 124)  # how many bytes the second header may have: BITMAPINFOHEADER and its extensions
PLAIN, OTHER = 0, 1  # kinds: read, or not
_BITS = (1, 4, 8, 24, 32)  # of a pixel


def bmp_header(data: bytes) -> StreamHeader:
    """Read the two headers; all rows must be there. Its ``bits`` are those of a sample of what is decoded.

    The ``kind`` is ``OTHER`` where rows are compressed or have a depth that is not read.
    """
    if len(data) < 54:
        raise ValueError("a BMP header that is cut short")
    start, width, height, bits, compression = _fields(data)
    if compression == 0 and start + _row_bytes(width, bits) * abs(height) > len(data):
        raise ValueError("a BMP that is cut short")
    if compression != 0 or bits not in _BITS:
        return StreamHeader(abs(height), width, 1, bits, kind=OTHER)
    grey = bits <= 8 and _is_grey(_palette(data))
    return StreamHeader(abs(height), width, 1 if grey else 3, 8, kind=PLAIN)


def bmp_decode(data: bytes) -> NDArray[Any]:
    """Decode a BMP that is ``PLAIN`` by its header.

    Returns
    -------
    (H, W, 3) uint8, or (H, W, 1) where the colours of a palette are all grey

    Raises
    ------
    ValueError
        A pixel has a colour that the palette lacks.
    """
    start, width, height, bits, _ = _fields(data)
    row = _row_bytes(width, bits)
    rows = np.frombuffer(data, np.uint8, row * abs(height), start).reshape(abs(height), row)
    rows = rows if height < 0 else rows[::-1]  # the last row comes first
    if bits > 8:
        return rows[:, : width * bits // 8].reshape(abs(height), width, bits // 8)[..., 2::-1]
    palette = _palette(data)
    steps = np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    numbers = (rows[:, :, None] >> steps & (2**bits - 1)).reshape(abs(height), -1)[:, :width]
    if numbers.max(initial=0) >= len(palette):
        raise ValueError("a colour that its palette lacks")
    pixels: NDArray[Any] = palette[numbers]
    return pixels[..., :1] if _is_grey(palette) else pixels


def _fields(data: bytes) -> tuple[int, int, int, int, int]:
    """First byte of the pixels, width, height (negative: the first row comes first), bits of a pixel, compression."""
    start, width, height, bits, compression = struct.unpack("<10xI4xii2xHI", data[:34])
    return start, width, height, bits, compression


def _row_bytes(width: int, bits: int) -> int:
    return (width * bits + 31) // 32 * 4


def _palette(data: bytes) -> NDArray[np.uint8]:
    """(N, 3) red, green and blue; they are stored as blue, green, red and a byte of no meaning."""
    first, start = 14 + int.from_bytes(data[14:18], "little"), int.from_bytes(data[10:14], "little")
    bits, used = int.from_bytes(data[28:30], "little"), int.from_bytes(data[46:50], "little")
    count = min(max(0, min(start, len(data)) - first) // 4, used or 2**bits, 2**bits)
    return np.frombuffer(data[first : first + 4 * count], np.uint8).reshape(-1, 4)[:, 2::-1]


def _is_grey(palette: NDArray[np.uint8]) -> bool:
    return bool((palette == palette[:, :1]).all())
