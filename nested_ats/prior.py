"""Where there can be anything to see: tissue on a slide, or the valid area of a scene.

A cell of an attention map in which nothing lies gets the logit -inf, at every level: it is never drawn, and none of
the budget goes to empty glass. What "something" is, is a number for each pixel and a threshold for each image, which
is found in the view of the whole image and holds for all finer ones.

Shape letters: B views, C channels, H W pixels, s stride.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

Prior = Literal["none", "tissue", "valid"]
PRIORS: tuple[Prior, ...] = get_args(Prior)

_BINS = 256
# Saturation of glass is below the first, of stained tissue above the second; Otsu's threshold is kept between them,
# as it splits a slide without glass, or without tissue, somewhere within the one thing that is there.
_GLASS, _STAINED = 0.03, 0.12
_DARK = 0.1  # below this largest channel, hue and saturation are noise
_SHARE = 0.05  # of a cell's pixels that make it a cell with something in it


def signal(views: Tensor, prior: Prior, nodata: float) -> Tensor:
    """How much is in each pixel, (B, H, W) in [0, 1], of (B, C, H, W) pixels in [0, 1].

    ``tissue``: the saturation of the HSV model, which glass does not have. ``valid``: the distance from `nodata`, the
    value of pixels that were never recorded.
    """
    if prior == "valid":
        return (views - nodata).abs().amax(1)
    largest, smallest = views.amax(1), views.amin(1)
    return torch.where(largest > _DARK, (largest - smallest) / largest.clamp_min(_DARK), 0.0)


def thresholds(signals: Tensor, prior: Prior) -> Tensor:
    """Threshold (B,) of each image from the (B, H, W) signal of the whole of it.

    ``tissue``: Otsu's (1979), the cut of the histogram with the largest variance between its sides, kept between
    what glass and what stain have. ``valid``: half of the step between two values of 8 bits.
    """
    if prior == "valid":
        return signals.new_full((len(signals),), 0.5 / 255)
    bins = (signals.flatten(1) * (_BINS - 1)).long().clamp(0, _BINS - 1)
    counts = torch.zeros(len(signals), _BINS, device=signals.device, dtype=torch.float64)
    counts.scatter_add_(1, bins, torch.ones_like(bins, dtype=torch.float64))
    value = torch.arange(_BINS, device=signals.device, dtype=torch.float64)
    below, total = counts.cumsum(1), counts.sum(1, keepdim=True)
    mass, whole = (counts * value).cumsum(1), (counts * value).sum(1, keepdim=True)
    between = (whole * below - mass * total).square() / (below * (total - below)).clamp_min(1)
    cut = (between.argmax(1) + 0.5) / (_BINS - 1)
    return cut.clamp(_GLASS, _STAINED).to(signals.dtype)


def occupied(signals: Tensor, threshold: Tensor, stride: int) -> Tensor:
    """Whether something is in each cell: (B, H, W) signals and (B,) thresholds -> (B, H / s, W / s)."""
    above = (signals > threshold[:, None, None]).to(signals.dtype)
    return functional.avg_pool2d(above[:, None], stride)[:, 0] >= _SHARE
