"""Write a tiled TIFF tile by tile."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from storage.errors import ConversionError
from storage.place.atomic import replacing

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable

    from numpy.typing import NDArray


def write_tiff(
    path: str | os.PathLike[str],
    tiles: Iterable[NDArray[Any]],
    *,
    shape: tuple[int, ...],
    dtype: str | np.dtype[Any],
    tile: int = 512,
    compression: str | None = None,
    mpp: float | None = None,
) -> None:
    """Write a tiled (Big)TIFF tile by tile, in memory of a few tiles; the file appears when it is whole.

    Parameters
    ----------
    path
        The file to make or replace.
    tiles
        The (h, w, C) or (h, w) tiles in row-major order; those at the lower and right edges may be cut to the image.
    shape
        The image's (H, W, C) or (H, W).
    dtype
        uint8, uint16 or float32.
    tile
        The side of a tile in pixels, a multiple of 16.
    compression
        None, "deflate", "lzw", "zstd", or "jpeg" (uint8 only; quality 80, colours as YCbCr 4:2:0).
    mpp
        Micrometres per pixel, which are stored as resolution tags.
    """
    if compression not in (None, "deflate", "lzw", "zstd", "jpeg"):
        raise ValueError(f"compression {compression!r} is not one of None, deflate, lzw, zstd, jpeg")
    path = Path(path)
    dtype = np.dtype(dtype)
    colour = len(shape) == 3 and shape[2] >= 3
    settings: dict[str, Any] = {"photometric": "rgb" if colour else "minisblack", "compression": compression}
    if compression == "jpeg":
        settings["compressionargs"] = {"level": 80}  # tifffile turns RGB to YCbCr 4:2:0
    if mpp is not None:
        settings |= {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    big = math.prod(shape) * dtype.itemsize > 2**32 - 2**25
    try:
        with replacing(path) as temporary, tifffile.TiffWriter(temporary, bigtiff=big) as writer:
            padded = (_pad_tile(part, tile, dtype) for part in tiles)
            writer.write(padded, shape=shape, dtype=dtype, tile=(tile, tile), metadata=None, maxworkers=1, **settings)
    except OSError as error:
        raise ConversionError(f"{path}: cannot be written ({error.strerror})") from error


def _pad_tile(part: NDArray[Any], tile: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Fill a cut tile by repeating its edge, which costs least under JPEG."""
    if part.dtype != dtype:
        raise ValueError(f"a tile of type {part.dtype}, expected {dtype}")
    missing = [(0, tile - part.shape[0]), (0, tile - part.shape[1])] + [(0, 0)] * (part.ndim - 2)
    return np.ascontiguousarray(part if part.shape[:2] == (tile, tile) else np.pad(part, missing, mode="edge"))
