"""The document of one of our arrays, a level of a pyramid: written, and read only if it is as written.

Specification: https://zarr-specs.readthedocs.io/en/latest/v3/core/.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from storage import typed
from storage.errors import NotAPyramidError
from storage.format.shard import BloscCodec, ShardLayout
from storage.limits import LIMITS

if TYPE_CHECKING:
    from collections.abc import Sequence

AXES = ("c", "y", "x")
DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64")


def array_json(layout: ShardLayout, shape: Sequence[int]) -> dict[str, Any]:
    """Describe an array of a layout and a shape, (C, H, W)."""
    codec = layout.codec
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
        "shape": list(shape),
        "data_type": layout.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shard_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if layout.dtype.kind == "f" else 0,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": list(AXES),
        "attributes": {},
    }


def parse_layout(array: dict[str, Any], where: str) -> ShardLayout:
    """Read the layout of an array.

    Raises
    ------
    NotAPyramidError
        It is not exactly what ``storage.format.shard`` decodes.
    """
    refused = NotAPyramidError(f"{where}: not sharded as this package writes it; convert the image again")
    dtype = array.get("data_type")
    try:
        shard_shape = array["chunk_grid"]["configuration"]["chunk_shape"]
        sharding = array["codecs"][0]["configuration"]
        chunk_shape, blosc = sharding["chunk_shape"], sharding["codecs"][1]["configuration"]
        key_encoding = array["chunk_key_encoding"]
        separator = key_encoding.get("configuration", {}).get("separator", "/")
        keyed = (key_encoding["name"], separator) == ("default", "/")
        codec = BloscCodec(**blosc)
    except (KeyError, IndexError, TypeError, AttributeError):
        raise refused from None
    channels, _, chunk = typed.integers(chunk_shape, "chunk_shape", 1, LIMITS.side, count=len(AXES))
    _, _, shard = typed.integers(shard_shape, "chunk_shape", 1, LIMITS.side, count=len(AXES))
    if dtype not in DTYPES or shard % chunk or not keyed:
        raise refused
    layout = ShardLayout(channels, chunk, shard, np.dtype(dtype), codec)
    expected = array_json(layout, (channels, 1, 1))
    if not all(array.get(key) == expected[key] for key in ("chunk_grid", "codecs", "fill_value")):
        raise refused
    return layout
