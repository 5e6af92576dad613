"""Pixels that hold no data: which they are, and how files tell their value.

A value stands for "nothing was recorded here" in each channel on its own, as GDAL has it. Of floating-point images,
NaN does so too, whatever the file says. An alpha channel that is 0 says it of all channels at once; the mask that a
GeoTIFF has besides its pixels is read as one.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}  # as zarr writes fill values


def holds_data(pixels: NDArray[Any], nodata: float | None, alpha: int | None = None) -> NDArray[np.bool_]:
    """Whether each of some pixels holds data.

    Parameters
    ----------
    pixels
        Of any shape; (..., C, H, W) where there is an alpha channel.
    nodata
        The value of those that hold none, if there is one.
    alpha
        The number of the channel whose zeros say that no channel holds data, if there is one.
    """
    there: NDArray[np.bool_] = ~np.isnan(pixels) if pixels.dtype.kind == "f" else np.ones(pixels.shape, bool)
    if nodata is not None and not math.isnan(nodata):
        there &= pixels != pixels.dtype.type(nodata)
    if alpha is not None:
        shown = pixels[..., alpha, :, :] > 0
        there &= shown[..., None, :, :]
        there[..., alpha, :, :] = shown
    return there


def fitting(value: Any, dtype: np.dtype[Any]) -> float | None:
    """A "no data" value of a file, a number or text of one, as pixels of a type have it.

    None where no pixel can have it: it is no number, or the type does not hold it.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if dtype.kind == "f":
        fits = not math.isfinite(number) or abs(number) <= float(np.finfo(dtype).max)
        return float(dtype.type(number)) if fits else None
    bounds = np.iinfo(dtype if dtype.kind != "b" else np.uint8)
    return number if number.is_integer() and bounds.min <= number <= bounds.max else None


def to_json(nodata: float) -> float | str:
    """A "no data" value as JSON can hold it."""
    if math.isfinite(nodata):
        return nodata
    return "NaN" if math.isnan(nodata) else "Infinity" if nodata > 0 else "-Infinity"


def from_json(value: Any, dtype: np.dtype[Any]) -> float | None:
    """Read what `to_json` wrote of an image of a type; None stays None.

    Raises
    ------
    ValueError
        It is no number, or none that the type holds.
    """
    if value is None:
        return None
    nodata = fitting(_SPECIAL.get(value) if isinstance(value, str) else value, dtype)
    if nodata is None or isinstance(value, bool):
        raise ValueError(f"nodata is {ascii(value)[:60]}, which no pixel of type {dtype} can be")
    return nodata
