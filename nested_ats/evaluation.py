"""Answer with several independent draws, and say how far the draws agree.

The number of draws is given, or follows from a wanted error; or all patches of the opened regions are encoded and
none is drawn.

A handful of draws is a small sample, and a probability is far from linear in F_hat where it is near 0 or 1. Intervals
are therefore Student's t, with M - 1 degrees of freedom, on the scale of the target that is nearly linear in F_hat,
as the logit of a class against the rest, and are then transformed back (`benchmarks/interval_coverage.py` simulates
them).

Shape letters: B batch, M draws, Q numbers of the head, A answers, D features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nested_ats.images import Image
from nested_ats.models.base import ImageModel
from nested_ats.models.nested import NestedATS
from nested_ats.models.patches import SamplingModel
from nested_ats.phases import Output, take_rows
from nested_ats.reading import Reading, interleave, run
from nested_ats.targets import Target, as_target

CONFIDENCE = 0.95  # of every interval
_AHEAD = 4  # draws under way at a time
_CELLS, _FINE_CELLS = 512, 4096  # points of the integrals over Student's t, for errors and for its quantile

Head = Callable[[Tensor], Tensor]  # (..., D) features -> (..., Q) logits


class Estimate(NamedTuple):
    """Answers from several draws.

    Attributes
    ----------
    answers
        (B, A), of the mean of F_hat over the draws: closer to the full model than the mean of answers.
    standard_error
        (B, A), the jackknife standard error of `answers`; NaN for a single draw.
    low, high
        (B, A), limits of the 95 % interval of each answer; NaN for a single draw.
    """

    answers: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor


class Prediction(NamedTuple):
    """Answers with their sampling error.

    Attributes
    ----------
    answers
        (B, A), what `nested_ats.Target.answers` returns, as the probabilities of classes, of the mean of F_hat over
        the draws: closer to the full model than the mean of answers.
    standard_error
        (B, A), the jackknife standard error of `answers` over the draws; NaN for a single draw, zero where nothing is
        drawn.
    low, high
        (B, A), limits of the 95 % interval of each answer (`estimate`): the range in which a model without sampling
        error would lie. NaN for a single draw, the answer itself where nothing is drawn.
    outputs
        Outputs of the model, one for each draw, for the images that took part in it, in order: image b is in the
        first ``draws[b]`` of them. `of` picks those of one image.
    draws
        (B,) int64: how many draws each image had.
    """

    answers: Tensor
    standard_error: Tensor
    low: Tensor
    high: Tensor
    outputs: tuple[Output, ...]
    draws: Tensor

    @property
    def probabilities(self) -> Tensor:
        """The `answers` of a model of classes, (B, Q)."""
        return self.answers

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
    readers: Executor | None = None,
    target_error: float | None = None,
    least: int = 4,
    exact: int = 0,
) -> Prediction:
    """Classify images with independent draws.

    Parameters
    ----------
    model
        A model of any kind. One that draws nothing is run once.
    images
        The B images. Each coarse view is read and attended to once, whatever M.
    keys
        (B, M) int64: a random key for each draw. M is the number of draws, or their budget.
    readers
        The threads that read, for several draws at a time; by default this thread does.
    target_error
        An image stops drawing when the largest error to be expected of its answers (`expected_error`) is at most
        this; the others go on.
    least
        The least number of draws before an image may stop, >= 2.
    exact
        0 to draw patches. Otherwise **all** patches of the opened regions are encoded, this many at once, which costs
        as many patches as the regions have cells. Drawing regions is then the only source of error: a model of one
        level has none and is run once.

    Raises
    ------
    ValueError
        `least` < 2, or `keys` is not (B, M) with M > 0.
    """
    if least < 2 or keys.ndim != 2 or not keys.shape[1] or len(keys) != len(images):
        raise ValueError("keys must be (B, M) with M > 0, and least at least 2")
    if not isinstance(model, SamplingModel):
        return _certain(model, run(model.classify(images, keys[:, 0]), readers))
    first = model.attend(images, run(model.coarse_views(images), readers))
    if exact and _levels(model) == 1:
        return _certain(model, run(model.sample(images, first, keys[:, 0], exact=exact), readers))

    def draw(number: int, rows: Tensor) -> Reading[Output]:
        batch = [images[row] for row in rows.tolist()]
        population = first if len(batch) == len(images) else take_rows(first, rows)
        return model.sample(batch, population, keys[rows.to(keys.device), number], exact=exact)

    return _draw_until(model, draw, keys.shape, target_error, least, readers)


def estimate(head: Head, features: Tensor, target: Target | None = None) -> Estimate:
    """Answers, their standard error and their 95 % interval from independent draws.

    The interval is Student's t of M - 1 degrees of freedom on the scale on which answers are nearly linear in the
    features (`Target.linear`), as the logit of a class against the rest, with the jackknife's standard error there,
    transformed back.

    Parameters
    ----------
    head
        Maps features to the numbers of the target, such as logits.
    features
        (M, B, D): F_hat of each draw.
    target
        What the numbers mean; by default they are logits of classes.
    """
    draws = len(features)
    logits = head(features.mean(0))
    target = target or as_target(logits.shape[-1])
    answers = target.answers(logits)
    if draws == 1:
        return Estimate(answers, *(torch.full_like(answers, torch.nan) for _ in range(3)))
    center, spread = _on_linear_scale(head, features, target)
    reach = t_quantile(draws - 1) * spread
    low, high = (target.from_linear(center + side * reach).to(answers) for side in (-1, 1))
    error = _jackknife(target.answers(head(_leave_one_out_means(features))))
    return Estimate(answers, error, low.minimum(answers), high.maximum(answers))


def expected_error(head: Head, features: Tensor, target: Target | None = None) -> Tensor:
    """Root mean square error to be expected of the answers of `estimate` from M >= 2 draws, (B, A).

    The mean is over Student's t on the scale of `Target.linear`. Near 0 and 1 the standard error of a probability is
    nearly zero whatever the draws, since it is flat there; this considers how far the logit may reach. It is an
    integral and takes no random numbers.

    Parameters
    ----------
    head, features, target
        See `estimate`.
    """
    target = target or as_target(head(features[0]).shape[-1])
    center, spread = _on_linear_scale(head, features, target)
    t, weights = (part.to(center.device) for part in _student(len(features) - 1, _CELLS))
    reached = target.from_linear(center[..., None] + spread[..., None] * t)
    errors = reached - target.from_linear(center)[..., None]
    return (errors.square() @ weights).sqrt()


def t_quantile(freedom: int) -> float:
    """Half the width, in standard errors, of a 95 % interval by Student's t of `freedom` >= 1 degrees."""
    _, weights = _student(freedom, _FINE_CELLS)
    above = weights.flip(0).cumsum(0)  # mass beyond the edges of the cells, from the far end
    outside = (1 - CONFIDENCE) / 2
    cell = int((above < outside).sum())
    beyond = float(above[cell - 1]) if cell else 0.0
    edges = cell + (outside - beyond) / float(above[cell] - beyond)
    return math.sqrt(freedom) * math.tan(math.pi / 2 - edges * math.pi / _FINE_CELLS)


@lru_cache(maxsize=256)
def _student(freedom: int, cells: int) -> tuple[Tensor, Tensor]:
    """Points of Student's t and their weights, which sum to one: (cells,) doubles each.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1) over half a turn.
    """
    angles = ((torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5) * math.pi
    density = (angles.cos().log() * (freedom - 1)).exp()
    return math.sqrt(freedom) * angles.tan(), density / density.sum()


def _on_linear_scale(head: Head, features: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """Answers on their linear scale, (B, A) doubles, and their jackknife standard error over the draws."""
    without = target.linear(head(_leave_one_out_means(features)))
    return target.linear(head(features.mean(0))), _jackknife(without)


def _leave_one_out_means(features: Tensor) -> Tensor:
    """Means of all draws but one, (M, B, D)."""
    return (features.sum(0) - features) / (len(features) - 1)


def _jackknife(without: Tensor) -> Tensor:
    """Standard error from the (M, ...) values that leave out one draw each."""
    draws = len(without)
    return ((without - without.mean(0)).square().sum(0) * (draws - 1) / draws).sqrt()


def _certain(model: ImageModel, output: Output) -> Prediction:
    p = model.target.answers(model.head(output.features))
    return Prediction(p, torch.zeros_like(p), p, p, (output,), torch.ones(len(p), dtype=torch.int64))


def _levels(model: SamplingModel) -> int:
    return len(model.config.levels) if isinstance(model, NestedATS) else 1


def _draw_until(
    model: ImageModel,
    draw: Callable[[int, Tensor], Reading[Output]],
    shape: tuple[int, ...],
    target: float | None,
    least: int,
    readers: Executor | None,
) -> Prediction:
    """Draw until every image has stopped or the budget is spent; ``shape`` is (images, budget)."""
    size, budget = shape
    going = torch.arange(size)  # images that still draw
    number = budget if target is None else min(least, budget)  # draws that are made in any case
    outputs = list(interleave((draw(each, going) for each in range(number)), readers, ahead=_AHEAD))
    features = [output.features for output in outputs]  # (going, D) for each draw
    draws = torch.zeros(size, dtype=torch.int64)
    estimates: dict[int, Estimate] = {}
    while True:
        drawn = torch.stack(features)
        done = torch.ones(len(going), dtype=torch.bool)
        if number < budget:
            done = expected_error(model.head, drawn, model.target).amax(-1).cpu() <= (target or 0.0)
        found = estimate(model.head, drawn, model.target)
        for place in done.nonzero().flatten().tolist():
            estimates[int(going[place])] = Estimate(*(part[place] for part in found))
        draws[going[done]] = number
        going = going[~done]
        if not len(going):
            break
        outputs.append(run(draw(number, going), readers))
        features = [*(each[~done.to(each.device)] for each in features), outputs[-1].features]
        number += 1
    in_order = (estimates[row] for row in range(size))
    answers, error, low, high = (torch.stack(parts) for parts in zip(*in_order, strict=True))
    return Prediction(answers, error, low, high, tuple(outputs), draws)
