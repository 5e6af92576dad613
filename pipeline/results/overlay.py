"""The picture of a heatmap: the slide under its attention, with colour bar, scale bar and the heaviest patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.results.drawn import Patch
from pipeline.results.look import bar_of, read_patch
from pipeline.results.pictures import thumbnail, to_png, to_rgb
from storage import Slide

_PICTURE_PIXELS = 1600  # the longer side of the slide in the picture has no more
_SHOWN_PATCHES = 8


def draw_picture(
    slide: Slide,
    heat: NDArray[np.float32],
    pitch: float,
    patches: Sequence[Patch],
    title: str,
    *,
    fill: float = 0,
    channels: Sequence[int] | None = None,
) -> bytes:
    """Draw the slide under its attention, with colour bar, scale bar and the heaviest patches, as a PNG.

    Parameters
    ----------
    slide
        An open slide.
    heat
        The attention as multiples of the uniform one, (H, W); it is NaN where there is nothing to see.
    pitch
        How many level-0 pixels a pixel of `heat` has on a side.
    patches
        The patches, the heaviest first.
    title
        The title of the picture.
    fill
        The value of pixels off the slide, as the model saw them (`SlideImage.fill`).
    channels
        Numbers of the channels to show (`SlideImage.numbers`); None means all, of which the first three are shown.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    height, width = slide.shape_yx
    figure = Figure(figsize=(9, 9 * min(max(height / width, 0.4), 2) + 1.6), layout="constrained")
    top, bottom = figure.subfigures(2, 1, squeeze=False, height_ratios=[6, 1])[:, 0]
    axes = top.subplots()
    view, reach = thumbnail(slide, _PICTURE_PIXELS, channels)
    axes.imshow(view, extent=(0, reach[1], reach[0], 0), interpolation="nearest")
    # Colour begins at the uniform attention, so that the slide itself shows where attention is less than chance.
    heat = np.nan_to_num(heat)
    peak = max(float(heat.max()), 1.1)
    scale = LogNorm(1, peak)
    alpha = np.clip(0.25 + 0.6 * np.ma.filled(scale(np.maximum(heat, 1)), 0), 0, 1) * (heat > 1)
    # The map's last row and column reach past the slide where the pitch does not divide it.
    extent = (0, heat.shape[1] * pitch, heat.shape[0] * pitch, 0)
    drawn = axes.imshow(heat, extent=extent, norm=scale, cmap="inferno", alpha=alpha, interpolation="nearest")
    axes.scatter(
        [patch.x_l0 + patch.side_l0 / 2 for patch in patches],
        [patch.y_l0 + patch.side_l0 / 2 for patch in patches],
        s=60,
        facecolors="none",
        edgecolors="cyan",
        linewidths=0.8,
    )
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
    axes.set_title(f"{title}; attention 1 to {peak:.3g}", parse_math=False)  # a slide's id may hold dollar signs
    top.colorbar(drawn, ax=axes, label="attention, times uniform", shrink=0.8)
    _scale_bar(axes, slide)
    for place, patch in zip(bottom.subplots(1, _SHOWN_PATCHES), [*patches, *[None] * _SHOWN_PATCHES], strict=False):
        place.axis("off")
        if patch is not None:
            place.imshow(to_rgb(slide, read_patch(slide, patch, fill), channels))
            place.set_title(f"{patch.weight:.3f}", fontsize=8)
    bottom.suptitle("heaviest patches, with their share of the slide's feature", fontsize=9)
    return to_png(figure)


def _scale_bar(axes: Any, slide: Slide) -> None:
    """Draw a bar of a round length of about a fifth of the slide's width."""
    height, width = slide.shape_yx
    length, label = bar_of(slide)
    x, y = 0.03 * width, 0.96 * height
    for colour, line in (("black", 5), ("white", 3)):
        axes.plot([x, x + length], [y, y], color=colour, linewidth=line, solid_capstyle="butt")
    box = {"facecolor": "black", "alpha": 0.6, "pad": 2, "edgecolor": "none"}
    axes.text(x, y - 0.015 * height, label, color="white", fontsize=9, bbox=box)
