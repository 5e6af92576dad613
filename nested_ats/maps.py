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

from nested_ats.phases import Output, Phase

_CELLS = 10_000  # how many are spread at once


def attention_map(
    outputs: Sequence[Output], shape_l0: tuple[int, int], *, pitch_l0: float | None = None
) -> tuple[Tensor, float]:
    """Mean attention map of one image over several draws.

    Parameters
    ----------
    outputs
        The model's outputs for the image, one for each draw; see `Prediction.of`.
    shape_l0
        Height and width of the image in level-0 pixels.
    pitch_l0
        Side of a pixel of the map in level-0 pixels; by default that of the finest cells.

    Returns
    -------
    map, pitch_l0
        (ceil(H / pitch), ceil(W / pitch)) float64 that sums to one; pixel (i, j) covers level-0 pixels
        [i, i + 1) x [j, j + 1) times the pitch, which is returned too.

    Raises
    ------
    ValueError
        The outputs are those of a model without attention.
    """
    if not outputs[0].phases:
        raise ValueError("the model has no attention to map")
    pitch = pitch_l0 or min(phase.population.extent_l0 for phase in outputs[0].phases)
    total = empty_map(shape_l0, pitch)
    for output in outputs:
        for phase, mass in zip(output.phases, _unopened(output.phases), strict=True):
            population = phase.population
            spread_cells(total, mass, population.centers_l0[0].flatten(0, 1), population.extent_l0, pitch)
    return total / total.sum(), pitch


def empty_map(shape_l0: tuple[int, int], pitch_l0: float) -> Tensor:
    """Make a map of zeros over an image; see `attention_map`."""
    height, width = (math.ceil(side / pitch_l0) for side in shape_l0)
    return torch.zeros(height, width, dtype=torch.float64)


def _unopened(phases: Sequence[Phase]) -> list[Tensor]:
    """Attention left in the cells of each level, (n k) each: that of opened cells has gone to the level below."""
    masses = []
    parent = torch.ones(1, dtype=torch.float64)
    for depth, phase in enumerate(phases):
        within = phase.population.log_attention[0].double().exp().cpu()  # (n, k)
        mass = (parent[:, None] * within).flatten()
        if depth + 1 < len(phases):
            # A cell drawn twice, or repeated to fill an empty slot, is opened once.
            indices = phase.drawn.indices[0].cpu()
            first = torch.cat([torch.ones(1, dtype=torch.bool), indices.diff() != 0])
            first &= phase.drawn.z[0].cpu() > 0
            parent = torch.where(first, mass[indices], 0.0)
            mass = mass.index_fill(0, indices[first], 0.0)
        masses.append(mass)
    return masses


def spread_cells(total: Tensor, mass: Tensor, centers_l0: Tensor, extent: float, pitch: float) -> None:
    """Add the mass of square cells to a map by the area that they share with its pixels, off-image area left out.

    Parameters
    ----------
    total
        (H, W) float64, the map; it is changed.
    mass
        (n,) of any sign.
    centers_l0
        (n, 2) float64: centres of the cells in level-0 pixels.
    extent, pitch
        Sides of a cell and of a pixel of the map in level-0 pixels.
    """
    held = mass != 0
    size = torch.tensor(total.shape)[:, None]
    steps = torch.arange(math.ceil(extent / pitch) + 1)  # pixels that a cell may touch along an axis
    for weight, center in zip(torch.split(mass[held], _CELLS), torch.split(centers_l0[held], _CELLS), strict=True):
        low = (center - extent / 2)[..., None]  # (cells, 2, 1)
        pixel = (low / pitch).floor().long() + steps  # (cells, 2, steps)
        start = pixel.double() * pitch  # whole numbers times a float would be float32
        overlap = torch.minimum(start + pitch, low + extent) - torch.maximum(start, low)
        overlap = overlap.clamp_min(0) * ((pixel >= 0) & (pixel < size))
        y, x = (overlap / overlap.sum(-1, keepdim=True).clamp_min(1e-12)).unbind(1)
        row, column = pixel.clamp_min(0).minimum(size - 1).unbind(1)
        places = row[:, :, None] * total.shape[1] + column[:, None, :]
        values = weight[:, None, None] * y[:, :, None] * x[:, None, :]
        total.view(-1).index_add_(0, places.flatten(), values.flatten())
