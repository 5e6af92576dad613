"""One Zarr array of another writer, v2 or v3: its checked metadata and the decoding of its chunks.

Notable: zarr-python is not used, because files of others must be bounded before memory is taken: codecs come from our
list (``storage.format.codecs``), each with bounded output, and no name in a file is looked up anywhere. The tests
compare with zarr-python.

Specifications: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html and .../v3/core/.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import typed
from storage.errors import NotAPyramidError
from storage.format.codecs import CODECS, MAX_CODECS, decode, room
from storage.format.nodata import fitting
from storage.format.own_array import DTYPES
from storage.format.shard import CHECKSUM_BYTES, checksum_holds
from storage.limits import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

Place = tuple[int, ...]  # number of a chunk or shard along each axis
MAX_AXES = 5  # t, c, z, y, x
SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # fill values
_HEX = re.compile("0x[0-9a-fA-F]+")
_V2_TYPE = re.compile(r"[<>|][uif][1248]")


@dataclass(frozen=True)
class Encoding:
    """How the pixels of a chunk become bytes: transposed, in this byte order, through codecs."""

    dtype: np.dtype[Any]
    order: tuple[int, ...]  # the array's axis for each stored axis
    codecs: tuple[str, ...]

    def decode(self, data: bytes, shape: Sequence[int]) -> NDArray[Any]:
        """Return the pixels of a chunk; raises the errors of ``codecs.decode``."""
        stored = [shape[axis] for axis in self.order]
        raw = decode(data, self.codecs, math.prod(shape) * self.dtype.itemsize)
        return np.frombuffer(raw, self.dtype).reshape(stored).transpose(np.argsort(self.order))


@dataclass(frozen=True)
class ShardIndex:
    """The index of a shard: offset and length of each chunk, at the start or the end of the file."""

    grid: tuple[int, ...]  # chunks along each axis
    at_end: bool
    checksum: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the index."""
        return math.prod(self.grid) * 16 + (CHECKSUM_BYTES if self.checksum else 0)

    def locate(self, chunk: Place) -> tuple[Place, int]:
        """Place of the shard that holds a chunk, and the chunk's number in it."""
        shard = tuple(n // many for n, many in zip(chunk, self.grid, strict=True))
        number = 0
        for n, many in zip(chunk, self.grid, strict=True):
            number = number * many + n % many
        return shard, number

    def decode(self, data: bytes) -> NDArray[np.uint64]:
        """Return (chunks, 2) offset and length, 2^64-1 where there is no chunk; ``ValueError`` if it is damaged."""
        if len(data) != self.nbytes or (self.checksum and not checksum_holds(data)):
            raise ValueError("its index is damaged")
        return np.frombuffer(data, "<u8", count=math.prod(self.grid) * 2).reshape(-1, 2)


@dataclass(frozen=True)
class ZarrArray:
    """An array below ``path``."""

    path: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]  # shape of a chunk, which is decoded at once
    fill_value: float
    encoding: Encoding
    index: ShardIndex | None  # None if each chunk is a file
    prefix: str  # prefix of the keys of its files: "c" in v3
    separator: str
    nodata: float | None = None  # value of pixels that hold no data

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of its pixels, in the byte order of the file."""
        return self.encoding.dtype

    @property
    def shards(self) -> tuple[int, ...]:
        """Shape of what one file holds."""
        grid = self.index.grid if self.index else (1,) * len(self.chunks)
        return tuple(chunk * many for chunk, many in zip(self.chunks, grid, strict=True))

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a decoded chunk."""
        return math.prod(self.chunks) * self.dtype.itemsize

    @property
    def stored_bytes(self) -> int:
        """Most bytes that a stored chunk has."""
        return room(self.chunk_bytes)

    def key(self, place: Place) -> str:
        """Key of a file below the pyramid's root."""
        parts = [self.prefix, *map(str, place)] if self.prefix else [str(i) for i in place]
        return f"{self.path}/{self.separator.join(parts)}"


def read_array(read: Callable[[str], bytes], path: str, zarr_format: int, where: str) -> ZarrArray:
    """Read and check the metadata of an array.

    Raises
    ------
    FileNotFoundError
        There is no array.
    NotAPyramidError
        The array is of a kind that is not read.
    ValueError
        Its metadata is damaged.
    """
    if zarr_format == 2:
        array = _parse_v2(typed.parse_object(read(f"{path}/.zarray")), path, where)
    else:
        array = _parse_v3(typed.parse_object(read(f"{path}/zarr.json")), path, where)
    if array.index is not None and array.index.nbytes > LIMITS.segment_bytes:
        raise NotAPyramidError(f"{where} has an index of {array.index.nbytes} bytes; store it in larger chunks")
    if array.chunk_bytes > LIMITS.segment_bytes:
        raise NotAPyramidError(
            f"{where} has chunks of {array.chunk_bytes} bytes, over {LIMITS.segment_bytes}; "
            "store it in smaller chunks"
        )
    return array


def _parse_v2(meta: dict[str, Any], path: str, where: str) -> ZarrArray:
    shape, chunks = _shapes(where, meta.get("shape"), meta.get("chunks"))
    name = meta.get("dtype")
    dtype = np.dtype(name) if isinstance(name, str) and _V2_TYPE.fullmatch(name) else None
    if dtype is None or dtype.newbyteorder("=").name not in DTYPES:
        raise NotAPyramidError(f"{where} holds {dtype or typed.shown(name)}; only {', '.join(DTYPES)} are read")
    if meta.get("filters"):
        names = ", ".join(_named(item, "id", where) for item in typed.items(meta["filters"], "filters"))
        raise NotAPyramidError(f"{where} has filters that are not read ({names})")
    order, separator = meta.get("order", "C"), meta.get("dimension_separator", ".")
    if order not in ("C", "F") or separator not in (".", "/"):
        raise ValueError(f"order {typed.shown(order)} and dimension_separator {typed.shown(separator)}")
    compressor = meta.get("compressor")
    axes = tuple(range(len(shape)))
    return ZarrArray(
        path=path,
        shape=shape,
        chunks=chunks,
        fill_value=_fill_value(meta.get("fill_value"), dtype),
        encoding=Encoding(
            dtype=dtype,
            order=axes if order == "C" else axes[::-1],
            codecs=() if compressor is None else _known([_named(compressor, "id", where)], where),
        ),
        index=None,
        prefix="",
        separator=separator,
    )


def _parse_v3(meta: dict[str, Any], path: str, where: str) -> ZarrArray:
    if meta.get("node_type") != "array" or meta.get("storage_transformers"):
        raise ValueError("not an array, or one behind a storage transformer")
    grid = typed.mapping(meta.get("chunk_grid"), "chunk_grid")
    if grid.get("name") != "regular":
        raise NotAPyramidError(f"{where} has chunks of different sizes, which are not read")
    shape, chunks = _shapes(where, meta.get("shape"), _configuration(grid).get("chunk_shape"))
    if meta.get("data_type") not in DTYPES:
        raise NotAPyramidError(
            f"{where} holds {typed.shown(meta.get('data_type'))}; only {', '.join(DTYPES)} are read"
        )
    dtype = np.dtype(meta["data_type"])
    keys = typed.mapping(meta.get("chunk_key_encoding"), "chunk_key_encoding")
    prefix, usual = {"default": ("c", "/"), "v2": ("", ".")}.get(typed.label(keys.get("name"), ""), (None, ""))
    separator = _configuration(keys).get("separator", usual)
    if prefix is None or separator not in (".", "/"):
        raise ValueError("an unknown chunk_key_encoding")
    codecs = typed.items(meta.get("codecs"), "codecs", most=MAX_CODECS)
    index = None
    if codecs and _named(codecs[0], "name", where) == "sharding_indexed":
        if len(codecs) > 1:
            raise NotAPyramidError(f"{where} has codecs around its shards, which are not read")
        sharding = _configuration(codecs[0])
        shard, (_, chunks) = chunks, _shapes(where, list(shape), sharding.get("chunk_shape"))
        index = _parse_index(sharding, shard, chunks, where)
        codecs = typed.items(sharding.get("codecs"), "codecs", most=MAX_CODECS)
    return ZarrArray(
        path=path,
        shape=shape,
        chunks=chunks,
        fill_value=_fill_value(meta.get("fill_value"), dtype),
        encoding=_parse_codecs(codecs, dtype, len(shape), where),
        index=index,
        prefix=prefix,
        separator=separator,
        # xarray's name for it, and GDAL's; what no pixel can have is no reason to refuse the array
        nodata=fitting(typed.mapping(meta.get("attributes"), "attributes").get("_FillValue"), dtype),
    )


def _parse_index(sharding: dict[str, Any], shard: Place, chunks: Place, where: str) -> ShardIndex:
    if any(whole % part for whole, part in zip(shard, chunks, strict=True)):
        raise ValueError(f"shards of {shard} and chunks of {chunks}")
    codecs = typed.items(sharding.get("index_codecs"), "index_codecs", most=2)
    names = [_named(codec, "name", where) for codec in codecs]
    location = sharding.get("index_location", "end")
    little = bool(codecs) and _configuration(codecs[0]).get("endian", "little") == "little"
    if names not in (["bytes"], ["bytes", "crc32c"]) or not little or location not in ("start", "end"):
        raise NotAPyramidError(f"{where} has a shard index that is not read")
    grid = tuple(whole // part for whole, part in zip(shard, chunks, strict=True))
    return ShardIndex(grid, at_end=location == "end", checksum=len(names) > 1)


def _parse_codecs(codecs: list[Any], dtype: np.dtype[Any], axes: int, where: str) -> Encoding:
    """Parse transpositions, then the codec of bytes, then those that compress them."""
    order = tuple(range(axes))
    names = [_named(codec, "name", where) for codec in codecs]
    while names and names[0] == "transpose":
        step = _configuration(codecs[0]).get("order")
        step = typed.integers(step, "order", 0, axes - 1, count=axes)
        if len(set(step)) != axes:
            raise ValueError(f"a transposition by {step}")
        order = tuple(order[axis] for axis in step)
        names, codecs = names[1:], codecs[1:]
    if not names or names[0] != "bytes":
        raise NotAPyramidError(f"{where} has the codec {names[0] if names else 'none'!r} in the place of 'bytes'")
    endian = _configuration(codecs[0]).get("endian", "little" if dtype.itemsize == 1 else None)
    if endian not in ("little", "big"):
        raise ValueError(f"endian {typed.shown(endian)}")
    return Encoding(dtype.newbyteorder("<" if endian == "little" else ">"), order, _known(names[1:], where))


def _known(names: list[str], where: str) -> tuple[str, ...]:
    """Return names of codecs, refusing those that are not read."""
    for name in names:
        if name not in CODECS:
            raise NotAPyramidError(f"{where} has the codec {name!r}; only {', '.join(CODECS)} are read")
    return tuple(names)


def _named(item: Any, key: str, where: str) -> str:
    """Name of a codec, which in v3 may stand without an object around it."""
    name = item if isinstance(item, str) else typed.mapping(item, "a codec").get(key)
    if not isinstance(name, str):
        raise NotAPyramidError(f"{where} has a codec without a name")
    return name.removeprefix("numcodecs.")


def _configuration(item: Any) -> dict[str, Any]:
    return typed.mapping(item.get("configuration"), "configuration") if isinstance(item, dict) else {}


def _shapes(where: str, shape: Any, chunks: Any) -> tuple[Place, Place]:
    """Shape of an array and of its chunks, checked to be neither empty nor too large."""
    whole = typed.integers(shape, "shape", 1, 2**63)
    if not 2 <= len(whole) <= MAX_AXES or max(whole) > LIMITS.side or math.prod(whole) > LIMITS.samples:
        raise NotAPyramidError(f"{where} has the shape {whole}, which is not read")
    return whole, typed.integers(chunks, "chunks", 1, 2 * LIMITS.side, count=len(whole))


def _fill_value(value: Any, dtype: np.dtype[Any]) -> float:
    """The value of absent chunks; zero where it is undefined."""
    if value is None or isinstance(value, bool):
        return 0
    if dtype.kind != "f":
        bounds = np.iinfo(dtype)
        return typed.integer(value, "fill_value", int(bounds.min), int(bounds.max))
    if isinstance(value, str):
        if _HEX.fullmatch(value) and len(value) == 2 + 2 * dtype.itemsize:
            return float(np.frombuffer(bytes.fromhex(value[2:]), dtype.newbyteorder(">"))[0])
        return float(typed.member(SPECIAL, value))
    if isinstance(value, float) and not math.isfinite(value):
        return value
    return typed.number(value, "fill_value", -float(np.finfo(dtype).max), float(np.finfo(dtype).max))
