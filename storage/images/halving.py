"""Average 2 x 2 pixels, which makes every coarser level of a pyramid: the one rule of conversion and of reading.

Notable: pixels that hold no data are never averaged with others, which costs nothing where there are none.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.format.nodata import holds_data

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_ROWS = 128  # so many rows are averaged at once
# For sums of eight; floats keep their type.
SUM_TYPES = {
    "uint8": np.uint16,
    "int8": np.int16,
    "uint16": np.uint32,
    "int16": np.int32,
    "uint32": np.int64,
    "int32": np.int64,
}


def downsample(
    pixels: NDArray[Any],
    out: NDArray[Any] | None = None,
    *,
    nodata: float | None = None,
    alpha: int | None = None,
) -> NDArray[Any]:
    """Average 2x2 pixels.

    Parameters
    ----------
    pixels
        (C, H, W) of one of the types that a pyramid holds.
    out
        An array (C, ceil(H / 2), ceil(W / 2)) of the same type to fill; it is made if None.
    nodata
        The value of pixels that hold no data, each channel for itself; NaN holds none in any case.
    alpha
        The number of the channel whose zeros say that no channel holds data there.

    Returns
    -------
    (C, ceil(H / 2), ceil(W / 2)) of the same type
        The mean of those of the four pixels that hold data, `nodata` (or NaN) where none does. Integers are rounded
        half up, ``(a + b + c + d + 2) >> 2``. A mean that comes out as `nodata` itself is raised to the next value,
        as GDAL does, because there is data. At an odd edge the mean is over the one or two pixels there are, which
        is what repeating the edge gives. Where alpha is 0 in all four, all channels are 0; elsewhere it is the
        mean of the alphas that are not.
    """
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    channels, height, width = pixels.shape
    if out is None:
        out = np.empty((channels, height // 2, width // 2), pixels.dtype)
    for c in range(channels):
        for y in range(0, height, BLOCK_ROWS):  # these parts stay in the processor's cache
            rows, halved = slice(y, y + BLOCK_ROWS), slice(y // 2, (y + BLOCK_ROWS) // 2)
            shown = None if alpha is None else pixels[alpha, rows] > 0
            _mean_of_data(pixels[c, rows], out[c, halved], None if c == alpha else nodata, shown)
    return out


def whole_ratio(finest_yx: tuple[int, int], coarser_yx: tuple[int, int]) -> int | None:
    """How many times smaller a level is, where both its sides are rounded, up or down, from one whole number.

    Of small levels several numbers fit; then it is a power of two.
    """
    longer = coarser_yx.index(max(coarser_yx))
    ratio = finest_yx[longer] / coarser_yx[longer]
    for candidate in (2 ** round(math.log2(ratio)), round(ratio)) if ratio >= 1 else ():
        pairs = zip(finest_yx, coarser_yx, strict=True)
        if all(abs(own * candidate - finest) < candidate for finest, own in pairs):
            return candidate
    return None


def _mean_of_data(
    pixels: NDArray[Any], out: NDArray[Any], nodata: float | None, shown: NDArray[np.bool_] | None
) -> None:
    """As `_mean_2x2`, leaving out the pixels that hold no data, or are not `shown` by an alpha channel."""
    if shown is not None and shown.all():
        shown = None
    if shown is None and (nodata is None or math.isnan(nodata)):
        _mean_2x2(pixels, out)
        if out.dtype.kind != "f" or not np.isnan(out).any():  # a NaN would show in the mean
            return
    there = holds_data(pixels, nodata)
    # Integers without such a value have nothing to keep clear of, but what alpha hides, which becomes 0 below.
    nothing = (
        None if nodata is None and out.dtype.kind != "f" else out.dtype.type(math.nan if nodata is None else nodata)
    )
    if shown is not None:
        there &= shown
    if there.all():
        _mean_2x2(pixels, out)
        _keep_clear(out, nothing)
        return
    rows = there[0::2].astype(np.uint8) + there[1::2]
    count = rows[:, 0::2] + rows[:, 1::2]
    pixels = np.where(there, pixels, out.dtype.type(0))
    if out.dtype.kind == "f":
        _mean_2x2(pixels, out)  # a quarter of the sum
        with np.errstate(over="ignore"):  # as three of the largest numbers may round
            out *= (4 / np.maximum(count, 1)).astype(out.dtype)
    else:
        wide = SUM_TYPES[out.dtype.name]
        sums = np.add(pixels[0::2], pixels[1::2], dtype=wide)
        total, number = sums[:, 0::2] + sums[:, 1::2], count.astype(wide)
        np.floor_divide(2 * total + number, 2 * np.maximum(number, 1), out=out, casting="unsafe")
    _keep_clear(out, nothing)
    out[count == 0] = 0 if nothing is None else nothing
    if shown is not None:
        out[~shown.reshape(len(out), 2, -1, 2).any((1, 3))] = 0


def _keep_clear(out: NDArray[Any], nothing: Any) -> None:
    """Raise means that come out as the value of pixels without data."""
    if nothing is not None:
        out[out == nothing] = _following(nothing)


def _following(value: Any) -> Any:
    """The next larger value of the type of a number: of integers always there, where it is a mean of other ones."""
    if value.dtype.kind != "f":
        return value + value.dtype.type(value < np.iinfo(value.dtype).max)
    # Not the number that follows zero, which processors may be told to take for zero.
    return np.nextafter(value, value.dtype.type(math.inf)) if value else np.finfo(value.dtype).tiny


def _mean_2x2(pixels: NDArray[Any], out: NDArray[Any]) -> None:
    """Average (H, W) into (H / 2, W / 2), both even: first pairs of rows, which lie side by side in memory."""
    if pixels.dtype.kind == "f":
        quarter = pixels.dtype.type(0.25)  # scaled before they are added, so that no sum overflows
        with np.errstate(invalid="ignore"):  # the mean of infinities of both signs is no number, as it should be
            rows = pixels[0::2] * quarter
            rows += pixels[1::2] * quarter
            np.add(rows[:, 0::2], rows[:, 1::2], out=out)
        return
    rows = np.add(pixels[0::2], pixels[1::2], dtype=SUM_TYPES[pixels.dtype.name])
    total = rows[:, 0::2] + rows[:, 1::2]
    total += 2
    np.right_shift(total, 2, out=out, casting="unsafe")
