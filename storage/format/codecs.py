"""The codecs that may decode other writers' chunks, each with bounded output.

Notable: ten kilobytes of gzip within gzip may decode to gigabytes, whatever metadata claims. So no codec may put out
more than a chunk and the overhead of incompressible bytes; a chunk that needs more is refused. Codecs come from a
list here, never from the registries of zarr and numcodecs, which look up any name that a file gives.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from typing import TYPE_CHECKING, Any, Protocol

import imagecodecs
from numcodecs import blosc, lz4

from storage.format.shard import BLOSC_OVERHEAD, CHECKSUM_BYTES, checksum_holds

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MAX_CODECS = 8  # codecs of one chunk, one within the other
LZMA_MEMORY = 128 * 2**20  # bytes; its highest preset takes 65 MB
_LENGTH = struct.Struct("<I")


def room(nbytes: int) -> int:
    """Most bytes that a codec may put out for ``nbytes`` of pixels: incompressible bytes grow a little."""
    return nbytes + nbytes // 8 + 4096


def decode(data: bytes, codecs: Sequence[str], nbytes: int) -> bytes:
    """Undo codecs, the last one first.

    Parameters
    ----------
    data
        The stored bytes.
    codecs
        Names, keys of ``CODECS``, in the order in which they were applied.
    nbytes
        Length of the result.

    Raises
    ------
    ValueError
        The data do not decode to that length.
    Exception
        The data do not decode; each codec raises its own.
    """
    for name in reversed(codecs):
        data = CODECS[name](data, room(nbytes))
        if len(data) > room(nbytes):
            raise ValueError(f"{name} makes more bytes than a chunk has")
    if len(data) != nbytes:
        raise ValueError(f"it decodes to {len(data)} bytes, not {nbytes}")
    return data


class _Stream(Protocol):
    eof: bool
    unused_data: bytes

    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def _by_stream(make: Callable[[], Any]) -> Callable[[bytes, int], bytes]:
    """Make a decoder that stops once its output is too long."""

    def decoder(data: bytes, limit: int) -> bytes:
        stream: _Stream = make()
        made = stream.decompress(data, limit + 1)
        if len(made) <= limit and (not stream.eof or stream.unused_data):
            raise ValueError("cut short, or followed by something else")
        return made

    return decoder


def _blosc(data: bytes, limit: int) -> bytes:
    if len(data) < BLOSC_OVERHEAD:
        raise ValueError("cut short")
    made, stored = _LENGTH.unpack_from(data, 4)[0], _LENGTH.unpack_from(data, 12)[0]
    if made > limit or stored > len(data):  # it has read past the end
        raise ValueError("its header is wrong")
    return bytes(blosc.decompress(data))


def _lz4(data: bytes, limit: int) -> bytes:
    if len(data) < _LENGTH.size or _LENGTH.unpack_from(data)[0] > limit:
        raise ValueError("its header is wrong")
    return bytes(lz4.decompress(data))


def _zstd(data: bytes, limit: int) -> bytes:
    return bytes(imagecodecs.zstd_decode(data, out=limit))  # it fails where that is too little


def _crc32c(data: bytes, limit: int) -> bytes:  # noqa: ARG001
    if not checksum_holds(data):
        raise ValueError("its checksum does not match")
    return data[:-CHECKSUM_BYTES]


CODECS: dict[str, Callable[[bytes, int], bytes]] = {
    "blosc": _blosc,
    "bz2": _by_stream(bz2.BZ2Decompressor),
    "crc32c": _crc32c,
    "gzip": _by_stream(lambda: zlib.decompressobj(zlib.MAX_WBITS | 16)),
    "lz4": _lz4,
    "lzma": _by_stream(lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LZMA_MEMORY)),
    "zlib": _by_stream(zlib.decompressobj),
    "zstd": _zstd,
}
