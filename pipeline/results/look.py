"""What the report shows of a slide: small pictures of it, of the attention and of the heaviest patches, and numbers.

It is written while the slide is open, so that a report needs no slide.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nested_ats import Classes, Prediction, Target
from pipeline.files import write_atomic
from pipeline.results.pictures import thumbnail, to_file, to_rgb
from storage import Slide

LOOK, THUMBNAIL, ATTENTION = "look.json", "thumbnail.jpg", "attention.png"
SHOWN_PATCHES = 12
_PICTURE_PIXELS = 1600  # the longer side of the slide has no more
_PATCH_PIXELS = 256  # a shown patch has so many pixels a side, and less than twice as many, if the slide has them


@dataclass(frozen=True)
class Patch:
    """A place where patches were drawn, once or in several draws."""

    y_l0: float  # the upper edge
    x_l0: float  # the left edge
    side_l0: float
    weight: float  # the patch's share of the slide's feature: z times attention, averaged over the draws
    attention: float  # the attention of its leaf, or of the strongest where several leaves lie there
    draws: int  # how many draws drew it

    def scaled(self, scale: float) -> Patch:
        """The same place in pixels that are `scale` times smaller."""
        place = {name: getattr(self, name) * scale for name in ("y_l0", "x_l0", "side_l0")}
        return replace(self, **place)


def write_look(
    folder: Path,
    slide: Slide,
    heat: NDArray[np.float32],
    pitch: float,
    patches: Sequence[Patch],
    regions: Sequence[Patch],
    about: Mapping[str, Any],
    *,
    fill: float,
    channels: Sequence[int],
) -> None:
    """Write the pictures and `LOOK`.

    Parameters
    ----------
    folder
        The slide's folder of heatmaps.
    slide
        An open slide.
    heat, pitch
        The attention as multiples of the uniform one, (H, W), and the level-0 pixels of one of its pixels.
    patches, regions
        What was drawn, in level-0 pixels, the heaviest first.
    about
        What else is to be told of the slide (`answered`).
    fill
        The value of pixels off the slide.
    channels
        Numbers of the channels to show.
    """
    view, reach = thumbnail(slide, _PICTURE_PIXELS, channels)
    write_atomic(folder / THUMBNAIL, to_file(view, "JPEG"))
    write_atomic(folder / ATTENTION, to_file(_coloured(heat), "PNG"))
    for old in folder.glob("patch-*.jpg"):
        old.unlink()
    rows = []
    for number, patch in enumerate(patches):
        row: dict[str, Any] = {
            **_box(patch),
            "weight": patch.weight,
            "attention": patch.attention,
            "draws": patch.draws,
        }
        if number < SHOWN_PATCHES:
            row["file"] = f"patch-{number}.jpg"
            pixels = read_patch(slide, patch, fill)
            write_atomic(folder / row["file"], to_file(to_rgb(slide, pixels, channels), "JPEG"))
        rows.append(row)
    look = {
        **about,
        "shape": slide.shape_yx,
        "mpp": slide.mpp,
        "thumbnail_xy": reach[::-1],
        "attention_xy": (heat.shape[1] * pitch, heat.shape[0] * pitch),
        "bar": bar_of(slide),
        "peak": float(heat.max()),
        "patches": rows,
        "regions": [_box(region) for region in regions],
    }
    write_atomic(folder / LOOK, json.dumps(look) + "\n")


def answered(target: Target, prediction: Prediction, answer: str) -> dict[str, Any]:
    """Return what was answered for a sample, with error and interval of each answer; None stands for NaN."""
    parts = (prediction.answers, prediction.standard_error, prediction.low, prediction.high)
    columns = [[None if math.isnan(value) else value for value in part[0].tolist()] for part in parts]
    return {
        "answer": answer,
        "classes": isinstance(target, Classes),
        "answers": {name: list(numbers) for name, *numbers in zip(target.names, *columns, strict=True)},
        "draws": int(prediction.draws[0]),
    }


def read_patch(slide: Slide, patch: Patch, fill: float) -> NDArray[Any]:
    """Read the (C, h, w) pixels of a patch, from a level that is coarse enough for a large one to be cheap."""
    fine = [i for i, level in enumerate(slide.levels) if patch.side_l0 / level.downsample >= _PATCH_PIXELS]
    number = fine[-1] if fine else 0
    corner_and_side = (patch.y_l0, patch.x_l0, patch.side_l0, patch.side_l0)
    box = [round(value / slide.levels[number].downsample) for value in corner_and_side]
    return slide.read(number, box, fill=fill)


def bar_of(slide: Slide) -> tuple[float, str]:
    """Return a scale bar of a round length of about a fifth of the slide's width: in level-0 pixels, and in words."""
    unit = slide.mpp or 1.0
    wanted = slide.shape_yx[1] * unit / 5
    power = 10 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    metric = f"{length:g} µm" if length < 1000 else f"{length / 1000:g} mm"
    return length / unit, f"{length:g} px" if slide.mpp is None else metric


def _coloured(heat: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colour attention by its logarithm, (H, W, 4); what is less than chance is transparent."""
    import matplotlib as mpl

    share = np.log(np.maximum(heat, 1)) / math.log(max(float(heat.max()), 1.1))
    coloured = mpl.colormaps["inferno"](np.clip(share, 0, 1))
    coloured[..., 3] = np.where(heat > 1, 0.35 + 0.65 * share, 0)
    pixels: NDArray[np.uint8] = np.round(coloured * 255).astype(np.uint8)
    return pixels


def _box(patch: Patch) -> dict[str, float]:
    return {"y": patch.y_l0, "x": patch.x_l0, "side": patch.side_l0}
