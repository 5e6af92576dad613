"""``info``: describe an image, a pyramid or a published encoder."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from pipeline.data.crs import metres_per_pixel
from pipeline.data.manifest import Entry, is_features, is_image_file, slide_name
from pipeline.errors import PipelineError
from storage import Slide
from storage.format.nodata import to_json
from storage.read.slide import dicom_file

if TYPE_CHECKING:
    from nested_ats.networks.presets import Preset


def describe(location: str) -> dict[str, Any]:
    """Describe an image or a pyramid, by path or URL, or an encoder by its name (`nested_ats.networks.presets`).

    Only the pixels of PNG, JPEG and BMP files are read. A level that an image file lacks says of which downsample it
    is ``made_of`` at each read.

    Raises
    ------
    storage.StorageError
        The location is nothing of this kind, or is damaged.
    """
    if not set("./:") & set(location) and not os.path.exists(location):
        from nested_ats.networks.presets import PRESETS

        if location in PRESETS:
            return _describe_encoder(location, PRESETS[location])
    if is_features(location):
        return _describe_features(location)
    kind = "DICOM series" if dicom_file(location) else "image" if is_image_file(location) else "pyramid"
    with Slide(location) as slide:
        levels = [
            {"size": list(level.shape_yx), "downsample": level.downsample, "mpp": level.mpp}
            | ({"made_of": level.made_of} if level.made_of else {})
            for level in slide.levels
        ]
        return {
            "path": location,
            "kind": kind,
            "size": list(slide.shape_yx),
            "channels": list(slide.channels),
            "dtype": str(slide.dtype),
            **({} if slide.bits is None else {"bits": slide.bits}),
            **({} if slide.nodata is None else {"nodata": to_json(slide.nodata)}),
            **({} if slide.alpha is None else {"alpha": slide.channels[slide.alpha]}),
            "mpp": slide.mpp,
            **_describe_place(slide),
            "levels": levels,
        }


def _describe_place(slide: Slide) -> dict[str, Any]:
    """Describe where on the Earth a scene lies; metres per pixel (y, x) are told where pyproj knows the CRS."""
    place = slide.georeference
    if place is None:
        return {}
    metres = None
    with suppress(PipelineError):
        metres = metres_per_pixel(place, slide.location)
    about = {"crs": place.words, "transform": list(place.transform)}
    return {"georeference": about | ({"metres_per_pixel": list(metres)} if metres else {})}


def _describe_features(location: str) -> dict[str, Any]:
    from pipeline.data.given import FeatureImage  # torch with it, for which slides do not wait

    image = FeatureImage(Entry(slide_id=slide_name(location), path=location))
    tiles, features = image.slide.features.shape
    return {
        "path": location,
        "kind": "features",
        "tiles": tiles,
        "features": features,
        "grid": list(image.shapes[0]),
        "made_by": image.slide.made_by,
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
