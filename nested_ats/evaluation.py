"""Classify with several independent draws, and say how far the draws agree.

Draws may be as many as asked for, as many as a wanted standard error takes, or none where all patches of the opened
regions are encoded instead.

Shape letters: B batch, M draws, Q classes, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nested_ats.base import ImageModel, Output, SamplingModel, take_rows
from nested_ats.images import Image, Map
from nested_ats.model import NestedATS


class Prediction(NamedTuple):
    """Class probabilities with their sampling error.

    Attributes
    ----------
    probabilities
        (B, Q), of the mean of F_hat over the draws: closer to the full model than the mean of probabilities.
    standard_error
        (B, Q), the jackknife standard error of `probabilities` over the draws; NaN for a single draw, zero where
        nothing is drawn.
    outputs
        Outputs of the model, one a draw, for the images that took part in it, in order: image b is in the first
        ``draws[b]`` of them. `of` picks those of one image.
    draws
        (B,) int64: how many draws each image had.
    """

    probabilities: Tensor
    standard_error: Tensor
    outputs: tuple[Output, ...]
    draws: Tensor

    def of(self, image: int) -> tuple[Output, ...]:
        """Outputs of one image of the batch, as batches of one."""
        outputs = self.outputs[: int(self.draws[image])]
        places = [(self.draws[:image] > number).sum() for number in range(len(outputs))]
        return tuple(take_rows(output, place[None]) for output, place in zip(outputs, places, strict=True))


@torch.no_grad()
def predict(
    model: ImageModel,
    images: Sequence[Image],
    keys: Tensor,
    *,
    map_: Map = map,
    target_error: float | None = None,
    least: int = 4,
    exact: int = 0,
) -> Prediction:
    """Classify images with independent draws.

    Parameters
    ----------
    model
        Of any kind. One that draws nothing is asked once.
    images
        B of them. Each coarse view is read and attended to once, whatever M.
    keys
        (B, M) int64: a random key for each draw. M is the number of draws, or their budget.
    map_
        How reads run over the images.
    target_error
        An image stops drawing when the largest standard error of its probabilities is at most this; the others go
        on. The error is itself an estimate, so stopping by it is a little optimistic, the less the larger `least`.
    least
        Draws before an image may stop, >= 2.
    exact
        Patches to encode at once where **all** patches of the opened regions are to be encoded, instead of those
        drawn; 0 to draw. Drawing regions is then the only source of error: a model of one level has none, and is
        asked once. Costs as many patches as the opened regions have cells.

    Raises
    ------
    ValueError
        `least` < 2, or `keys` is not (B, M) with M > 0.
    """
    if least < 2 or keys.ndim != 2 or not keys.shape[1] or len(keys) != len(images):
        raise ValueError("keys must be (B, M) with M > 0, and least at least 2")
    views = list(map_(model.coarse_view, images))
    if not isinstance(model, SamplingModel):
        return _certain(model, model(images, keys[:, 0], views=views, map_=map_))
    first = model.attend(images, views)
    if exact and _levels(model) == 1:
        return _certain(model, model.sample(images, first, keys[:, 0], map_=map_, exact=exact))

    def draw(rows: Tensor, key: Tensor) -> Output:
        batch = [images[row] for row in rows.tolist()]
        population = first if len(batch) == len(images) else take_rows(first, rows)
        return model.sample(batch, population, key, map_=map_, exact=exact)

    return _draw_until(model, draw, keys, target_error, least)


def _certain(model: ImageModel, output: Output) -> Prediction:
    probabilities = model.head(output.features).softmax(-1)
    draws = torch.ones(len(probabilities), dtype=torch.int64)
    return Prediction(probabilities, torch.zeros_like(probabilities), (output,), draws)


def _levels(model: SamplingModel) -> int:
    return len(model.config.levels) if isinstance(model, NestedATS) else 1


def _draw_until(
    model: ImageModel, draw: Callable[[Tensor, Tensor], Output], keys: Tensor, target: float | None, least: int
) -> Prediction:
    """Draw for the images that go on, until none does or the budget is spent."""
    going = torch.arange(len(keys))  # images that still draw
    features: list[Tensor] = []  # of those, (going, D) a draw
    outputs: list[Output] = []
    draws = torch.zeros(len(keys), dtype=torch.int64)
    estimates: dict[int, tuple[Tensor, Tensor]] = {}
    for number, key in enumerate(keys.T, start=1):
        outputs.append(draw(going, key[going.to(key.device)]))
        features.append(outputs[-1].features)
        last = number == keys.shape[1]
        if not last and (target is None or number < least):
            continue
        probabilities, error = _estimate(model, torch.stack(features))
        done = (torch.ones(len(going)) if last else error.amax(-1).cpu() <= (target or 0.0)).bool()
        for place in done.nonzero().flatten().tolist():
            estimates[int(going[place])] = probabilities[place], error[place]
        draws[going[done]] = number
        going = going[~done]
        features = [each[~done.to(each.device)] for each in features]
        if not len(going):
            break
    in_order = (estimates[row] for row in range(len(keys)))
    probabilities, error = (torch.stack(parts) for parts in zip(*in_order, strict=True))
    return Prediction(probabilities, error, tuple(outputs), draws)


def _estimate(model: ImageModel, features: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (B, Q) and their jackknife standard error from the (M, B, D) features of the draws."""
    draws = len(features)
    probabilities = model.head(features.mean(0)).softmax(-1)
    if draws == 1:
        return probabilities, torch.full_like(probabilities, torch.nan)
    without = (features.sum(0) - features) / (draws - 1)
    jackknife = model.head(without).softmax(-1)
    variance = (jackknife - jackknife.mean(0)).square().sum(0) * (draws - 1) / draws
    return probabilities, variance.sqrt()
