"""OME-Zarr 0.5 metadata: one typed description, used to write and to read.

Notable: the root ``zarr.json`` holds everything a reader needs (``ome``, zarr's consolidated metadata of all levels,
and our ``nested_ats`` block), so a slide opens with one small read; each level has its own ``zarr.json`` besides, as
the specification asks. The ``nested_ats`` block lists every shard's length and checksum, with length 0 for shards
that are absent because all their pixels are zero: zarr reads *any* absent shard as zeros, and we do not. It also
holds a checksum of the whole document: a shape or scale with one bit flipped would be as well-formed as before.

Specifications: https://ngff.openmicroscopy.org/0.5/ and https://zarr-specs.readthedocs.io/en/latest/v3/core/.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import zlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import typed
from storage.errors import CorruptImageError, NotAPyramidError
from storage.format import georeference as geo
from storage.format.levels import check_levels
from storage.format.ngff import IMAGE_LABEL, load_json, parse_image
from storage.format.nodata import from_json, to_json
from storage.format.own_array import AXES, array_json, parse_layout
from storage.format.shard import ShardLayout
from storage.limits import LIMITS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from storage.format.georeference import Georeference
    from storage.format.ngff import Dataset, Multiscale

FORMAT = 3  # version of the nested_ats block and of the contents of shards
CHECKSUM = "crc32"  # name, in the nested_ats block, of the root document's checksum
SHARD_COLUMNS = ("length", "crc32", "index_crc32c")
LABEL_RGBA = (60, 160, 60, 128)
RGB_COLORS = ("FF0000", "00FF00", "0000FF")
DOWNSAMPLING = {
    "method": "storage.convert",
    "description": "mean of 2x2 pixels, of those that are in the image and hold data; integers are rounded half up",
}


@dataclass(frozen=True)
class ShardTable:
    """Length and checksums of each shard file of a level, all (rows, columns)."""

    length: NDArray[np.int64]  # bytes; 0 if the shard is absent because all its pixels are zero
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
    def table(self) -> ShardTable:
        """The table of shards, which a pyramid has once it is whole."""
        if self.shards is None:
            raise AssertionError("the level is being planned")
        return self.shards

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

    def shard_bytes(self, row: int, column: int) -> int:
        """Bytes of the decoded part of a shard inside the image."""
        return self.shape[0] * math.prod(self.shard_shape(row, column)) * self.layout.dtype.itemsize

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
    nodata: float | None = None  # value of pixels that hold no data, each channel for itself
    bits: int | None = None  # of a sample, where it has fewer than its type
    alpha: int | None = None  # number of the channel whose zeros say that no channel holds data there
    georeference: Georeference | None = None  # of level 0
    is_label: bool = False  # whether its values are labels of the image two groups above
    provenance: dict[str, Any] = field(default_factory=dict)  # source fingerprint and options, JSON values

    @cached_property
    def content(self) -> str:
        """Digest of the pixels of all levels, made of every shard's checksum and of the layout of shards."""
        digest = hashlib.sha256()
        for level in self.levels:
            digest.update(repr((level.shape, level.layout, level.scale_yx)).encode())
            for column in SHARD_COLUMNS:
                digest.update(getattr(level.table, column).astype("<i8").tobytes())
        return digest.hexdigest()


def metadata_files(info: PyramidInfo) -> dict[str, bytes]:
    """All metadata of a pyramid by key; the root's comes last, as it marks the pyramid as whole."""
    arrays = {
        level.path: array_json(level.layout, level.shape) | {"attributes": _place_json(info, level)}
        for level in info.levels
    }
    root = {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"ome": _ome_json(info), "nested_ats": _own_json(info)} | _place_json(info, info.levels[0]),
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
        There is no OME-Zarr 0.5 image, or its layout or ``FORMAT`` is not read.
    CorruptImageError
        The metadata is damaged.
    """
    return pyramid_info(load_json(read, "zarr.json", where), read, where)


def pyramid_info(root: dict[str, Any], read: Callable[[str], bytes], where: str) -> PyramidInfo:
    """Do as `parse_pyramid` with a root document that was already read."""
    try:
        attributes = typed.mapping(root.get("attributes"), "attributes")
        ome = typed.mapping(attributes.get("ome"), "ome")
        image = parse_image({key: ome[key] for key in ome if key != IMAGE_LABEL}, where)
        own = typed.mapping(attributes.get("nested_ats"), "nested_ats")
        if own.get("format") != FORMAT:
            raise NotAPyramidError(f"{where}: written by another version of this package; convert the image again")
        info = _parse(root, image, own, read, where)
        if typed.member(own, CHECKSUM) != _checksum(root):
            raise CorruptImageError(
                f"{where}: zarr.json is not as it was written (its checksum differs); convert again"
            )
        check_levels([level.shape[1:] for level in info.levels], [level.scale_yx for level in info.levels])
    except (ValueError, RecursionError) as error:
        raise CorruptImageError(f"{where}: damaged metadata ({error})") from error
    return info


def is_own(root: dict[str, Any]) -> bool:
    """Whether a root document is that of a pyramid of this package."""
    attributes = root.get("attributes")
    return isinstance(attributes, dict) and "nested_ats" in attributes


def seal(root: dict[str, Any]) -> None:
    """Enter the checksum of a root document in it."""
    root["attributes"]["nested_ats"][CHECKSUM] = _checksum(root)


def _checksum(root: dict[str, Any]) -> int:
    """CRC-32 of a root document without its checksum; the order and spacing of members do not matter."""
    attributes = root["attributes"]
    own = {key: value for key, value in attributes["nested_ats"].items() if key != CHECKSUM}
    rest = root | {"attributes": attributes | {"nested_ats": own}}
    return zlib.crc32(json.dumps(rest, sort_keys=True).encode())


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
    kind = {IMAGE_LABEL: _label_json(info)} if info.is_label else {"omero": _omero_json(info)}
    return {"version": "0.5", "multiscales": [multiscale]} | kind


def _label_json(info: PyramidInfo) -> dict[str, Any]:
    """What the label 1 is called, and how it is shown; 0 is where it is not."""
    return {
        "version": "0.5",
        "colors": [{"label-value": 1, "rgba": list(LABEL_RGBA)}],
        "properties": [{"label-value": 1, "class": info.name}],
        "source": {"image": "../../"},
    }


def _omero_json(info: PyramidInfo) -> dict[str, Any]:
    start, end = info.window
    window = {"min": start, "max": end, "start": start, "end": end}
    colors = RGB_COLORS if len(info.channels) == len(RGB_COLORS) else ("FFFFFF",) * len(info.channels)
    channels = [
        {"label": label, "color": color, "window": window, "active": True}
        for label, color in zip(info.channels, colors, strict=True)
    ]
    return {"channels": channels, "rdefs": {"model": "color" if len(channels) > 1 else "greyscale"}}


def _place_json(info: PyramidInfo, level: LevelInfo) -> dict[str, Any]:
    """Where a level lies on the Earth, by the conventions of GeoZarr."""
    downsample = level.scale_yx[0] / info.levels[0].scale_yx[0]
    place = info.georeference and info.georeference.scaled(downsample)
    return geo.attributes(place, (level.shape[1], level.shape[2]))


def _own_json(info: PyramidInfo) -> dict[str, Any]:
    tables = [level.table for level in info.levels]
    shards = [{key: getattr(table, key).ravel().tolist() for key in SHARD_COLUMNS} for table in tables]
    known = {
        "nodata": None if info.nodata is None else to_json(info.nodata),
        "bits": info.bits,
        "alpha": info.alpha,
        "georeference": info.georeference and geo.to_json(info.georeference),
    }
    own = {"format": FORMAT, "provenance": info.provenance, "shards": shards}
    return own | {key: value for key, value in known.items() if value is not None}


def _parse(
    root: dict[str, Any], image: Multiscale, own: dict[str, Any], read: Callable[[str], bytes], where: str
) -> PyramidInfo:
    if image.axes != AXES:
        raise NotAPyramidError(f"{where}: only OME-Zarr 0.5 with the axes c, y, x is read")
    tables = typed.items(own.get("shards"), "shards", count=len(image.datasets))
    copies = typed.mapping(typed.mapping(root.get("consolidated_metadata"), "copies").get("metadata"), "copies")
    levels = []
    for dataset, table in zip(image.datasets, tables, strict=True):
        array = copies.get(dataset.path) or load_json(read, f"{dataset.path}/zarr.json", where)
        levels.append(_parse_level(dataset, typed.mapping(array, "an array"), table, where))
    return PyramidInfo(
        name=image.name,
        unit="micrometer" if image.micrometers_yx == (1.0, 1.0) else None,
        channels=image.labels,
        window=_window(root["attributes"]["ome"]),
        levels=tuple(levels),
        nodata=from_json(own.get("nodata"), levels[0].layout.dtype),
        bits=_bits(own.get("bits"), levels[0].layout.dtype),
        alpha=_alpha(own.get("alpha"), levels[0].shape[0]),
        georeference=geo.from_json(own.get("georeference")),
        is_label=IMAGE_LABEL in root["attributes"]["ome"],
        provenance=typed.mapping(own.get("provenance"), "provenance"),
    )


def _bits(value: Any, dtype: np.dtype[Any]) -> int | None:
    most = 8 * dtype.itemsize - 1 if dtype.kind == "u" else 0
    return None if value is None else typed.integer(value, "bits", 1, most)


def _alpha(value: Any, channels: int) -> int | None:
    return None if value is None else typed.integer(value, "alpha", 0, channels - 1)


def _window(ome: dict[str, Any]) -> tuple[float, float]:
    channels = typed.items(typed.mapping(ome.get("omero"), "omero").get("channels") or [{}], "channels")
    window = typed.mapping(typed.mapping(channels[0], "a channel").get("window"), "window")
    most = sys.float_info.max
    start, end = (typed.number(window.get(key, usual), key, -most, most) for key, usual in (("start", 0), ("end", 1)))
    return start, end


def _parse_level(dataset: Dataset, array: dict[str, Any], table: Any, where: str) -> LevelInfo:
    path = dataset.path
    channels, height, width = typed.integers(array.get("shape"), "shape", 1, LIMITS.side, count=len(AXES))
    layout = parse_layout(array, where)
    if layout.channels != channels or channels * height * width > LIMITS.samples:
        raise ValueError(f"level {path} has the shape {(channels, height, width)}")
    if layout.too_large:
        raise ValueError(
            f"level {path} claims shards of {layout.grid} x {layout.grid} chunks of {layout.chunk_bytes} bytes"
        )
    (_, *scale), (_, *first) = dataset.scale, dataset.translation
    level = LevelInfo(path, (channels, height, width), layout, (scale[0], scale[1]), (first[0], first[1]))
    return with_shards(level, *(typed.items(typed.member(table, key), key) for key in SHARD_COLUMNS))


def with_shards(level: LevelInfo, *columns: Sequence[int]) -> LevelInfo:
    """Return the level with its shard table, each column of which has one integer per shard in row-major order.

    Raises
    ------
    ValueError
        A column has another length, or a value that is no length of a shard or no checksum.
    """
    rows_columns, layout = level.shard_grid, level.layout
    if math.prod(rows_columns) > LIMITS.shards:
        raise ValueError(f"level {level.path} has more than {LIMITS.shards} shards")
    tops = (layout.max_shard_bytes, 2**32 - 1, 2**32 - 1)
    arrays = []
    for name, column, top in zip(SHARD_COLUMNS, columns, tops, strict=True):
        whole = not set(map(type, column)) - {int} and min(column, default=0) >= 0 and max(column, default=0) <= top
        if not whole or len(column) != math.prod(rows_columns):
            raise ValueError(f"level {level.path} has no sound table of its shards ({name})")
        arrays.append(np.array(column, np.int64).reshape(rows_columns))
    if ((arrays[0] > 0) & (arrays[0] < layout.index_bytes)).any():
        raise ValueError(f"level {level.path} has no sound table of its shards (one is too short for its index)")
    return replace(level, shards=ShardTable(*arrays))


def _dump(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
