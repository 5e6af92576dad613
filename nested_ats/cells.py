"""Where a cell of an attention map lies in the image, and the order in which cells are listed.

An attention network of receptive field RF sees a view of an image at some downsample. With valid convolutions, as in
the paper's implementation, its map starts (RF - 1) / 2 pixels inside the view. `NestedATS` reads every view with that
margin around it, so that the cells of the map tile the view exactly (`cell_centers`) and none is missing at a border.

Coordinates are y, x; ``_l0`` marks pixels of the finest level, others are in pixels of the view.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from nested_ats.images import Image

_CURVE_BITS = 16  # cells of a map are numbered on a 65,536 x 65,536 curve


def cell_centers(cells: int, view: float) -> Tensor:
    """Centres of the cells of a map along one axis, in pixels of the view, which the cells divide evenly.

    Parameters
    ----------
    cells
        The number of cells of the map along the axis.
    view
        The number of pixels of the view along the axis.

    Returns
    -------
    (cells,) float64
    """
    return (torch.arange(cells, dtype=torch.float64) + 0.5) * (view / cells)


def box_starts(centers_l0: Tensor, downsample: float, size: int) -> Tensor:
    """First pixels of boxes of `size` pixels of a level that are centred on points; halves are rounded down.

    Parameters
    ----------
    centers_l0
        (..., 2) float64, y and x in level-0 pixels.
    downsample
        The downsample of the level that the box is read from, >= 1.
    size
        Side of the box in that level's pixels.

    Returns
    -------
    (..., 2) int64; negative where a box leaves the image.
    """
    return (centers_l0 / downsample - size / 2 - 0.5).ceil().long()


@lru_cache(maxsize=32)
def curve_order(height: int, width: int) -> Tensor:
    """Indices ``y * width + x`` of a map's cells along a Hilbert curve, whose neighbours are neighbours in the map.

    The curve is the same for every map, so a map's order does not depend on what it is batched with. On a map that
    is no square of a power of two the list jumps where the curve leaves the map, between a few of the cells.

    Parameters
    ----------
    height, width
        Size of the map in cells, at most 65,536.

    Returns
    -------
    (height * width,) int64
    """
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x = y.reshape(-1), x.reshape(-1)
    distance = torch.zeros_like(x)
    for bit in reversed(range(_CURVE_BITS)):
        side = 1 << bit
        right, down = (x & side) > 0, (y & side) > 0
        distance += side * side * ((3 * right.long()) ^ down.long())
        x, y = x & (side - 1), y & (side - 1)
        # Turn the quadrant, so that the four sub-curves join end to start.
        flip = right & ~down
        x, y = torch.where(flip, side - 1 - x, x), torch.where(flip, side - 1 - y, y)
        x, y = torch.where(down, x, y), torch.where(down, y, x)
    return distance.argsort()


def image_cells(images: Sequence[Image], extent_l0: float) -> tuple[Tensor, Tensor]:
    """Cells of `extent_l0` level-0 pixels that tile each image, along the curve.

    Returns
    -------
    centers_l0, there
        (B, K, 2) float64 with the K of the largest image, and (B, K): whether an image has this cell.
    """
    lists = []
    for image in images:
        rows, columns = (math.ceil(side / extent_l0) for side in image.shapes[0])
        lists.append(grid_centers(rows, columns, extent_l0))
    most = max(map(len, lists))
    centers = torch.stack([functional.pad(each, (0, 0, 0, most - len(each))) for each in lists])
    return centers, torch.arange(most) < torch.tensor([len(each) for each in lists])[:, None]


def grid_centers(rows: int, columns: int, side: float) -> Tensor:
    """Centres (rows columns, 2) of the cells of a map, of `side` pixels each, along the curve."""
    y, x = cell_centers(rows, rows * side), cell_centers(columns, columns * side)
    return torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flatten(0, 1)[curve_order(rows, columns)]


def boxes_at(centers_l0: Tensor, downsample: float, size: int) -> Tensor:
    """Boxes (..., 4) of `size` pixels of a level, centred on (..., 2) points of the finest."""
    starts = box_starts(centers_l0, downsample, size)
    return torch.cat([starts, torch.full_like(starts, size)], -1)


def image_sizes(images: Sequence[Image]) -> Tensor:
    """Height and width of each image in level-0 pixels, (B, 2) float64."""
    return torch.tensor([image.shapes[0] for image in images], dtype=torch.float64)
