"""Attention of a nested model as one map over the image, aligned by level-0 coordinates.

A region that was not opened spreads its attention evenly over its cell; one that was opened spreads it over the
cells of its own map, and so on down. The map is therefore a probability distribution over the image whatever was
drawn, sharp where the model looked closely.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nested_ats.model import Output, Phase


def attention_map(
    outputs: Sequence[Output], shape_l0: tuple[int, int], *, row: int = 0, pitch_l0: float | None = None
) -> tuple[Tensor, float]:
    """Mean attention map of one image over several draws.

    Parameters
    ----------
    outputs
        Of the model for the same batch, one a draw.
    shape_l0
        Height and width of the image in level-0 pixels.
    row
        The image's place in the batch.
    pitch_l0
        Side of a pixel of the map in level-0 pixels; by default that of the finest cells.

    Returns
    -------
    map, pitch_l0
        (ceil(H / pitch), ceil(W / pitch)) float64 that sums to one; pixel (i, j) covers level-0 pixels
        [i, i + 1) x [j, j + 1) times the pitch. And the pitch.
    """
    pitch = pitch_l0 or min(phase.population.extent_l0 for phase in outputs[0].phases)
    height, width = (math.ceil(side / pitch) for side in shape_l0)
    total = torch.zeros(height, width, dtype=torch.float64)
    for output in outputs:
        for phase, mass in zip(output.phases, _unopened(output.phases, row), strict=True):
            population = phase.population
            _spread(total, mass, population.centers_l0[row].flatten(0, 1), population.extent_l0, pitch)
    return total / total.sum(), pitch


def _unopened(phases: Sequence[Phase], row: int) -> list[Tensor]:
    """Attention that rests in the cells of each level, (n k) each: that of opened cells has gone down."""
    masses = []
    parent = torch.ones(1, dtype=torch.float64)
    for depth, phase in enumerate(phases):
        within = phase.population.log_attention[row].double().exp().cpu()  # (n, k)
        mass = (parent[:, None] * within).flatten()
        if depth + 1 < len(phases):
            # A cell drawn twice, or repeated to fill an empty slot, is opened once.
            indices = phase.drawn.indices[row].cpu()
            first = torch.cat([torch.ones(1, dtype=torch.bool), indices.diff() != 0])
            first &= phase.drawn.z[row].cpu() > 0
            parent = torch.where(first, mass[indices], 0.0)
            mass = mass.index_fill(0, indices[first], 0.0)
        masses.append(mass)
    return masses


def _spread(total: Tensor, mass: Tensor, centers_l0: Tensor, extent: float, pitch: float) -> None:
    """Add the mass of square cells to a map by the area that they share with its pixels, off-image area left out."""
    held = mass > 0
    parts = math.ceil(extent / pitch - 1e-9)  # cut into squares no larger than a pixel, which touch at most 2 x 2
    side = extent / parts
    offsets = (torch.arange(parts, dtype=torch.float64) + 0.5) * side - extent / 2
    grid = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1).flatten(0, 1)
    starts = (centers_l0[held][:, None] + grid - side / 2) / pitch  # (cells, parts^2, 2) in pixels of the map
    first = starts.floor()
    beyond = (starts + side / pitch - first - 1).clamp_min(0) * pitch / side  # share in the next pixel
    shares, places = [], []
    for dy in (0, 1):
        for dx in (0, 1):
            y, x = first[..., 0] + dy, first[..., 1] + dx
            share = (beyond[..., 0] if dy else 1 - beyond[..., 0]) * (beyond[..., 1] if dx else 1 - beyond[..., 1])
            within = (y >= 0) & (y < total.shape[0]) & (x >= 0) & (x < total.shape[1])
            shares.append(share * within)
            places.append((y * total.shape[1] + x) * within)
    share, place = torch.stack(shares), torch.stack(places).long()
    weights = mass[held][:, None] * share / share.sum((0, 2), keepdim=True)[0].clamp_min(1e-12)
    total.view(-1).index_add_(0, place.flatten(), weights.flatten())
