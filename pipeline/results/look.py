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
from pipeline.data.outlines import Outline, flat_rings
from pipeline.files import write_atomic
from pipeline.results.drawn import Patch, measurements
from pipeline.results.pictures import thumbnail, to_file, to_rgb
from storage import Slide

LOOK, THUMBNAIL = "look.json", "thumbnail.jpg"
ATTENTION, CONTRIBUTION = "attention.png", "contribution.png"
SHOWN_PATCHES = 12
_PICTURE_PIXELS = 1600  # the longer side of the slide has no more
_PATCH_PIXELS = 256  # a shown patch has so many pixels a side, and less than twice as many, if the slide has them


@dataclass(frozen=True, kw_only=True)
class Look:
    """Where a model looked in one slide; places are in pixels of the slide's finest level."""

    about: Mapping[str, Any]  # what was answered, and why (`answered`)
    maps: Mapping[str, NDArray[np.float32]]  # (H, W) each, by name (`pipeline.results.map_files`)
    pitch: float  # pixels to a cell of the maps
    patches: Sequence[Patch]  # that were drawn, the heaviest first
    regions: Sequence[Patch]
    tissue: Sequence[Outline] = ()  # of the mask that the model drew within, if it has one

    def scaled(self, scale: float) -> Look:
        """The same in pixels that are `scale` times smaller."""
        return replace(
            self,
            pitch=self.pitch * scale,
            patches=[patch.scaled(scale) for patch in self.patches],
            regions=[region.scaled(scale) for region in self.regions],
            tissue=[(outer * scale, [hole * scale for hole in holes]) for outer, holes in self.tissue],
        )


def write_look(folder: Path, slide: Slide, look: Look, *, fill: float, channels: Sequence[int]) -> None:
    """Write the pictures and `LOOK`.

    Parameters
    ----------
    folder
        The slide's folder of heatmaps.
    slide
        An open slide.
    look
        What there is to show.
    fill
        The value of pixels off the slide.
    channels
        Numbers of the channels to show.
    """
    heat, pitch = look.maps["attention"], look.pitch
    view, reach = thumbnail(slide, _PICTURE_PIXELS, channels)
    write_atomic(folder / THUMBNAIL, to_file(view, "JPEG"))
    write_atomic(folder / ATTENTION, to_file(_coloured(heat), "PNG"))
    for old in [*folder.glob("patch-*.jpg"), folder / CONTRIBUTION]:
        old.unlink(missing_ok=True)
    if "contribution" in look.maps:
        write_atomic(folder / CONTRIBUTION, to_file(diverging(look.maps["contribution"]), "PNG"))
    rows = []
    for number, patch in enumerate(look.patches):
        row: dict[str, Any] = {**_box(patch), **measurements(patch)}
        if number < SHOWN_PATCHES:
            row["file"] = f"patch-{number}.jpg"
            pixels = read_patch(slide, patch, fill)
            write_atomic(folder / row["file"], to_file(to_rgb(slide, pixels, channels), "JPEG"))
        rows.append(row)
    plain = {
        **look.about,
        "shape": slide.shape_yx,
        "mpp": slide.mpp,
        "thumbnail_xy": reach[::-1],
        "attention_xy": (heat.shape[1] * pitch, heat.shape[0] * pitch),
        "bar": bar_of(slide),
        "peak": float(np.nanmax(heat)),
        "patches": rows,
        "regions": [_box(region) for region in look.regions],
        "tissue": flat_rings(look.tissue),
    }
    if "contribution" in look.maps:
        plain["strongest"] = float(np.nanmax(np.abs(look.maps["contribution"])))
    write_atomic(folder / LOOK, json.dumps(plain) + "\n")


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
    """Colour attention by its logarithm, (H, W, 4); what is less than chance, or no number, is transparent."""
    import matplotlib as mpl

    heat = np.nan_to_num(heat)
    share = np.log(np.maximum(heat, 1)) / math.log(max(float(heat.max()), 1.1))
    coloured = mpl.colormaps["inferno"](np.clip(share, 0, 1))
    coloured[..., 3] = np.where(heat > 1, 0.35 + 0.65 * share, 0)
    return _bytes(coloured)


def diverging(values: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Colour contributions, (H, W, 4): red adds and blue takes, the more the less transparent."""
    import matplotlib as mpl

    values = np.nan_to_num(values)
    share = values / max(float(np.abs(values).max()), 1e-12)
    coloured = mpl.colormaps["coolwarm"](0.5 + share / 2)
    coloured[..., 3] = np.sqrt(np.abs(share))  # or most of the slide would look as if it said nothing
    return _bytes(coloured)


def _bytes(colours: NDArray[Any]) -> NDArray[np.uint8]:
    pixels: NDArray[np.uint8] = np.round(colours * 255).astype(np.uint8)
    return pixels


def _box(patch: Patch) -> dict[str, float]:
    return {"y": patch.y_l0, "x": patch.x_l0, "side": patch.side_l0}
