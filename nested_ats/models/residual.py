"""Attention that refines: a finer level's logits are those of its parent's map plus what its own network adds.

Where nothing is added, the nested model *is* the one-level model of its coarsest map, at any depth: the attention of
a region is that of its cells together, ``A_r = softmax_r(logsumexp of l_c over c in r)``, and inside it each finer
cell starts with the share of the parent's cells that it covers. The gradient of a patch so reaches the coarse network
cell by cell, and not only as the sum over a region.

Shape letters: B batch, n regions, g parent's cells along a side of a region, k cells of the region's own map.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_SHARE = 1e-30  # a cell with a smaller part of the largest cell in its region has no gradient


def group_logits(cells: Tensor) -> Tensor:
    """Logit of each unit: the logsumexp of the (..., g, g) logits of its cells, -inf where all of them are."""
    flat = cells.flatten(-2)
    possible = flat != -torch.inf  # NaN is kept, so that a diverged model is noticed
    # The logsumexp of nothing but -inf has a gradient of NaN.
    logits = flat.masked_fill(~possible, -1e5).logsumexp(-1)
    return logits.masked_fill(~possible.any(-1), -torch.inf)


def inherited(cells: Tensor, starts: Tensor, ratio: float, count: int) -> Tensor:
    """Logits that the cells of regions inherit from the parent's map, by the area that they share with its cells.

    A parent's cell spreads evenly over its area: a finer cell has the log of the sum of ``exp(l_c)`` times the share
    of c's area that lies in it. Where the grids nest, that is the logit of the cell around it less the log of the
    number of finer cells there.

    Parameters
    ----------
    cells
        (B, n, g, g) logits of the parent's cells in each region, -inf where impossible.
    starts
        (B, n, 2): first corner of each region's own map, y and x, from that of the parent's cells, in parent's cells.
    ratio
        Side of a finer cell in parent's cells.
    count
        k, finer cells along a side.

    Returns
    -------
    (B, n, k, k), -inf where a cell shares nothing with a possible one.
    """
    side = cells.shape[-1]
    low = starts[..., None] + torch.arange(count, dtype=starts.dtype) * ratio  # (B, n, 2, k)
    place = torch.arange(side, dtype=starts.dtype)
    share = torch.minimum(low[..., None] + ratio, place + 1) - torch.maximum(low[..., None], place)
    share = share.clamp_min(0).to(cells.device, cells.dtype)  # (B, n, 2, k, g)
    rows, columns = share.unbind(2)
    possible = cells != -torch.inf
    top = cells.detach().flatten(-2).amax(-1)[..., None, None].clamp_min(-1e5)
    mass = rows @ (cells - top).masked_fill(~possible, -torch.inf).exp() @ columns.transpose(-1, -2)
    logits = mass.clamp_min(_LEAST_SHARE).log() + top
    return logits.masked_fill(mass <= 0, -torch.inf)
