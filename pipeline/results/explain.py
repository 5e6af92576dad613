"""Why a model answers as it does for a sample: where it looked, and what each patch added to the answer.

Shape letters: H W cells of a map over all slides of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nested_ats import Classes, Image, Prediction, SamplingModel
from nested_ats.contribution import Score, evidence, explained, score, whole_map
from nested_ats.maps import attention_map, empty_map, spread_cells
from nested_ats.models.patches import PatchModel
from nested_ats.phases import leaves_of
from pipeline.data.manifest import Entry
from pipeline.data.outlines import Outline, objects_of, to_outlines
from pipeline.data.samples import Sample
from pipeline.data.slides import SlideImage
from pipeline.results.classifier import Classifier
from pipeline.results.drawn import Patch, drawn_patches, drawn_regions
from pipeline.results.intervals import ranks
from pipeline.results.look import Look, answered
from pipeline.results.predictions import in_short

_MOST_CELLS = 2**24  # of a map; cells of a larger one are joined
_OUTLINE_SIDE = 1024  # pixels, the longer side of the mask that is outlined
_ROWS = 2**18  # cells of which it is asked at once whether there is something to see


def explain(
    classifier: Classifier,
    entry: Entry,
    image: Sample,
    *,
    dense: bool = False,
    answer: int | None = None,
    tell: Callable[[float], object] = float,
) -> list[Look]:
    """Find where the model looks in each slide of a sample, in pixels of the slide.

    Parameters
    ----------
    classifier
        A model that sees patches, and its settings.
    entry, image
        The sample, and it opened.
    dense
        Whether to open every region and to encode every patch.
    answer
        The number of the answer that contributions are told of; None takes the likeliest.
    tell
        Is called with the share that is done.
    """
    model = classifier.model
    assert isinstance(model, PatchModel)  # noqa: S101  seen by the caller
    prediction = classifier.estimate(entry, image)
    answers = prediction.answers[0].tolist()
    of = score(model, explained(model.target, answers) if answer is None else answer)
    with classifier.computing() as readers:
        said = _evidence(model, image, prediction, of, readers)
        maps = _maps(model, image, prediction, of, said, readers, dense, tell)
    patches = drawn_patches(prediction, model.config, said)
    total = of.offset + sum(patch.contribution or 0.0 for patch in patches)
    about = {
        **_about(classifier, entry, prediction),
        "score": {"name": of.name, "value": total, "offset": of.offset, "dense": maps.score},
    }
    regions = drawn_regions(prediction, model.config)
    return [
        _of_slide(slide, corner, maps, patches, regions, about)
        for slide, corner in image.places()
        if isinstance(slide, SlideImage)  # each is: a model of features has no pixels to explain
    ]


def _about(classifier: Classifier, entry: Entry, prediction: Prediction) -> dict[str, Any]:
    """What was answered, in words and numbers."""
    target, answers = classifier.model.target, prediction.answers[0].tolist()
    answer = in_short(target, answers, classifier.settings.thresholds)
    words = f"{answer} ({answers[target.names.index(answer)]:.0%})" if isinstance(target, Classes) else answer
    return {"sample": entry.slide_id, "words": words, **answered(target, prediction, answer)}


@dataclass(frozen=True)
class _Maps:
    """Maps over a sample."""

    values: dict[str, NDArray[np.float32]]  # (H, W) each; NaN where there is nothing to see
    pitch: float  # pixels of the model's finest level to a cell
    score: float | None  # that all patches add up to, where all were encoded


def _evidence(model: PatchModel, image: Sample, prediction: Prediction, of: Score, readers: Executor) -> list[Tensor]:
    """What each unit of the last phase says, (n,) for each draw; a place that was drawn twice is encoded once."""
    drawn = [output.phases[-1].centers_l0[0].cpu() for output in prediction.outputs]
    distinct, place = torch.cat(drawn).unique(dim=0, return_inverse=True)  # type: ignore[no-untyped-call]
    said = evidence(model, image, distinct, of, readers=readers)[place]
    return list(torch.split(said, [len(each) for each in drawn]))


def _maps(
    model: PatchModel,
    image: Sample,
    prediction: Prediction,
    of: Score,
    said: Sequence[Tensor],
    readers: Executor,
    dense: bool,
    tell: Callable[[float], object],
) -> _Maps:
    shape = image.shapes[0]
    pitch = model.config.cell_l0
    while math.prod(math.ceil(side / pitch) for side in shape) > _MOST_CELLS:
        pitch *= 2
    contribution = None
    if not isinstance(model, SamplingModel):  # all patches are drawn, and all were encoded
        density, _ = attention_map(prediction.outputs, shape, pitch_l0=pitch)
        leaves = leaves_of(prediction.outputs[0].phases[-1])
        contribution = empty_map(shape, pitch)
        weighed = leaves.attention.double().cpu() * said[0][prediction.outputs[0].phases[-1].z[0].cpu() > 0]
        spread_cells(contribution, weighed, leaves.centers_l0, model.config.cell_l0, pitch)
    elif dense:
        parts = model.leaves(image, readers=readers)
        density, contribution, _ = whole_map(
            model, image, parts, of, pitch_l0=pitch, readers=readers, on_progress=tell
        )
    else:
        density, _ = attention_map(prediction.outputs, shape, pitch_l0=pitch)
    seen = _seen(model, image, density, pitch)
    # As multiples of the uniform attention, numbers mean the same on samples of any size.
    heat = torch.where(seen, density * (seen.sum() / density[seen].sum()), torch.nan)
    values = {"attention": heat.float().numpy(), "percentile": _percentiles(heat.numpy())}
    if contribution is None:
        return _Maps(values, pitch, None)
    values["contribution"] = torch.where(seen, contribution, torch.nan).float().numpy()
    return _Maps(values, pitch, of.offset + float(contribution.sum()))


def _seen(model: PatchModel, image: Sample, density: Tensor, pitch: float) -> Tensor:
    """Cells of the slides in which the model may draw, (H, W); all of them where it may nowhere, as it draws then."""
    rows, columns = density.shape
    there = torch.zeros(rows, columns, dtype=torch.bool)
    for slide, corner in image.places():
        top, left = (corner / pitch).round().long().tolist()
        height, width = cells(slide, pitch)
        there[top : top + height, left : left + width] = True
    x = (torch.arange(columns, dtype=torch.float64) + 0.5) * pitch
    lines = torch.split(torch.arange(rows), max(1, _ROWS // columns))
    worth = []
    for some in lines:
        y = (some.double() + 0.5) * pitch
        centers = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
        worth.append(model.worth_drawing([image], centers[None], pitch)[0])
    seen = there & torch.cat(worth)
    return seen if density[seen].sum() > 0 else there


def _percentiles(heat: NDArray[np.float64]) -> NDArray[np.float32]:
    """Share of the cells, in percent, whose attention is no higher; ties have their mean."""
    found = np.full(heat.shape, np.nan, np.float32)
    there = np.isfinite(heat)
    found[there] = 100 * ranks(heat[there]) / np.count_nonzero(there)
    return found


def _of_slide(
    slide: SlideImage,
    corner: Tensor,
    maps: _Maps,
    patches: Sequence[Patch],
    regions: Sequence[Patch],
    about: dict[str, Any],
) -> Look:
    """Cut a slide out of its sample."""
    rows, columns = cells(slide, maps.pitch)
    top, left = (corner / maps.pitch).round().long().tolist()
    box = (*corner.tolist(), rows * maps.pitch, columns * maps.pitch)
    return Look(
        about=about,
        maps={name: each[top : top + rows, left : left + columns] for name, each in maps.values.items()},
        pitch=maps.pitch,
        patches=_inside(patches, box),
        regions=_inside(regions, box),
        tissue=_outlines(slide),
    ).scaled(slide.scale)


def cells(slide: Image, pitch: float) -> tuple[int, int]:
    """Rows and columns of a map over a slide."""
    height, width = slide.shapes[0]
    return math.ceil(height / pitch), math.ceil(width / pitch)


def _inside(patches: Sequence[Patch], box: tuple[float, float, float, float]) -> list[Patch]:
    """Patches that touch a box (y, x, height, width), in pixels from its first one."""
    y, x, height, width = box
    moved = [patch.moved(y, x) for patch in patches]
    return [p for p in moved if -p.side_l0 < p.y_l0 < height and -p.side_l0 < p.x_l0 < width]


def _outlines(slide: SlideImage) -> list[Outline]:
    """Outline the mask that the model drew within, in pixels of its finest level; none where it has none."""
    if slide.mask is None:
        return []
    step = max(1, math.ceil(max(slide.mask.pixels.shape) / _OUTLINE_SIDE))
    pitch_y, pitch_x = (side * step for side in slide.mask.pitch_yx)
    found = objects_of(to_outlines(slide.mask.pixels[::step, ::step].numpy(), (pitch_y, pitch_x), "tissue"))
    return [outline for each in found for outline in each.outlines]
