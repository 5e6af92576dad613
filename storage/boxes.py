"""Boxes and the chunks under them: array arithmetic, so that a batch costs little more than one box.

Shape letters: N boxes, K chunks touched, R rows and Q columns of chunks that a box can touch.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# A part of a box that lies in one chunk: number of the box, y0, y1, x0, x1 in the box, y0, y1, x0, x1 in the chunk.
Part = list[int]


def check_boxes(boxes: ArrayLike) -> NDArray[np.int64]:
    """(N, 4) int64 of y, x, h, w, all of one size; anything else is a ``ValueError``."""
    array = np.asarray(boxes)
    if array.size == 0:
        return np.empty((0, 4), np.int64)
    if array.ndim != 2 or array.shape[1] != 4 or array.dtype.kind not in "iu":
        raise ValueError(f"boxes must be (N, 4) integers y, x, h, w, not {array.shape} {array.dtype}")
    array = array.astype(np.int64, copy=False)
    if (array[:, 2:] != array[0, 2:]).any() or (array[0, 2:] < 0).any():
        raise ValueError("boxes must all have the same height and width, not negative")
    return array


def cut(
    boxes: NDArray[np.int64], shape_yx: tuple[int, int], chunk_yx: tuple[int, int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[list[Part]]]:
    """Cut boxes at the borders of chunks and of the image.

    Parameters
    ----------
    boxes
        (N, 4) as ``check_boxes`` gives them, N > 0.
    shape_yx, chunk_yx
        Height and width of the image and of its chunks, pixels.

    Returns
    -------
    rows, columns
        (K,) each: the chunks touched, each once, row by row.
    parts
        For each of these chunks, the parts of boxes in it.
    """
    rows = _cut_axis(boxes[:, 0], int(boxes[0, 2]), shape_yx[0], chunk_yx[0])  # (N, R) each
    columns = _cut_axis(boxes[:, 1], int(boxes[0, 3]), shape_yx[1], chunk_yx[1])  # (N, Q) each
    n, r, q = np.nonzero((rows.stop > rows.start)[:, :, None] & (columns.stop > columns.start)[:, None, :])
    if not len(n):
        return n, n, []
    row, column = rows.chunk[n, r], columns.chunk[n, q]
    number = row * (shape_yx[1] // chunk_yx[1] + 1) + column
    order = np.argsort(number, kind="stable")
    n, r, q, number = n[order], r[order], q[order], number[order]
    y0, y1, y = rows.start[n, r], rows.stop[n, r], rows.inner[n, r]
    x0, x1, x = columns.start[n, q], columns.stop[n, q], columns.inner[n, q]
    lines = np.stack([n, y0, y1, x0, x1, y, y + y1 - y0, x, x + x1 - x0], axis=1).tolist()
    first = np.flatnonzero(np.diff(number, prepend=-1))
    bounds = [*first.tolist(), len(lines)]
    parts = [lines[a:b] for a, b in pairwise(bounds)]
    return row[order[first]], column[order[first]], parts


@dataclass(frozen=True, slots=True)
class _AxisParts:
    """Parts of boxes along one axis, (N, K) each; where ``stop <= start`` there is none."""

    chunk: NDArray[np.int64]
    start: NDArray[np.int64]  # in the box
    stop: NDArray[np.int64]
    inner: NDArray[np.int64]  # in the chunk


def _cut_axis(begin: NDArray[np.int64], extent: int, size: int, step: int) -> _AxisParts:
    """Cut ``begin .. begin + extent`` (N boxes) at multiples of ``step`` within ``0 .. size``."""
    begin = begin[:, None]
    count = (extent + step - 2) // step + 1
    chunk = np.maximum(begin, 0) // step + np.arange(count)
    edge = chunk * step
    low = np.maximum(np.maximum(edge, begin), 0)
    high = np.minimum(np.minimum(edge + step, begin + extent), size)
    return _AxisParts(chunk, low - begin, high - begin, low - edge)
