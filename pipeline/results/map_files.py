"""Files of a slide's heatmap for other programs: OME-Zarr, GeoTIFF, GeoJSON and a picture.

All are aligned by level-0 coordinates: a map is a multiscale OME-Zarr with the slide's own scale, the picture lays
slide and map out in level-0 pixels, and the GeoJSON's polygons are in level-0 pixels. Of a scene that lies on the
Earth, polygons come in WGS 84 too, and maps as GeoTIFFs where they are asked for.

A map is NaN where the model could not draw: off the mask of its prior (tissue), and off the data of a scene.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import PipelineError, UsageError
from pipeline.files import write_atomic
from pipeline.results.drawn import REGION_COLOUR, Patch, to_geojson
from pipeline.results.places import in_wgs84, map_geotiff
from storage import Slide, write_pyramid

FORMATS = ("png", "geojson", "omezarr", "geotiff")
USUAL_FORMATS = FORMATS[:3]
MAPS = ("attention", "percentile", "contribution")
MAP, PICTURE, OBJECTS = "attention.ome.zarr", "overlay.png", "patches.geojson"
PIXEL_OBJECTS = "patches-pixels.geojson"  # where `OBJECTS` is in WGS 84
REGIONS = "regions.geojson"  # in pixels: what the model opened on its way to the patches, where it has several levels

Maps = Mapping[str, NDArray[np.float32]]


def pyramid(name: str) -> str:
    """File name of one of `MAPS` as OME-Zarr."""
    return f"{name}.ome.zarr"


def geotiff(name: str) -> str:
    """File name of one of `MAPS` as GeoTIFF."""
    return f"{name}.tif"


def read_formats(words: str) -> tuple[str, ...]:
    """Read formats with commas between.

    Raises
    ------
    UsageError
        There is no such format.
    """
    formats = tuple(word.strip() for word in words.split(","))
    if unknown := [word for word in formats if word not in FORMATS]:
        raise UsageError(f"--format {words}: no format {unknown[0]!r}; choose among {','.join(FORMATS)}")
    return formats


def write_files(
    folder: Path,
    slide: Slide,
    maps: Maps,
    pitch: float,
    patches: Sequence[Patch],
    regions: Sequence[Patch],
    *,
    formats: Collection[str],
    titles: Mapping[str, str],
    picture: Callable[[], bytes],
) -> str:
    """Write the files of a slide in the formats asked for, and remove others of an earlier heatmap.

    Parameters
    ----------
    folder
        The slide's folder of heatmaps.
    slide
        An open slide.
    maps
        Some of `MAPS`, (H, W) each.
    pitch
        How many level-0 pixels a pixel of the maps has on a side.
    patches, regions
        What was drawn, in level-0 pixels.
    formats
        Some of `FORMATS`.
    titles
        What each map shows.
    picture
        Draws the picture, as a PNG.

    Returns
    -------
    Why patches are not in WGS 84, where they should have been.
    """
    _clear(folder)
    for name, values in maps.items():
        if "omezarr" in formats:
            write_pyramid(
                folder / pyramid(name),
                values[None],
                name=titles[name],
                mpp=slide.mpp,
                downsample=pitch,
                channels=(titles[name],),
                georeference=slide.georeference and slide.georeference.scaled(pitch),
            )
        if "geotiff" in formats:
            write_atomic(folder / geotiff(name), map_geotiff(slide, values, pitch, titles[name]))
    if "png" in formats:
        write_atomic(folder / PICTURE, picture())
    if "geojson" not in formats:
        return ""
    if regions:
        collection = to_geojson(regions, "opened region", REGION_COLOUR)
        write_atomic(folder / REGIONS, json.dumps(collection) + "\n")
    return _write_objects(folder, to_geojson(patches), slide)


def _clear(folder: Path) -> None:
    """Remove what an earlier heatmap, perhaps of another model, has written."""
    for name in MAPS:
        place = folder / pyramid(name)
        if place.is_symlink():
            place.unlink()
        elif place.exists():
            shutil.rmtree(place)
        (folder / geotiff(name)).unlink(missing_ok=True)
    for name in (PICTURE, OBJECTS, PIXEL_OBJECTS, REGIONS):
        (folder / name).unlink(missing_ok=True)


def _write_objects(folder: Path, collection: dict[str, Any], slide: Slide) -> str:
    """Write patches, of a scene in WGS 84 and in pixels; return why not in WGS 84, where it should have been."""
    placed, remark = None, ""
    if slide.georeference is not None and slide.georeference.crs is not None:
        try:
            placed = in_wgs84(collection, slide)
        except PipelineError as error:
            remark = f"{OBJECTS} is in pixels: {error}"
    if placed:
        write_atomic(folder / PIXEL_OBJECTS, json.dumps(collection) + "\n")
    write_atomic(folder / OBJECTS, json.dumps(placed or collection) + "\n")
    return remark
