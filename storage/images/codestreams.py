"""Read what an encoded image says about itself from its first bytes, before any decoder allocates for it.

The kinds are JPEG (ITU T.81), JPEG 2000 (ITU T.800), JPEG XL (ISO 18181), WebP (RFC 9649), PNG (ISO 15948) and LERC
(https://github.com/Esri/lerc/blob/master/doc/lerc2_format.md). Each function raises
``ValueError`` where the stream is not of its kind or is cut short; the numbers are what the stream claims, and may
lie.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

JPEG_MAGIC = b"\xff\xd8\xff"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JXL_BOX, JXL_MAGIC = b"\0\0\0\x0cJXL \r\n\x87\n", b"\xff\x0a"
LERC_MAGIC = b"Lerc2 "
JP2_MAGIC = b"\0\0\0\x0cjP  "
J2K_MAGIC = b"\xff\x4f\xff\x51"
# libjpeg decodes these frames to 8 bits: baseline, extended and progressive Huffman.
JPEG_FRAMES = (0xC0, 0xC1, 0xC2)
MAX_J2K_TILES = 256  # a stream normally has one, and a decoder allocates kilobytes for each
ORIENTATION = 274  # the EXIF tag


@dataclass(frozen=True, slots=True)
class StreamHeader:
    """The size and the kind of pixels of one encoded image."""

    height: int
    width: int
    samples: int = 1  # components of a pixel
    bits: int = 8  # bits of a sample
    kind: int = 0  # the frame's marker of a JPEG, or the colour type of a PNG
    orientation: int = 1  # by EXIF, where 1 is upright


def whole_jpeg_header(data: bytes) -> StreamHeader:
    """Read a JPEG's frame header and EXIF orientation, if there is one; it must run to its end marker."""
    header = _jpeg_header(data)
    if not _jpeg_is_whole(data):
        raise ValueError("a JPEG that is cut short")
    return header


def _jpeg_header(data: bytes) -> StreamHeader:
    orientation = 1
    for marker, body in _jpeg_segments(data):
        if marker == 0xE1 and body[:6] == b"Exif\0\0":
            orientation = exif_orientation(body[6:])
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if len(body) < 6:
                break
            bits, height, width, samples = struct.unpack(">BHHB", body[:6])
            return StreamHeader(height, width, samples, bits, marker, orientation)
    raise ValueError("no JPEG frame header")


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield marker and contents of the segments before the first scan."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xFF:  # fill bytes may precede a marker
            position += 1
            continue
        yield marker, data[position + 4 : position + 2 + length]
        if marker == 0xDA:
            return
        position += 2 + length


def _jpeg_is_whole(data: bytes) -> bool:
    """Tell whether a JPEG runs to its end marker; a decoder fills what is missing with grey."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == 0xD9:
            return True
        if marker == 0xFF:
            position += 1
            continue
        position += 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:  # behind its header lies entropy-coded data, up to the next marker that is no restart
            found = _MARKER.search(data, position)
            if found is None:
                return False
            position = found.start()
    return data[position : position + 2] == b"\xff\xd9"


_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")


def exif_orientation(exif: bytes) -> int:
    """Read the orientation, 1 to 8, from a block of EXIF; it is 1 where there is none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    start = struct.unpack(order + "I", exif[4:8])[0]
    entries = exif[start + 2 :]
    count = int.from_bytes(exif[start : start + 2], "little" if order == "<" else "big")
    for i in range(min(count, len(entries) // 12)):
        tag, kind, _, value = struct.unpack(order + "HHIH", entries[12 * i : 12 * i + 10])
        if tag == ORIENTATION and kind == 3:
            return value if 1 <= value <= 8 else 1
    return 1


def j2k_header(data: bytes) -> StreamHeader:
    """Read the SIZ segment of a JPEG 2000 codestream, bare or in a JP2 file."""
    start = _j2k_start(data)
    body = data[start + 6 :]
    if data[start : start + 4] != J2K_MAGIC or len(body) < 36:
        raise ValueError("no JPEG 2000 size header")
    right, bottom, left, top, tile_w, tile_h, tile_x, tile_y, samples = struct.unpack(">2x8IH", body[:36])
    parts = body[36 : 36 + 3 * samples]
    if right <= left or bottom <= top or not tile_w or not tile_h or len(parts) < 3 * samples or not samples:
        raise ValueError("a JPEG 2000 size header that makes no sense")
    if -(-(right - tile_x) // tile_w) * -(-(bottom - tile_y) // tile_h) > MAX_J2K_TILES:
        raise ValueError(f"a JPEG 2000 stream of more than {MAX_J2K_TILES} tiles")
    if any(step != 1 for i in range(samples) for step in parts[3 * i + 1 : 3 * i + 3]):
        raise ValueError("JPEG 2000 components of different sizes")
    return StreamHeader(bottom - top, right - left, samples, (parts[0] & 0x7F) + 1)


def _j2k_start(data: bytes) -> int:
    """Find where the codestream begins: at once, or in the ``jp2c`` box of a JP2 file."""
    if not data.startswith(JP2_MAGIC):
        return 0
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        header = 16 if length == 1 else 8
        if kind == b"jp2c":
            return position + header
        if length == 1:
            length = int.from_bytes(data[position + 8 : position + 16], "big")
        if length < header:
            break
        position += length
    raise ValueError("no JPEG 2000 codestream")


def jxl_header(data: bytes) -> StreamHeader:
    """Read the size of a JPEG XL codestream, bare or in a container."""
    start = _jxl_start(data)
    if data[start : start + 2] != JXL_MAGIC:
        raise ValueError("no JPEG XL codestream")
    bits, place = int.from_bytes(data[start + 2 : start + 16], "little"), 0

    def take(count: int) -> int:
        nonlocal place
        place += count
        return bits >> (place - count) & ((1 << count) - 1)

    def side(*, in_eights: int) -> int:
        return 8 * (1 + take(5)) if in_eights else 1 + take((9, 13, 18, 30)[take(2)])

    in_eights = take(1)
    height = side(in_eights=in_eights)
    ratio = take(3)
    if not ratio:
        return StreamHeader(height, side(in_eights=in_eights))
    over, under = ((1, 1), (6, 5), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))[ratio - 1]
    return StreamHeader(height, height * over // under)


def _jxl_start(data: bytes) -> int:
    """Find where the codestream begins: at once, or in the first ``jxlc`` or ``jxlp`` box."""
    if not data.startswith(JXL_BOX):
        return 0
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind in (b"jxlc", b"jxlp"):
            return position + (8 if length != 1 else 16) + (4 if kind == b"jxlp" else 0)
        if length < 8:
            break
        position += length
    raise ValueError("no JPEG XL codestream")


def lerc_header(data: bytes) -> StreamHeader:
    """Read the header of a LERC blob, all of whose pixels must be valid."""
    if not data.startswith(LERC_MAGIC) or len(data) < 40:
        raise ValueError("no LERC header")
    version = int.from_bytes(data[6:10], "little")
    numbers = struct.unpack("<5i", data[14:34] if version >= 3 else data[10:30])
    (height, width), (samples, valid) = numbers[:2], numbers[2:4] if version >= 4 else (1, numbers[2])
    if valid != height * width:  # decoders make zeros of the others
        raise ValueError("a LERC with a mask of its pixels, which is not read; store it with another compression")
    return StreamHeader(height, width, samples)


def webp_header(data: bytes) -> StreamHeader:
    """Read the largest size that any part of a still WebP claims."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("not a WebP stream")
    sizes = [_webp_size(kind, body) for kind, body in _riff_chunks(data) if kind in (b"VP8X", b"VP8 ", b"VP8L")]
    if not sizes:
        raise ValueError("no WebP image header")
    return StreamHeader(max(h for h, _ in sizes), max(w for _, w in sizes), 4)


def _riff_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield kind and first ten bytes of each chunk."""
    position = 12
    while position + 8 <= len(data):
        kind, length = struct.unpack("<4sI", data[position : position + 8])
        yield kind, data[position + 8 : position + 18]
        position += 8 + length + length % 2


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Read the height and width that a chunk claims."""
    if len(body) < 10:
        raise ValueError("a WebP header that is cut short")
    if kind == b"VP8X":  # flags, then width - 1 and height - 1 in 24 bits each
        return 1 + int.from_bytes(body[7:10], "little"), 1 + int.from_bytes(body[4:7], "little")
    if kind == b"VP8 ":  # frame tag and start code, then width and height in 14 bits each
        width, height = struct.unpack("<HH", body[6:10])
        return height & 0x3FFF, width & 0x3FFF
    packed = int.from_bytes(body[1:5], "little")  # VP8L: width - 1 and height - 1 in 14 bits each
    return 1 + (packed >> 14 & 0x3FFF), 1 + (packed & 0x3FFF)


def png_header(data: bytes) -> StreamHeader:
    """Read a PNG's header and EXIF orientation; all its chunks, up to the end marker, must be there."""
    header, orientation = None, 1
    samples = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
    for kind, start, length in _png_chunks(data):
        if kind == b"IHDR" and length >= 13:
            width, height, bits, colour = struct.unpack(">IIBB", data[start : start + 10])
            if colour not in samples:
                raise ValueError(f"a PNG of colour type {colour}")
            header = (height, width, samples[colour], bits, colour)
        elif kind == b"eXIf":
            orientation = exif_orientation(data[start : start + length])
        elif kind == b"tRNS" and header is not None and header[2] % 2:
            header = (header[0], header[1], header[2] + 1, *header[3:])  # decoders make it a sample of its own
        elif kind == b"IEND":
            if header is None:
                break
            return StreamHeader(*header, orientation=orientation)
    raise ValueError("a PNG that is cut short")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield kind, place and length of the contents of each chunk that lies wholly in the data."""
    position = len(PNG_MAGIC)
    while position + 8 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if position + 12 + length > len(data):
            return
        yield kind, position + 8, length
        position += 12 + length
