"""``info``: what an image or a pyramid is."""

from __future__ import annotations

import os
from typing import Any

from pipeline.manifest import has_image_suffix
from storage import Slide, open_image


def describe(location: str) -> dict[str, Any]:
    """Describe an image file or a pyramid, by path or URL; of pixels, only those of PNG, JPEG and BMP files are read.

    Raises
    ------
    storage.StorageError
        It is neither, or it is damaged.
    """
    if has_image_suffix(location) if "://" in location else os.path.isfile(location):
        with open_image(location) as image:
            channels, height, width = image.shape
            return {
                "path": location,
                "kind": "image",
                "size": [height, width],
                "channels": list(image.channels or range(channels)),
                "dtype": str(image.dtype),
                "mpp": image.mpp_yx[0] if image.mpp_yx else None,
            }
    with Slide(location) as slide:
        levels = [
            {"size": list(level.shape_yx), "downsample": level.downsample, "mpp": level.mpp} for level in slide.levels
        ]
        return {
            "path": location,
            "kind": "pyramid",
            "size": list(slide.shape_yx),
            "channels": list(slide.channels),
            "dtype": str(slide.dtype),
            "mpp": slide.mpp,
            "levels": levels,
        }
