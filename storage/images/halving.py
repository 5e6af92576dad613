"""Average 2 x 2 pixels, which makes every coarser level of a pyramid.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

BLOCK_ROWS = 128  # so many rows are averaged at once
SUM_TYPES = {"uint8": np.uint16, "uint16": np.uint32, "int16": np.int32}  # for sums of four; floats keep their type


def downsample(pixels: NDArray[Any], out: NDArray[Any] | None = None) -> NDArray[Any]:
    """Average 2x2 pixels.

    Parameters
    ----------
    pixels
        (C, H, W) uint8, uint16, int16, float32 or float64.
    out
        An array (C, ceil(H / 2), ceil(W / 2)) of the same type to fill; it is made if None.

    Returns
    -------
    (C, ceil(H / 2), ceil(W / 2)) of the same type
        Integers are rounded half up, ``(a + b + c + d + 2) >> 2``. At an odd edge the mean is over the one or two
        pixels there are, which is what repeating the edge gives.
    """
    _, height, width = pixels.shape
    if height % 2 or width % 2:
        pixels = np.pad(pixels, ((0, 0), (0, height % 2), (0, width % 2)), mode="edge")
    channels, height, width = pixels.shape
    if out is None:
        out = np.empty((channels, height // 2, width // 2), pixels.dtype)
    for c in range(channels):
        for y in range(0, height, BLOCK_ROWS):  # these parts stay in the processor's cache
            _mean_2x2(pixels[c, y : y + BLOCK_ROWS], out[c, y // 2 : (y + BLOCK_ROWS) // 2])
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
