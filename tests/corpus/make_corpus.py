"""Bad inputs, and a few odd good ones, as small files: every kind that ``reliability.md`` names or that we ever met.

    python make_corpus.py FOLDER

writes the files and ``corpus.json``: what each must come to. Run again it writes the same bytes.

- ``refused``: by the first look at its headers
- ``damaged``: by the first look or when its pixels are read
- ``read``: its pixels equal the reference decoder's
- ``any``: either ``damaged`` or ``read``; never anything else
"""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

import imagecodecs
import numpy as np
import tifffile
from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Iterator

Case = tuple[str, bytes, str]  # file name, contents, what it must come to

WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, SAMPLES, ROWS_PER_STRIP, STRIP_COUNTS, PLANAR, PREDICTOR = 273, 277, 278, 279, 284, 317
TILE_WIDTH, TILE_LENGTH, OFFSETS, COUNTS, SUB_IFDS, FORMAT = 322, 323, 324, 325, 330, 339
FORMATS = {1: "B", 3: "H", 4: "I"}


def picture(height: int = 160, width: int = 200, channels: int = 3) -> np.ndarray:
    """(H, W, C) uint8 with edges, a ramp and noise."""
    rng = np.random.default_rng(height * width)
    cells = np.kron(rng.integers(0, 200, (height // 16 + 1, width // 16 + 1, channels)), np.ones((16, 16, 1)))
    return (cells[:height, :width] + rng.integers(0, 40, (height, width, channels))).astype(np.uint8)


def tiff(pixels: np.ndarray | None = None, **settings: object) -> bytes:
    """A sound TIFF: little-endian, tiled by 64, RGB and deflate unless told otherwise."""
    pixels = picture() if pixels is None else pixels
    defaults = {"photometric": "rgb", "tile": (64, 64), "compression": "deflate", "metadata": None}
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **(defaults | settings))
    return buffer.getvalue()


def entry(data: bytes, tag: int) -> int:
    """Place of a tag's twelve bytes in the first directory of a classic little-endian TIFF."""
    start = struct.unpack_from("<I", data, 4)[0]
    for i in range(struct.unpack_from("<H", data, start)[0]):
        if struct.unpack_from("<H", data, start + 2 + 12 * i)[0] == tag:
            return start + 2 + 12 * i
    raise KeyError(tag)


def values(data: bytes, tag: int) -> tuple[int, str, list[int]]:
    """Place, format and values of a tag."""
    place = entry(data, tag)
    _, kind, count = struct.unpack_from("<HHI", data, place)
    form = f"<{count}{FORMATS[kind]}"
    start = place + 8 if struct.calcsize(form) <= 4 else struct.unpack_from("<I", data, place + 8)[0]
    return start, form, list(struct.unpack_from(form, data, start))


def change(data: bytes, tag: int, index: int, value: int) -> bytes:
    """Replace one value of a tag."""
    start, form, old = values(data, tag)
    old[index] = value
    out = bytearray(data)
    struct.pack_into(form, out, start, *old)
    return bytes(out)


def tagged(tag: int, value: int, pixels: np.ndarray | None = None, **settings: object) -> bytes:
    """A TIFF with one more tag, which tifffile would not write: a private one is written and renamed."""
    data = tiff(pixels, **settings, extratags=[(65000, "H", 1, value, True)])
    return put(data, entry(data, 65000), struct.pack("<H", tag))


def with_subifds(offsets: list[int]) -> bytes:
    """A TIFF whose first directory claims others below it, in a list at the end of the file."""
    data = tiff(extratags=[(65000, "I", 2, (0, 0), True)])
    place = entry(data, 65000)
    data = recount(put(data, place, struct.pack("<H", SUB_IFDS)), SUB_IFDS, len(offsets))
    return put(data, place + 8, struct.pack("<I", len(data))) + struct.pack(f"<{len(offsets)}I", *offsets)


def recount(data: bytes, tag: int, count: int) -> bytes:
    """Replace the number of values of a tag."""
    out = bytearray(data)
    struct.pack_into("<I", out, entry(data, tag) + 4, count)
    return bytes(out)


def put(data: bytes, place: int, new: bytes) -> bytes:
    """Overwrite bytes."""
    return data[:place] + new + data[place + len(new) :]


def retile(data: bytes, index: int, tile: bytes) -> bytes:
    """Point one tile at new bytes at the end of the file."""
    start = len(data)
    return change(change(data + tile, OFFSETS, index, start), COUNTS, index, len(tile))


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One chunk of a PNG with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that claims what it is told to, around given compressed data."""
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", head) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def not_images() -> Iterator[Case]:
    """Files of no kind that is read."""
    yield "empty.tif", b"", "refused"
    yield "one-byte.tif", b"I", "refused"
    yield "text.tif", b"hello world, this is text", "refused"
    yield "zeros.tif", bytes(4096), "refused"
    yield "gif.tif", b"GIF89a" + bytes(100), "refused"
    yield "magic-only.tif", b"II*\0", "refused"
    yield "magic-only.png", b"\x89PNG\r\n\x1a\n", "refused"
    yield "magic-only.jpg", b"\xff\xd8\xff", "refused"


def truncated() -> Iterator[Case]:
    """Sound files that end too early."""
    for name, data in [("classic", tiff(compression=None)), ("big", tiff(compression=None, bigtiff=True))]:
        cuts = {8, 9, 12, 15, 16, 17, 40, 100, 150, 200, 250, 300, 400, 500, len(data) // 2, len(data) - 1}
        for cut in sorted(cuts):
            yield f"truncated-{name}-{cut}.tif", data[:cut], "refused"
    for name, encode in [
        ("png", imagecodecs.png_encode),
        ("jpg", imagecodecs.jpeg8_encode),
        ("bmp", imagecodecs.bmp_encode),
    ]:
        data = encode(picture())
        for cut in (10, 30, 60, 200, len(data) // 2, len(data) - 20, len(data) - 3):
            yield f"truncated-{cut}.{name}", data[:cut], "refused"


def directories() -> Iterator[Case]:
    """Chains of directories that lead nowhere, round, or on for ever."""
    data = tiff()
    start = struct.unpack_from("<I", data, 4)[0]
    after = start + 2 + 12 * struct.unpack_from("<H", data, start)[0]
    yield "first-ifd-past-end.tif", put(data, 4, struct.pack("<I", len(data) + 1000)), "refused"
    yield "first-ifd-zero.tif", put(data, 4, bytes(4)), "refused"
    yield "first-ifd-in-pixels.tif", put(data, 4, struct.pack("<I", values(data, OFFSETS)[2][1])), "refused"
    yield "circular-one.tif", put(data, after, struct.pack("<I", start)), "refused"
    two = struct.pack("<HHHIII", 1, WIDTH, 3, 1, 1, start)
    yield "circular-two.tif", put(data, after, struct.pack("<I", len(data))) + two, "refused"
    yield "next-ifd-past-end.tif", put(data, after, struct.pack("<I", 2**31)), "refused"
    chain = b"".join(struct.pack("<HHHIII", 1, WIDTH, 3, 1, 1, 8 + 18 * (i + 1)) for i in range(100_000))
    yield "100k-ifds.tif", b"II*\0" + struct.pack("<I", 8) + chain, "refused"
    yield "65535-tags.tif", b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535 + 4), "refused"
    for name, tag in [("subifd", SUB_IFDS), ("exif", 34665), ("gps", 34853)]:
        yield f"{name}-circle.tif", tagged(tag, start), "any"
        yield f"{name}-past-end.tif", tagged(tag, 65535), "any"
    for name, count in [("2-subifds-circle", 2), ("200k-subifds", 200_000)]:
        yield f"{name}.tif", with_subifds([start] * count), "refused"


def segments() -> Iterator[Case]:
    """Tiles that are not where the header says."""
    plain, packed = tiff(compression=None), tiff()
    offsets, counts = values(plain, OFFSETS)[2], values(plain, COUNTS)[2]
    yield "tile-past-end.tif", change(plain, OFFSETS, 3, 2**31), "refused"
    yield "tile-offset-max.tif", change(plain, OFFSETS, 3, 2**32 - 1), "refused"
    yield "tile-offset-zero.tif", change(plain, OFFSETS, 3, 0), "refused"
    yield "tile-length-zero.tif", change(plain, COUNTS, 3, 0), "refused"
    yield "sparse.tif", change(change(plain, OFFSETS, 3, 0), COUNTS, 3, 0), "refused"
    yield "tile-length-max.tif", change(packed, COUNTS, 3, 2**31 - 1), "refused"
    yield "tile-length-long.tif", change(plain, COUNTS, 3, counts[3] + 64), "refused"
    yield "tile-length-short.tif", change(plain, COUNTS, 3, counts[3] - 1), "refused"
    yield "tile-length-short-packed.tif", change(packed, COUNTS, 3, values(packed, COUNTS)[2][3] - 9), "damaged"
    yield "tiles-overlap.tif", change(plain, OFFSETS, 3, offsets[2] + 5), "refused"
    yield "tiles-shared.tif", change(plain, OFFSETS, 3, offsets[2]), "read"
    yield "too-few-offsets.tif", recount(plain, OFFSETS, 11), "refused"
    yield "too-few-lengths.tif", recount(plain, COUNTS, 11), "refused"
    yield "too-many-offsets.tif", recount(plain, OFFSETS, 2**30), "refused"
    strips = tiff(tile=None, rowsperstrip=16)
    yield "too-few-strips.tif", recount(recount(strips, STRIP_OFFSETS, 9), STRIP_COUNTS, 9), "refused"
    yield "strip-length-short.tif", change(strips, STRIP_COUNTS, 4, 100), "damaged"


def claims() -> Iterator[Case]:
    """Headers that claim too much, or nonsense."""
    data = tiff()
    for side in (60000, 65535):
        yield f"claims-{side}.tif", change(change(data, WIDTH, 0, side), LENGTH, 0, side), "refused"
    one = tiff(picture(64, 64))
    yield (
        "claims-60000-in-one-strip.tif",
        change(change(tiff(picture(64, 64), tile=None), WIDTH, 0, 60000), LENGTH, 0, 60000),
        "refused",
    )
    yield "samples-65529.tif", change(data, SAMPLES, 0, 65529), "refused"
    yield "samples-0.tif", change(data, SAMPLES, 0, 0), "refused"
    yield "samples-0-of-channels.ome.tif", change(seeds()["image.ome.tif"], SAMPLES, 0, 0), "refused"
    yield "tile-65520.tif", change(change(one, TILE_WIDTH, 0, 65520), TILE_LENGTH, 0, 65520), "refused"
    yield "tile-larger-than-image.tif", tiff(picture(20, 30), tile=(256, 256)), "read"
    yield "tile-0.tif", change(data, TILE_WIDTH, 0, 0), "refused"
    yield "width-0.tif", change(data, WIDTH, 0, 0), "refused"
    for tag, value in [(COMPRESSION, 9999), (PHOTOMETRIC, 32803), (PLANAR, 9)]:
        yield f"tag-{tag}-is-{value}.tif", change(data, tag, 0, value), "refused"
    yield "bits-7.tif", put(data, values(data, BITS)[0], struct.pack("<HHH", 7, 7, 7)), "any"
    yield "bits-differ.tif", change(data, BITS, 1, 16), "refused"
    yield "format-9.tif", tagged(FORMAT, 9), "refused"
    yield "predictor-9.tif", change(tiff(predictor=True), PREDICTOR, 0, 9), "damaged"
    strip = tiff(picture(channels=1)[..., 0], tile=None, photometric="minisblack", rowsperstrip=160)
    yield "rows-per-strip-0.tif", change(strip, ROWS_PER_STRIP, 0, 0), "any"


def descriptions() -> Iterator[Case]:
    """Metadata that tifffile acts upon."""
    grey = picture(channels=1)[..., 0]
    pixels = (
        '<Pixels DimensionOrder="XYCZT" Type="uint8" SizeX="200" SizeY="160" SizeZ="{z}" SizeC="{c}" SizeT="{t}">'
        '<Channel SamplesPerPixel="1"/><TiffData {data}/></Pixels>'
    )
    wrap = '<?xml version="1.0"?>{head}<OME><Image>{body}</Image></OME>'

    def ome(data: str, head: str = "", z: int = 1, c: int = 1, t: int = 1) -> bytes:
        text = wrap.format(head=head, body=pixels.format(z=z, c=c, t=t, data=data))
        return tiff(grey, photometric="minisblack", description=text)

    yield "ome-sound.ome.tif", ome('IFD="0" PlaneCount="1"'), "read"
    yield "ome-billion-planes.ome.tif", ome('IFD="0" PlaneCount="1000000000"'), "refused"
    yield "ome-billion-numplanes.ome.tif", ome('IFD="0" NumPlanes="1000000000"'), "refused"
    yield "ome-billion-channels.ome.tif", ome('FirstC="900000000"', c=1_000_000_000), "refused"
    yield "ome-many-axes.ome.tif", ome('FirstT="999" FirstC="999"', z=1000, c=1000, t=1000), "refused"
    yield "ome-negative.ome.tif", ome('IFD="-5" PlaneCount="-7"'), "any"
    yield "ome-missing-plane.ome.tif", ome('IFD="7" PlaneCount="1"', c=2), "any"
    along = '<ModuloAlongZ Type="angle" Start="0" End="1e10"/>'
    annotation = f'<XMLAnnotation ID="A" Namespace="modulo"><Value><Modulo>{along}</Modulo></Value></XMLAnnotation>'
    labels = f"<OME><StructuredAnnotations>{annotation}</StructuredAnnotations></OME>"
    yield "ome-billion-labels.ome.tif", tiff(grey, photometric="minisblack", description=labels), "refused"
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    yield "ome-laughs.ome.tif", ome('IFD="&l9;"', f'<!DOCTYPE O [<!ENTITY l0 "ha">{laughs}]>'), "any"
    broken = tiff(grey, photometric="minisblack", description='<?xml version="1.0"?><OME><Image></OME>')
    yield "ome-broken.ome.tif", broken, "any"
    scn = '<scn><collection><image sizeZ="1"><pixels>{}</pixels></image></collection></scn>'
    for name, text in [
        ("imagej", "ImageJ=1.11a\nimages=1000000000\nslices=1000000000\nhyperstack=true\n"),
        ("shaped", '{"shape": [1000000000, 160, 200]}'),
        ("shaped-negative", '{"shape": [-1, 160, 200]}'),
        ("fluoview", "MM_Head" + "9" * 100),
        ("scanimage", "SI.hChannels.channelSave = [" + "1;" * 5000 + "]\nscanimage.SI"),
        ("svs", "Aperio Image Library\nx|MPP = 1e5e5e|AppMag = 20"),
        ("scn", scn.format('<dimension ifd="9999"/>')),
        ("scn-channels", scn.format('<dimension ifd="0" c="100000000"/>')),
    ]:
        yield f"description-{name}.tif", tiff(grey, photometric="minisblack", description=text), "any"


def bombs() -> Iterator[Case]:
    """Few bytes that decode to many."""
    data = tiff()
    zeros = zlib.compress(bytes(64 * 2**20), 9)
    yield "deflate-bomb-tile.tif", retile(data, 2, zeros), "any"
    zstd = tiff(compression="zstd")
    yield "zstd-bomb-tile.tif", retile(zstd, 2, imagecodecs.zstd_encode(bytes(64 * 2**20))), "any"
    huge = bytes.fromhex("28b52ffd e0 00000000ffffffff 010000")  # a frame of 2^64 bytes
    yield "zstd-claims-all.tif", retile(zstd, 2, huge), "damaged"
    yield "lzma-dictionary.tif", retile(tiff(compression="lzma"), 2, lzma_with_dictionary()), "any"
    yield "png-bomb.png", png(30000, 30000, zlib.compress(bytes(2**20), 9)), "refused"
    yield "png-claims-100000.png", png(100_000, 100_000, zlib.compress(b"x")), "refused"
    yield "png-claims-max.png", png(2**31 - 1, 2**31 - 1, zlib.compress(b"x")), "refused"
    jpeg = imagecodecs.jpeg8_encode(picture())
    yield "jpeg-claims-65500.jpg", put(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 65500, 65500)), "refused"
    yield "jpeg-claims-4000.jpg", put(jpeg, jpeg.index(b"\xff\xc0") + 5, struct.pack(">HH", 4000, 4000)), "any"


def lzma_with_dictionary() -> bytes:
    """Return an xz stream whose header asks for a dictionary of 1.5 GB."""
    import lzma

    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": 2**20, "preset": 0}]
    data = bytearray(lzma.compress(bytes(64 * 64 * 3), format=lzma.FORMAT_XZ, filters=filters))
    size = (data[12] + 1) * 4  # of the block header; its last four bytes are its checksum
    place = data.index(b"\x21\x01", 12) + 2
    data[place] = 37  # 1.5 GB
    struct.pack_into("<I", data, 12 + size - 4, zlib.crc32(bytes(data[12 : 12 + size - 4])))
    return bytes(data)


def streams() -> Iterator[Case]:
    """Tiles whose own headers lie, or whose bytes were overwritten."""
    data = tiff()
    start = values(data, OFFSETS)[2][5]
    yield "deflate-overwritten.tif", put(data, start + 60, b"\xff" * 16), "damaged"
    for name, compression in [("lzw", "lzw"), ("jpeg", "jpeg")]:
        data = tiff(compression=compression)
        start, size = values(data, OFFSETS)[2][5], values(data, COUNTS)[2][5]
        yield f"{name}-overwritten.tif", put(data, start + size // 2, b"\x55" * 16), "any"
    for name, compression, marker, after, lie in [
        ("jpeg", "jpeg", b"\xff\xc0", 5, struct.pack(">HH", 65500, 65500)),
        ("jpeg-0", "jpeg", b"\xff\xc0", 5, struct.pack(">HH", 0, 0)),
        ("jpeg2000", "jpeg2000", b"\xff\x51", 6, struct.pack(">II", 10**6, 10**6)),
        ("jpeg2000-negative", "jpeg2000", b"\xff\x51", 14, struct.pack(">II", 10**6, 10**6)),
        ("jpeg2000-tiles", "jpeg2000", b"\xff\x51", 22, struct.pack(">II", 1, 1)),
        ("jpeg2000-samples", "jpeg2000", b"\xff\x51", 38, struct.pack(">H", 16384)),
        ("webp", "webp", b"VP8L", 9, struct.pack("<I", 0x0FFFFFFF)),
    ]:
        data = tiff(compression=compression)
        place = data.index(marker, values(data, OFFSETS)[2][0])
        yield f"lying-{name}.tif", put(data, place + after, lie), "damaged"
    huge = imagecodecs.webp_encode(np.zeros((4000, 4000, 3), np.uint8), lossless=True)
    yield "huge-webp-tile.tif", retile(tiff(compression="webp"), 0, huge), "damaged"
    yield "jpeg-cut-tile.tif", change(tiff(compression="jpeg"), COUNTS, 0, 900), "damaged"


def kinds() -> Iterator[Case]:
    """Sound files of every kind that is read, and of those that are refused by name."""
    rng = np.random.default_rng(0)
    grey = picture(channels=1)[..., 0]
    floats = rng.normal(size=(80, 90)).astype(np.float32)
    floats[3, 4], floats[50, 60] = np.nan, np.inf
    black = {"photometric": "minisblack"}
    for name, data in {
        "float-nan": tiff(floats, **black),
        "float64": tiff(floats.astype(np.float64), **black, predictor=True),
        "int16": tiff(grey.astype(np.int16) - 99, **black),
        "one-pixel": tiff(grey[:1, :1], **black, tile=None),
        "one-row": tiff(grey[:1], **black),
        "one-column": tiff(grey[:, :1], **black),
        "white-is-zero": tiff(grey, photometric="miniswhite"),
        "cmyk": tiff(picture(channels=4), photometric="separated"),
        "alpha": tiff(picture(channels=4), extrasamples=["unassalpha"]),
        "planar": tiff(picture().transpose(2, 0, 1), planarconfig="separate"),
        "jpeg": tiff(compression="jpeg"),
        "jpeg2000": tiff(compression="jpeg2000"),
        "webp": tiff(compression="webp"),
        "jpegxl": tiff(compression="jpegxl"),
        "png": tiff(compression="png"),
        "lerc": tiff(compression="lerc"),
        "orientation": tagged(274, 6),
        "65-channels": tiff(np.zeros((20, 20, 65), np.uint8), **black, planarconfig="contig"),
        "fill-order-2": fill_order_2(),
        "one-bit": tiff(grey > 99, **black),
        "four-bits": tiff(grey >> 4, **black, tile=None, compression=None, bitspersample=4),
        "twelve-bits": tiff(grey.astype(np.uint16) << 4, **black, tile=None, compression=None, bitspersample=12),
        "group-4": fax(grey > 99),
        "int8": tiff((grey >> 1).astype(np.int8) - 64, **black),
        "int32": tiff(grey.astype(np.int32) << 20, **black),
        "uint32": tiff(grey.astype(np.uint32) << 24, **black),
        "float16": tiff(floats.astype(np.float16), **black),
        "palette": tiff(grey, photometric="palette", colormap=rng.integers(0, 256, (3, 256), np.uint16) * 257),
    }.items():
        yield f"kind-{name}.tif", data, "read"
    for name, data in {
        "int64": tiff(grey.astype(np.int64), **black),
        "complex": tiff(floats.astype(np.complex64), **black),
        "cielab": tiff(photometric="cielab"),
        "ycbcr": tiff(photometric="ycbcr", subsampling=(1, 1)),
        "camera": tiff(grey, photometric="cfa"),
        "stack": tiff(np.stack([grey] * 5), **black),
        "volume": tiff(np.stack([grey[:64, :64]] * 16), **black, volumetric=True, tile=(16, 16, 16)),
        "1025-channels": tiff(np.zeros((20, 20, 1025), np.uint8), **black, planarconfig="contig"),
    }.items():
        yield f"kind-{name}.tif", data, "refused"
    yield "grey.png", imagecodecs.png_encode(grey), "read"
    yield "colour-16.png", imagecodecs.png_encode(picture().astype(np.uint16) * 250), "read"
    yield "colour.jpg", imagecodecs.jpeg8_encode(picture()), "read"
    yield "colour.bmp", imagecodecs.bmp_encode(picture()), "read"
    yield "grey.bmp", imagecodecs.bmp_encode(grey), "read"
    yield "png-overwritten.png", put(imagecodecs.png_encode(picture()), 500, b"\x55" * 16), "refused"
    yield "png-one-bit.png", png(8, 1, zlib.compress(b"\0\xaa"), bits=1, colour=0), "read"
    yield "png-palette-missing.png", png(4, 1, zlib.compress(b"\0\0\0\0\0"), colour=3), "refused"


def fax(pixels: np.ndarray) -> bytes:
    """A TIFF of one bit a pixel, compressed as fax machines do."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "TIFF", compression="group4")
    return buffer.getvalue()


def fill_order_2() -> bytes:
    """Return a TIFF whose bytes are stored with their bits reversed."""
    return tagged(FILL_ORDER, 2, compression=None)


def cases() -> Iterator[Case]:
    """All of them."""
    for group in (
        not_images,
        truncated,
        directories,
        segments,
        claims,
        descriptions,
        bombs,
        streams,
        kinds,
    ):
        yield from group()


def seeds() -> dict[str, bytes]:
    """Sound small files whose bytes a fuzzer may change."""
    small = picture(90, 100)
    options = {"tile": (48, 48)}
    progressive = io.BytesIO()
    Image.fromarray(small).save(progressive, "JPEG", progressive=True)
    lossy = {"lossless": False, "level": 70}
    buffer = io.BytesIO()
    metadata = {"axes": "CYX", "Channel": {"Name": ["a", "b", "c"]}}
    tifffile.imwrite(buffer, small.transpose(2, 0, 1), ome=True, photometric="minisblack", metadata=metadata)
    return {
        "deflate.tif": tiff(small, **options, predictor=True),
        "big.tif": tiff(small, **options, bigtiff=True),
        "lzw.tif": tiff(small, tile=None, rowsperstrip=20, compression="lzw"),
        "jpeg.tif": tiff(small, **options, compression="jpeg"),
        "jpeg2000.tif": tiff(small, **options, compression="jpeg2000"),
        "webp.tif": tiff(small, **options, compression="webp"),
        "webp-lossy.tif": tiff(small, **options, compression="webp", compressionargs=lossy),
        "zstd.tif": tiff(small, **options, compression="zstd"),
        "jpegxl.tif": tiff(small, **options, compression="jpegxl"),
        "png.tif": tiff(small, **options, compression="png"),
        "lerc.tif": tiff(small, **options, compression="lerc"),
        "packbits.tif": tiff(small, **options, compression="packbits"),
        "lzma.tif": tiff(small, **options, compression="lzma"),
        "image.ome.tif": buffer.getvalue(),
        "image.png": imagecodecs.png_encode(small),
        "image.jpg": imagecodecs.jpeg8_encode(small, level=85),
        "image.bmp": imagecodecs.bmp_encode(small[:20, :20, 0]),  # mostly headers
        "progressive.jpg": progressive.getvalue(),
    }


def make(folder: Path) -> dict[str, str]:
    """Write all cases and return what each must come to."""
    folder.mkdir(parents=True, exist_ok=True)
    expected = {}
    for name, data, outcome in cases():
        assert name not in expected, name
        (folder / name).write_bytes(data)
        expected[name] = outcome
    (folder / "corpus.json").write_text(json.dumps(expected, indent=1))
    (folder / "seeds").mkdir(exist_ok=True)
    for name, data in seeds().items():
        (folder / "seeds" / name).write_bytes(data)
    return expected


if __name__ == "__main__":
    print(f"{len(make(Path(sys.argv[1])))} files")
