"""OME-Zarr 0.5 metadata: one typed description, used to write and to read.

Notable: the root ``zarr.json`` holds everything a reader needs (``ome``, zarr's consolidated metadata of all levels,
and our ``nested_ats`` block), so a slide opens with one small read; each level has its own ``zarr.json`` besides, as
the specification asks. The ``nested_ats`` block lists every shard's length and checksum, with length 0 for shards
that are absent because all their pixels are zero: zarr reads *any* absent shard as zeros, and we do not. It also
holds a checksum of the whole document: a shape or scale with one bit flipped would be as well-formed as before.

Specifications: https://ngff.openmicroscopy.org/0.5/ and https://zarr-specs.readthedocs.io/en/latest/v3/core/.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import CorruptImageError, NotAPyramidError
from storage.shard import BloscCodec, ShardLayout

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

FORMAT = 3  # of the nested_ats block and of what lies in shards
CHECKSUM = "crc32"  # of the root document, in the nested_ats block
SHARD_COLUMNS = ("length", "crc32", "index_crc32c")
AXES = ("c", "y", "x")
DTYPES = ("uint8", "uint16", "int16", "float32", "float64")
RGB_COLORS = ("FF0000", "00FF00", "0000FF")
DOWNSAMPLING = {
    "method": "storage.convert",
    "description": "mean of 2x2 pixels, of those inside the image at odd edges; integers are rounded half up",
}
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*")


@dataclass(frozen=True)
class ShardTable:
    """What is known of each shard file of a level, all (rows, columns)."""

    length: NDArray[np.int64]  # bytes; 0: absent, all its pixels are zero
    crc32: NDArray[np.int64]  # of the whole file
    index_crc32c: NDArray[np.int64]  # of the index at its end


@dataclass(frozen=True)
class LevelInfo:
    """One level: an array of ``shape`` (C, H, W) below ``path``.

    ``scale_yx`` is the pixel's size and ``translation_yx`` the position of the first pixel's centre, both in the
    pyramid's unit (level-0 pixels where there is no unit).
    """

    path: str
    shape: tuple[int, int, int]
    layout: ShardLayout
    scale_yx: tuple[float, float]
    translation_yx: tuple[float, float]
    shards: ShardTable | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the decoded level."""
        return math.prod(self.shape) * self.layout.dtype.itemsize

    @property
    def shard_grid(self) -> tuple[int, int]:
        """Rows and columns of shards."""
        return (-(-self.shape[1] // self.layout.shard), -(-self.shape[2] // self.layout.shard))

    def shard_shape(self, row: int, column: int) -> tuple[int, int]:
        """Height and width of the part of a shard inside the image."""
        shard = self.layout.shard
        return (min(shard, self.shape[1] - row * shard), min(shard, self.shape[2] - column * shard))

    def shard_key(self, row: int, column: int) -> str:
        """Key of a shard's file below the pyramid's root."""
        return f"{self.path}/c/0/{row}/{column}"


@dataclass(frozen=True)
class PyramidInfo:
    """A whole multiscale image; ``unit`` is "micrometer", or None where the pixel's size is unknown."""

    name: str
    unit: str | None
    channels: tuple[str, ...]
    window: tuple[float, float]  # display range of all channels
    levels: tuple[LevelInfo, ...]
    provenance: dict[str, Any] = field(default_factory=dict)  # source fingerprint and options, JSON values


def metadata_files(info: PyramidInfo) -> dict[str, bytes]:
    """All metadata of a pyramid by key; the root's comes last, as its presence marks the pyramid as whole."""
    arrays = {level.path: _array_json(level) for level in info.levels}
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"ome": _ome_json(info), "nested_ats": _own_json(info)},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": arrays},
    }
    seal(root)
    files = {f"{path}/zarr.json": _dump(array) for path, array in arrays.items()}
    return files | {"zarr.json": _dump(root)}


def parse_pyramid(read: Callable[[str], bytes], where: str) -> PyramidInfo:
    """Read and check the metadata of a pyramid.

    Parameters
    ----------
    read
        Returns the bytes below a key, raising ``FileNotFoundError``.
    where
        The pyramid's location, for messages.

    Raises
    ------
    NotAPyramidError
        There is no OME-Zarr 0.5 image here, or one of a layout that is not read, or of another ``FORMAT``.
    CorruptImageError
        The metadata is damaged.
    """
    return pyramid_info(load_json(read, "zarr.json", where), read, where)


def pyramid_info(root: dict[str, Any], read: Callable[[str], bytes], where: str) -> PyramidInfo:
    """Check the metadata of a pyramid whose root document is read already; the rest is as `parse_pyramid` has it."""
    try:
        ome = root["attributes"]["ome"]
        multiscale = ome["multiscales"][0]
        paths = [dataset["path"] for dataset in multiscale["datasets"]]
    except (KeyError, IndexError, TypeError):
        raise NotAPyramidError(f"{where}: no OME-Zarr 0.5 multiscales; convert the image first") from None
    for path in paths:
        if not isinstance(path, str) or not _PATH.fullmatch(path):
            raise NotAPyramidError(f"{where}: the level path {path!r} leaves the pyramid")
    own = root["attributes"].get("nested_ats")
    if isinstance(own, dict) and own.get("format") != FORMAT:
        raise NotAPyramidError(f"{where}: written by another version of this package; convert the image again")
    arrays = _member(_member(root, "consolidated_metadata"), "metadata")
    try:
        found = [arrays.get(path) or load_json(read, f"{path}/zarr.json", where) for path in paths]
        info = _parse(ome, multiscale, found, own, where)
        damaged = own is not None and own[CHECKSUM] != _checksum(root)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CorruptImageError(f"{where}: damaged metadata ({type(error).__name__}: {error})") from error
    if damaged:
        raise CorruptImageError(f"{where}: zarr.json is not as it was written (its checksum differs); convert again")
    return info


def seal(root: dict[str, Any]) -> None:
    """Enter the checksum of a root document in it."""
    root["attributes"]["nested_ats"][CHECKSUM] = _checksum(root)


def _checksum(root: dict[str, Any]) -> int:
    """CRC-32 of a root document but for what it says of itself, however its members are ordered and spaced."""
    attributes = root["attributes"]
    own = {key: value for key, value in attributes["nested_ats"].items() if key != CHECKSUM}
    rest = root | {"attributes": attributes | {"nested_ats": own}}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


def _array_json(level: LevelInfo) -> dict[str, Any]:
    layout, codec = level.layout, level.layout.codec
    to_bytes = {"name": "bytes", "configuration": {"endian": "little"}}
    blosc = {
        "cname": codec.cname,
        "clevel": codec.clevel,
        "shuffle": codec.shuffle,
        "typesize": codec.typesize,
        "blocksize": codec.blocksize,
    }
    sharding = {
        "chunk_shape": list(layout.chunk_shape),
        "codecs": [to_bytes, {"name": "blosc", "configuration": blosc}, {"name": "crc32c"}],
        "index_codecs": [to_bytes, {"name": "crc32c"}],
        "index_location": "end",
    }
    shard_shape = [layout.channels, layout.shard, layout.shard]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(level.shape),
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if layout.dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(AXES),
        "attributes": {},
    }


def _ome_json(info: PyramidInfo) -> dict[str, Any]:
    space = {"type": "space"} | ({"unit": info.unit} if info.unit else {})
    datasets = [
        {
            "path": level.path,
            "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, *level.scale_yx]},
                {"type": "translation", "translation": [0.0, *level.translation_yx]},
            ],
        }
        for level in info.levels
    ]
    multiscale = {
        "name": info.name,
        "axes": [{"name": "c", "type": "channel"}, {"name": "y"} | space, {"name": "x"} | space],
        "datasets": datasets,
        "type": "mean",
        "metadata": DOWNSAMPLING,
    }
    return {"version": "0.5", "multiscales": [multiscale], "omero": _omero_json(info)}


def _omero_json(info: PyramidInfo) -> dict[str, Any]:
    start, end = info.window
    window = {"min": start, "max": end, "start": start, "end": end}
    colors = RGB_COLORS if len(info.channels) == len(RGB_COLORS) else ("FFFFFF",) * len(info.channels)
    channels = [
        {"label": label, "color": color, "window": window, "active": True}
        for label, color in zip(info.channels, colors, strict=True)
    ]
    return {"channels": channels, "rdefs": {"model": "color" if len(channels) > 1 else "greyscale"}}


def _own_json(info: PyramidInfo) -> dict[str, Any]:
    tables = [level.shards for level in info.levels]
    shards = [
        None if table is None else {key: getattr(table, key).ravel().tolist() for key in SHARD_COLUMNS}
        for table in tables
    ]
    return {"format": FORMAT, "provenance": info.provenance, "shards": shards}


def _parse(
    ome: dict[str, Any], multiscale: dict[str, Any], arrays: list[dict[str, Any]], own: Any, where: str
) -> PyramidInfo:
    axes = multiscale["axes"]
    if ome["version"] != "0.5" or tuple(axis["name"] for axis in axes) != AXES:
        raise NotAPyramidError(f"{where}: only OME-Zarr 0.5 with the axes c, y, x is read")
    tables = own["shards"] if own else [None] * len(arrays)
    parts = zip(multiscale["datasets"], arrays, tables, strict=True)
    levels = tuple(_parse_level(dataset, array, table, where) for dataset, array, table in parts)
    omero = ome.get("omero", {}).get("channels") or [{}] * levels[0].shape[0]
    window = omero[0].get("window", {})
    return PyramidInfo(
        name=str(multiscale.get("name", "")),
        unit=axes[1].get("unit"),
        channels=tuple(str(channel.get("label", i)) for i, channel in enumerate(omero)),
        window=(float(window.get("start", 0)), float(window.get("end", 1))),
        levels=levels,
        provenance=dict(own["provenance"]) if own else {},
    )


def _parse_level(dataset: dict[str, Any], array: dict[str, Any], table: Any, where: str) -> LevelInfo:
    shape = tuple(int(size) for size in array["shape"])
    steps = {step["type"]: step[step["type"]] for step in dataset["coordinateTransformations"]}
    scale, translation = steps["scale"], steps.get("translation", [0.0, 0.0, 0.0])
    if len(shape) != len(AXES) or min(shape) < 1 or not all(size > 0 for size in scale):
        raise ValueError(f"level {dataset['path']} has the shape {shape} and the scale {scale}")
    level = LevelInfo(
        path=dataset["path"],
        shape=(shape[0], shape[1], shape[2]),
        layout=_parse_layout(array, where),
        scale_yx=(float(scale[1]), float(scale[2])),
        translation_yx=(float(translation[1]), float(translation[2])),
    )
    return level if table is None else with_shards(level, *(table[key] for key in SHARD_COLUMNS))


def with_shards(level: LevelInfo, *columns: Sequence[int]) -> LevelInfo:
    """Return the level with its shard table, each column of which has one integer per shard in row-major order."""
    arrays = [np.array(column, np.int64).reshape(level.shard_grid) for column in columns]
    return replace(level, shards=ShardTable(*arrays))


def _parse_layout(array: dict[str, Any], where: str) -> ShardLayout:
    """Layout of an array, refused where it is not exactly what ``storage.shard`` decodes."""
    refused = NotAPyramidError(f"{where}: not sharded as this package writes it; convert the image again")
    dtype = array["data_type"]
    shard_shape = array["chunk_grid"]["configuration"]["chunk_shape"]
    if len(array["codecs"]) != 1 or array["codecs"][0]["name"] != "sharding_indexed" or dtype not in DTYPES:
        raise refused
    sharding = array["codecs"][0]["configuration"]
    chunk_shape = sharding["chunk_shape"]
    inner = [codec["name"] for codec in sharding["codecs"]]
    if inner != ["bytes", "blosc", "crc32c"]:
        raise refused
    layout = ShardLayout(
        channels=int(chunk_shape[0]),
        chunk=int(chunk_shape[2]),
        shard=int(shard_shape[2]),
        dtype=np.dtype(dtype),
        codec=BloscCodec(**sharding["codecs"][1]["configuration"]),
    )
    square = [layout.channels, layout.shard, layout.shard]
    expected = _array_json(LevelInfo("", (layout.channels, 1, 1), layout, (1, 1), (0, 0)))
    same = all(array[key] == expected[key] for key in ("chunk_grid", "codecs", "fill_value"))
    key_encoding = array["chunk_key_encoding"]
    separator = key_encoding.get("configuration", {}).get("separator", "/")
    whole = layout.channels == array["shape"][0] and layout.chunk > 0 and layout.shard % layout.chunk == 0
    if not same or not whole or shard_shape != square or (key_encoding["name"], separator) != ("default", "/"):
        raise refused
    return layout


def _member(value: Any, key: str) -> dict[str, Any]:
    member = value.get(key) if isinstance(value, dict) else None
    return member if isinstance(member, dict) else {}


def load_json(read: Callable[[str], bytes], key: str, where: str) -> dict[str, Any]:
    """Read a metadata file; ``NotAPyramidError`` where it is missing, ``CorruptImageError`` where it is damaged."""
    try:
        data = json.loads(read(key))
    except FileNotFoundError:
        raise NotAPyramidError(f"{where}: no {key} here; convert the image first") from None
    except ValueError as error:
        raise CorruptImageError(f"{where}: {key} is damaged ({error})") from error
    if not isinstance(data, dict):
        raise CorruptImageError(f"{where}: {key} is damaged (not a JSON object)")
    return data


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
