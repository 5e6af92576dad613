"""Limits on untrusted input, which are checked before anything is decoded or allocated.

A TIFF header of one kilobyte may claim 60000 x 60000 pixels, a tile of a few bytes gigabytes, and a web server an
answer of terabytes; the limits bound what they can make this process allocate. They leave room for every scanner
format that we know.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    """The largest values that are accepted from a file; above them the image is refused."""

    ifds: int = 4096  # image file directories in one TIFF
    ifd_entries: int = 4096  # tags in one directory
    channels: int = 1024  # all channels of a pixel lie in one chunk
    side: int = 2**24  # pixels along y or x
    samples: int = 2**40  # channels x height x width
    segment_bytes: int = 256 * 2**20  # one decoded tile, strip or chunk
    metadata_bytes: int = 64 * 2**20  # one file of metadata
    levels: int = 64  # levels of one pyramid
    shards: int = 2**20  # shards of one pyramid, whose table is metadata
    raster_bytes: int = 2**30  # one decoded PNG, JPEG or BMP file, which is held in memory
    raster_ratio: int = 2000  # decoded bytes per byte of it; deflate reaches 1032, a blank progressive JPEG less
    ratio: int = 20_000  # decoded bytes of the image per byte of file
    ratio_free_bytes: int = 64 * 2**20  # images that decode to less than this may have any ratio


LIMITS = Limits()
