"""Slides as people look at them: small, and in three channels."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from storage import Slide

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure


def to_png(figure: Figure) -> bytes:
    """Draw a figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Letters that the font lacks are shown as boxes; that is no reason to warn of every slide.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def to_file(pixels: NDArray[Any], kind: Literal["JPEG", "PNG"]) -> bytes:
    """Make the file of a picture, (H, W, 3 or 4): bytes, or floating point from 0 to 1."""
    from PIL import Image

    if pixels.dtype != np.uint8:
        pixels = np.round(np.clip(pixels, 0, 1) * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, quality=90)
    return buffer.getvalue()


def thumbnail(
    slide: Slide, pixels: int, channels: Sequence[int] | None = None
) -> tuple[NDArray[Any], tuple[float, float]]:
    """Return the finest level with no more pixels a side, or the coarsest, and where it ends in level-0 pixels.

    A level's last row and column may reach past the slide: its sides are rounded up.
    """
    fitting = [i for i, level in enumerate(slide.levels) if max(level.shape_yx) <= pixels]
    number = fitting[0] if fitting else len(slide.levels) - 1
    level = slide.levels[number]
    height, width = level.shape_yx
    view = slide.read(number, (0, 0, height, width))
    return to_rgb(slide, view, channels), (height * level.downsample, width * level.downsample)


def to_rgb(slide: Slide, pixels: NDArray[Any], channels: Sequence[int] | None = None) -> NDArray[Any]:
    """Turn pixels (C, H, W) of a slide into (H, W, 3) to show: three channels as RGB, or the first one as grey.

    They are the first of those that are named, or of all that hold values. Of other types than bytes, pixels without
    data are black.
    """
    chosen = list(slide.data_channels if channels is None else channels)
    chosen = chosen[:3] if len(chosen) >= 3 else chosen[:1] * 3
    image = np.moveaxis(pixels[chosen], 0, -1)
    if image.dtype == np.uint8:
        return image
    # Other types have no agreed range to show, so the values that are there are stretched.
    there = np.moveaxis(slide.holds_data(pixels)[chosen], 0, -1)
    image = image.astype(np.float32)
    low, high = (float(image[there].min()), float(image[there].max())) if there.any() else (0.0, 1.0)
    return np.where(there, (image - low) / max(high - low, 1e-12), np.float32(0))
