"""The options that decide the bytes of a pyramid, and the levels and shards that follow from them.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import ConversionError
from storage.format.levels import MIN_LEVEL_SIZE, coarsened, level_sizes
from storage.format.ome_zarr import LevelInfo, PyramidInfo
from storage.format.shard import BloscCodec, ShardLayout
from storage.limits import LIMITS

if TYPE_CHECKING:
    from storage.conversion.build import PixelSource
    from storage.place.location import Pages

CLEVELS = {"lz4": 1, "zstd": 1}  # lz4 at 5 takes twice as long to save 1 %
MAX_SHARD_BYTES = 64 * 2**20  # decoded; the shard side is halved until it holds


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options that, with the source, decide the bytes of a pyramid."""

    codec: str = "lz4"  # "lz4" reads fastest; "zstd" is smaller
    chunk: int = 128  # pixels, side of a chunk, which is fetched and decoded at once
    shard: int = 2048  # pixels, side of a file; a multiple of chunk
    min_level_size: int = MIN_LEVEL_SIZE  # pixels; levels go on until the longer side is no more than this
    mpp: float | None = None  # micrometres per pixel of level 0; None takes the source's
    pages: Pages = None  # of a TIFF: the number of one, from 0, or "channels" for all as the channels of one image
    allow_sparse: bool = False  # take TIFF tiles that are not stored as zeros, instead of refusing the file

    def __post_init__(self) -> None:
        if self.codec not in CLEVELS:
            raise ValueError(f"codec must be one of {', '.join(CLEVELS)}, not {self.codec!r}")
        if self.chunk < 2 or self.chunk % 2 or self.shard < self.chunk or self.shard % self.chunk:
            raise ValueError(f"chunk must be even and shard a multiple of it, not {self.chunk} and {self.shard}")
        if self.min_level_size < 1:
            raise ValueError("min_level_size must be at least 1")
        if isinstance(self.pages, int) and self.pages < 0:
            raise ValueError("pages are numbered from 0")
        if self.mpp is not None and not 0 < self.mpp < float("inf"):
            raise ValueError("mpp must be positive")

    @property
    def plain(self) -> dict[str, Any]:
        """The options as JSON values; pages only where they are chosen, as pyramids of before do not have them."""
        values = asdict(self)
        return values if self.pages is not None else {key: values[key] for key in values if key != "pages"}


def plan(
    source: PixelSource,
    options: ConvertOptions,
    target: str,
    *,
    scale_yx: tuple[float, float],
    unit: str | None,
    first_yx: tuple[float, float] = (0.0, 0.0),
    count: int | None = None,
) -> PyramidInfo:
    """Describe the pyramid of a source: its levels, halved until small, at least two, or ``count`` of them."""
    channels, height, width = source.shape
    layout = _layout(source, options, target)
    levels = [
        LevelInfo(str(number), (channels, *size_yx), layout, *coarsened(2**number, scale_yx, first_yx))
        for number, size_yx in enumerate(level_sizes(height, width, options.min_level_size, count))
    ]
    if (shards := sum(math.prod(level.shard_grid) for level in levels)) > LIMITS.shards:
        raise ConversionError(f"{target}: would have {shards} shards, more than readers take; choose a larger shard")
    bounds = np.iinfo(source.dtype) if source.dtype.kind in "iu" else None
    window = (float(bounds.min), float(bounds.max)) if bounds else (0.0, 1.0)
    names = tuple(str(i) for i in range(channels))
    name = Path(target).name.removesuffix(".zarr").removesuffix(".ome")
    return PyramidInfo(name, unit, names, window, tuple(levels))


def _layout(source: PixelSource, options: ConvertOptions, target: str) -> ShardLayout:
    channels, dtype = source.shape[0], source.dtype
    shard = options.shard
    while shard > options.chunk and channels * shard * shard * dtype.itemsize > MAX_SHARD_BYTES:
        shard = max(shard // 2 // options.chunk, 1) * options.chunk
    shuffle = "noshuffle" if dtype.itemsize == 1 else "shuffle"
    codec = BloscCodec(options.codec, CLEVELS[options.codec], shuffle, dtype.itemsize)
    layout = ShardLayout(channels, options.chunk, shard, dtype, codec)
    if layout.too_large:
        raise ConversionError(
            f"{target}: chunks of {layout.chunk_bytes} bytes, {layout.grid**2} in a shard, which readers refuse; "
            "choose another chunk"
        )
    return layout
