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
    """Return (N, 4) int64 boxes y, x, h, w; raise ``ValueError`` unless all have one size."""
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
        The parts of boxes in each of these chunks.
    """
    rows = _cut_axis(boxes[:, 0], int(boxes[0, 2]), shape_yx[0], chunk_yx[0])  # (N, R) each
    columns = _cut_axis(boxes[:, 1], int(boxes[0, 3]), shape_yx[1], chunk_yx[1])  # (N, Q) each
    n, r, q = ((rows.stop > rows.start)[:, :, None] & (columns.stop > columns.start)[:, None, :]).nonzero()
    if not len(n):
        return n, n, []
    row, column = rows.chunk[n, r], columns.chunk[n, q]
    number = row * (shape_yx[1] // chunk_yx[1] + 1) + column
    order = number.argsort(kind="stable")
    lines = np.empty((len(n), 9), np.int64)
    lines[:, 0] = n
    for axis, part, at in ((0, rows, (n, r)), (1, columns, (n, q))):
        start, stop, begin, edge = part.start[at], part.stop[at], boxes[n, axis], part.chunk[at] * chunk_yx[axis]
        lines[:, 1 + 2 * axis], lines[:, 2 + 2 * axis] = start - begin, stop - begin
        lines[:, 5 + 2 * axis], lines[:, 6 + 2 * axis] = start - edge, stop - edge
    number = number[order]
    bounds = [0, *((number[1:] != number[:-1]).nonzero()[0] + 1).tolist(), len(order)]
    parts = lines[order].tolist()
    first = order[bounds[:-1]]
    return row[first], column[first], [parts[a:b] for a, b in pairwise(bounds)]


@dataclass(frozen=True, slots=True)
class _AxisParts:
    """Parts of boxes along one axis, (N, K) each, in pixels of the image; empty where ``stop <= start``."""

    chunk: NDArray[np.int64]
    start: NDArray[np.int64]
    stop: NDArray[np.int64]


def _cut_axis(begin: NDArray[np.int64], extent: int, size: int, step: int) -> _AxisParts:
    """Cut ``begin .. begin + extent`` (N boxes) at multiples of ``step`` within ``0 .. size``."""
    begin = begin[:, None]
    inside = np.maximum(begin, 0)
    chunk = inside // step + np.arange((extent + step - 2) // step + 1)
    edge = chunk * step
    end = np.minimum(begin + extent, size)
    return _AxisParts(chunk, np.maximum(edge, inside), np.minimum(edge + step, end))
