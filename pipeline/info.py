"""``info``: describe an image, a pyramid or a published encoder."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from pipeline.data.manifest import has_image_suffix
from storage import Slide, open_image

if TYPE_CHECKING:
    from nested_ats.networks.presets import Preset


def describe(location: str) -> dict[str, Any]:
    """Describe an image file or a pyramid, by path or URL, or an encoder by its name (`nested_ats.networks.presets`).

    No pixels are read but those of PNG, JPEG and BMP files.

    Raises
    ------
    storage.StorageError
        The location is none of them, or is damaged.
    """
    if not set("./:") & set(location) and not os.path.exists(location):
        from nested_ats.networks.presets import PRESETS

        if location in PRESETS:
            return _describe_encoder(location, PRESETS[location])
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


def _describe_encoder(name: str, preset: Preset) -> dict[str, Any]:
    return {
        "path": name,
        "kind": "encoder",
        "page": preset.page,
        "needs": preset.needs or preset.library,
        "patch_size": preset.pixels,
        "mpp": list(preset.mpp),
        "mean": list(preset.mean),
        "std": list(preset.std),
        "features": preset.features,
        "pooling": preset.pooling,
    }
