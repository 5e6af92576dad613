"""Images that are stored turned or mirrored, by tag 274 of TIFF 6.0 and EXIF 2.32: 1 to 8, where 1 is upright.

It says where the stored image's row 0 and column 0 are to be shown: of 5 to 8 rows are columns, and then rows or
columns are flipped.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

UPRIGHT, TRANSPOSED = 1, (5, 6, 7, 8)
_ROWS_FLIPPED, _COLUMNS_FLIPPED = (3, 4, 7, 8), (2, 3, 6, 7)


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Turn (H, W, C) pixels that are stored in an orientation."""
    if orientation in TRANSPOSED:
        pixels = pixels.transpose(1, 0, 2)
    rows, columns = orientation in _ROWS_FLIPPED, orientation in _COLUMNS_FLIPPED
    return pixels[:: -1 if rows else 1, :: -1 if columns else 1]


def stored_box(
    box: tuple[int, int, int, int], shape_yx: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where a box (y, x, h, w) of the upright image, of height and width ``shape_yx``, is stored."""
    y, x, h, w = box
    if orientation in _ROWS_FLIPPED:
        y = shape_yx[0] - y - h
    if orientation in _COLUMNS_FLIPPED:
        x = shape_yx[1] - x - w
    return (x, y, w, h) if orientation in TRANSPOSED else (y, x, h, w)
