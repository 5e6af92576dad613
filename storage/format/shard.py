"""The zarr v3 ``sharding_indexed`` file: the one place that encodes and decodes it.

A shard is a square of ``grid x grid`` chunks, each ``(channels, chunk, chunk)`` and encoded on its own as
``bytes(little) -> blosc -> crc32c``; its index, ``(offset, length)`` as two little-endian uint64 per chunk in
row-major order plus a crc32c, ends the file. A chunk of only zeros is not stored: both its numbers are 2^64-1.

Notable: the chunks lie in the order of a Hilbert curve, so that those under a box are a few stretches of the file
instead of one for each row of chunks, and a remote reader needs fewer requests. The specification allows any order.
Specification: https://zarr-specs.readthedocs.io/en/latest/v3/codecs/sharding-indexed/index.html
"""

from __future__ import annotations

import math
import struct
import sys
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np
from numcodecs import blosc

from storage.errors import CorruptImageError
from storage.limits import LIMITS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

assert sys.byteorder == "little", "chunks are stored little-endian and decoded in place"  # noqa: S101

# Blosc's own threads would multiply with those of Dask and of the reader; zarr 3 never uses them either.
blosc.use_threads = False

EMPTY = 2**64 - 1
CHECKSUM_BYTES = 4
BLOSC_OVERHEAD = 16  # bytes of its header; incompressible data are stored as they are
MIN_CHUNK_BYTES = BLOSC_OVERHEAD + CHECKSUM_BYTES
# Any data followed by its own crc32c has this crc32c, so that both are checked in one go.
CHECKSUM_RESIDUE = 0x48674BC7
_BLOSC_SIZES = struct.Struct("<4xI4xI")  # decoded and encoded bytes, in the blosc header


@dataclass(frozen=True, slots=True)
class BloscCodec:
    """Configuration of the zarr v3 blosc codec, with its names.

    https://zarr-specs.readthedocs.io/en/latest/v3/codecs/blosc/index.html
    """

    cname: str
    clevel: int
    shuffle: str  # "noshuffle" or "shuffle"
    typesize: int  # bytes
    blocksize: int = 0  # chosen by blosc


@dataclass(frozen=True)
class ShardLayout:
    """How the shards of one array are cut and encoded; ``chunk`` divides ``shard`` (both in pixels)."""

    channels: int
    chunk: int
    shard: int
    dtype: np.dtype[Any]
    codec: BloscCodec

    @property
    def grid(self) -> int:
        """Chunks along one side of a shard."""
        return self.shard // self.chunk

    @cached_property  # asked for with every chunk that is read
    def chunk_shape(self) -> tuple[int, int, int]:
        """Shape of a decoded chunk, (C, chunk, chunk)."""
        return (self.channels, self.chunk, self.chunk)

    @cached_property  # asked for with every chunk that is read
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    @property
    def index_bytes(self) -> int:
        """Bytes of the index at the end of a shard, its checksum included."""
        return self.grid * self.grid * 16 + CHECKSUM_BYTES

    @cached_property
    def max_stored_bytes(self) -> int:
        """Most bytes that a stored chunk has."""
        return self.chunk_bytes + MIN_CHUNK_BYTES

    @property
    def max_shard_bytes(self) -> int:
        """Most bytes that a shard file has."""
        return self.grid * self.grid * self.max_stored_bytes + self.index_bytes

    @property
    def too_large(self) -> bool:
        """Whether a decoded shard or its index is larger than readers accept."""
        return max(self.grid**2 * self.chunk_bytes, self.index_bytes) > LIMITS.segment_bytes


@dataclass(frozen=True, slots=True)
class EncodedShard:
    """The bytes of a shard file in order, their total length and CRC-32; without pieces there is no file.

    It is no crc32c, because every piece ends with its own and that of the file would depend on lengths alone.
    """

    pieces: list[bytes]
    length: int
    crc32: int


def encode_shard(pixels: NDArray[Any], layout: ShardLayout) -> EncodedShard:
    """Encode the part of one shard that lies inside the image.

    Parameters
    ----------
    pixels
        (C, h, w) with h, w <= ``layout.shard``; less at the lower and right edges of the image, where chunks are
        padded with zeros.
    layout
        Cut and codec.

    Returns
    -------
    EncodedShard
        Without pieces when every pixel is zero.
    """
    index = np.full((layout.grid, layout.grid, 2), EMPTY, dtype="<u8")
    pieces: list[bytes] = []
    offset = 0
    for row, column, chunk in _chunks(pixels, layout):
        if not chunk[0, 0, 0] and not chunk.any():  # looking at the first pixel is enough for most chunks
            continue
        encoded = _encode_chunk(chunk, layout.codec)
        pieces += encoded
        length = len(encoded[0]) + CHECKSUM_BYTES
        index[row, column] = offset, length
        offset += length
    if not pieces:
        return EncodedShard([], 0, 0)
    raw = index.tobytes()
    pieces += [raw, crc32c(raw)]
    checksum = 0
    for piece in pieces:
        checksum = zlib.crc32(piece, checksum)
    return EncodedShard(pieces, offset + layout.index_bytes, checksum)


def decode_index(tail: bytes, layout: ShardLayout, shard_bytes: int) -> NDArray[np.int64]:
    """Offsets and lengths of the chunks of a shard, checked.

    Parameters
    ----------
    tail
        The last ``layout.index_bytes`` of the shard file.
    layout
        Cut and codec.
    shard_bytes
        Length of the file.

    Returns
    -------
    (grid * grid, 2) int64
        Offset and length in bytes of each chunk in row-major order; (-1, -1) where the chunk is all zeros.

    Raises
    ------
    CorruptImageError
        The index is cut short, fails its checksum or points where no chunk can be.
    """
    if len(tail) != layout.index_bytes:
        raise CorruptImageError("the shard is truncated")
    if not checksum_holds(tail):
        raise CorruptImageError("the checksum of the shard index does not match")
    index = np.frombuffer(tail, "<i8", count=layout.grid * layout.grid * 2).reshape(-1, 2)
    offset, length = index[:, 0], index[:, 1]
    absent = (offset == -1) & (length == -1)
    sound = (length >= MIN_CHUNK_BYTES) & (length <= layout.max_stored_bytes)
    sound &= (offset >= 0) & (offset <= shard_bytes - layout.index_bytes - length)
    if not (sound | absent).all():
        raise CorruptImageError("the shard index points outside the shard")
    return index


def checksum_holds(data: bytes) -> bool:
    """Whether bytes that end with their crc32c, as chunks and indexes do, are undamaged."""
    return len(data) > CHECKSUM_BYTES and google_crc32c.value(data) == CHECKSUM_RESIDUE


def decode_chunk(data: bytes, layout: ShardLayout) -> NDArray[Any]:
    """Verify and decode one stored chunk to a read-only (C, chunk, chunk) array.

    Raises
    ------
    CorruptImageError
        The chunk is cut short, fails its checksum or does not decode to the size of a chunk.
    """
    if len(data) < MIN_CHUNK_BYTES or google_crc32c.value(data) != CHECKSUM_RESIDUE:
        raise CorruptImageError("the checksum of the chunk does not match")
    decoded, encoded = _BLOSC_SIZES.unpack_from(data)
    if decoded != layout.chunk_bytes or encoded != len(data) - CHECKSUM_BYTES:
        raise CorruptImageError("the chunk does not decode to the size of a chunk")
    try:
        pixels = blosc.decompress(data)  # it stops at the encoded size, and returning bytes is fastest
    except (RuntimeError, ValueError) as error:
        raise CorruptImageError(f"the chunk does not decode ({error})") from error
    return np.ndarray(layout.chunk_shape, layout.dtype, pixels)


def decode_shard(data: bytes, layout: ShardLayout, shape_yx: tuple[int, int]) -> NDArray[Any]:
    """Decode a whole shard file to the (C, h, w) pixels that lie inside the image; ``shape_yx`` is (h, w)."""
    height, width = shape_yx
    pixels = np.zeros((layout.channels, height, width), layout.dtype)
    index = decode_index(data[-layout.index_bytes :], layout, len(data)).tolist()
    step = layout.chunk
    for row in range(-(-height // step)):
        for column in range(-(-width // step)):
            offset, length = index[row * layout.grid + column]
            if offset < 0:
                continue
            chunk = decode_chunk(data[offset : offset + length], layout)
            part = pixels[:, row * step : (row + 1) * step, column * step : (column + 1) * step]
            part[...] = chunk[:, : part.shape[1], : part.shape[2]]
    return pixels


@cache
def hilbert_order(grid: int) -> tuple[tuple[int, int], ...]:
    """(row, column) of the ``grid x grid`` chunks of a shard in the order in which they are stored.

    Where ``grid`` is no power of two, the curve is that of the next power, without the places outside.
    """
    side = 1 << max(grid - 1, 0).bit_length()
    row, column = np.divmod(np.arange(side * side), side)
    rank = _hilbert_rank(row, column, side)
    curve = np.argsort(rank)
    inside = curve[(row < grid)[curve] & (column < grid)[curve]]
    return tuple(zip(row[inside].tolist(), column[inside].tolist(), strict=True))


def _hilbert_rank(row: NDArray[np.int64], column: NDArray[np.int64], side: int) -> NDArray[np.int64]:
    """Position along the Hilbert curve of a ``side x side`` square, ``side`` a power of two.

    Quadrants are taken from the largest to the smallest: each adds its number times its area, and is turned so that
    its curve ends where that of the next quadrant begins.
    """
    row, column = row.copy(), column.copy()
    rank = np.zeros_like(row)
    half = side // 2
    while half:
        right, low = (column & half) > 0, (row & half) > 0
        rank += half * half * ((3 * right) ^ low)
        flip = right & ~low
        row[flip], column[flip] = half - 1 - row[flip] % half, half - 1 - column[flip] % half
        row[~low], column[~low] = column[~low], row[~low]
        half //= 2
    return rank


def _chunks(pixels: NDArray[Any], layout: ShardLayout) -> Iterator[tuple[int, int, NDArray[Any]]]:
    """Row, column and contiguous zero-padded pixels of each chunk in the image, in the order of storage."""
    step = layout.chunk
    _, height, width = pixels.shape
    for row, column in hilbert_order(layout.grid):
        y, x = row * step, column * step
        if y >= height or x >= width:
            continue
        part = pixels[:, y : y + step, x : x + step]
        if part.shape == layout.chunk_shape:
            yield row, column, np.ascontiguousarray(part)
        else:
            chunk = np.zeros(layout.chunk_shape, layout.dtype)
            chunk[:, : part.shape[1], : part.shape[2]] = part
            yield row, column, chunk


def _encode_chunk(chunk: NDArray[Any], codec: BloscCodec) -> list[bytes]:
    shuffle = blosc.SHUFFLE if codec.shuffle == "shuffle" else blosc.NOSHUFFLE
    body = blosc.compress(chunk, codec.cname.encode(), codec.clevel, shuffle, codec.blocksize, codec.typesize)
    return [body, crc32c(body)]


def crc32c(data: bytes) -> bytes:
    """Crc32c of bytes, in the form that ends chunks and indexes."""
    return int(google_crc32c.value(data)).to_bytes(CHECKSUM_BYTES, "little")
