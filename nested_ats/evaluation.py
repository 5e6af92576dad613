"""Classify with several independent draws, and say how far the draws agree.

Shape letters: B batch, M draws, Q classes, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_ats.images import Image, Map
from nested_ats.model import NestedATS, Output


class Prediction(NamedTuple):
    """Class probabilities with their sampling error.

    Attributes
    ----------
    probabilities
        (B, Q), of the mean of F_hat over the draws: closer to the full model than the mean of probabilities.
    standard_error
        (B, Q), the jackknife standard error of `probabilities` over the draws; NaN for a single draw.
    outputs
        M outputs of the model, one a draw.
    """

    probabilities: Tensor
    standard_error: Tensor
    outputs: tuple[Output, ...]


@torch.no_grad()
def predict(model: NestedATS, images: Sequence[Image], keys: Tensor, *, map_: Map = map) -> Prediction:
    """Classify images with M independent draws each.

    Parameters
    ----------
    images
        B of them. Each coarse view is read and attended to once, whatever M.
    keys
        (B, M) int64: a random key for each draw.
    map_
        How reads run over the images.
    """
    views = list(map_(model.coarse_view, images))
    first = model.attend(images, views)
    outputs = tuple(model.sample(images, first, key, map_=map_) for key in keys.T)
    features = torch.stack([output.features for output in outputs])  # (M, B, D)
    draws = len(outputs)
    probabilities = model.head(features.mean(0)).softmax(-1)
    if draws == 1:
        return Prediction(probabilities, torch.full_like(probabilities, torch.nan), outputs)
    without = (features.sum(0) - features) / (draws - 1)
    jackknife = model.head(without).softmax(-1)
    variance = (jackknife - jackknife.mean(0)).square().sum(0) * (draws - 1) / draws
    return Prediction(probabilities, variance.sqrt(), outputs)
