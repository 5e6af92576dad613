"""Masks of slides in files: outlines as GeoJSON, as QuPath reads and writes them, and images of masks.

GeoJSON here is not in degrees (RFC 7946) but, as QuPath has it, in pixels of the slide's finest level, x before y.

Shape letters: H W pixels of a mask.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import DataError
from storage import Slide, StorageError
from storage.place.files import fingerprint
from storage.place.stores import open_above

_SUFFIXES = (".geojson", ".json")
_MASK_SIDE = 4096  # pixels, the longer side of the mask that outlines become
_BEYOND = 1.02  # times the slide's side may outlines reach
_GEOJSON_BYTES = 2**28
IGNORED = "Ignore*"  # QuPath's class of what is to be left out

Outline = tuple[NDArray[np.float64], list[NDArray[np.float64]]]  # a ring (N, 2) of x, y, and the rings of its holes


class Outlined(NamedTuple):
    """An object of a GeoJSON file."""

    properties: dict[str, Any]  # what the file says of it
    outlines: list[Outline]  # none where it is a point or a line

    @property
    def kind(self) -> str:
        """Name of QuPath's class of it; empty where it has none."""
        found = self.properties.get("classification")
        return str(found.get("name") or "") if isinstance(found, dict) else ""


def read_mask(place: str, shape_yx: tuple[int, int]) -> tuple[NDArray[np.bool_], tuple[float, float]]:
    """Read the mask of a slide.

    Parameters
    ----------
    place
        Path or URL of a GeoJSON file (``.geojson`` or ``.json``), or of an image that storage reads, of the slide's
        proportions, in which what is not 0 is of the mask.
    shape_yx
        Height and width of the slide in pixels.

    Returns
    -------
    The mask (H, W), and the height and width of one of its pixels in pixels of the slide.

    Raises
    ------
    DataError
        The file is no such mask, or that of another slide.
    storage.StorageError
        The file cannot be read.
    """
    if PurePosixPath(place).suffix.lower() in _SUFFIXES:
        return _from_outlines(read_outlines(place), place, shape_yx)
    with Slide(place) as image:
        level = next((i for i, each in enumerate(image.levels) if max(each.shape_yx) <= _MASK_SIDE), -1)
        level = level % len(image.levels)
        height, width = image.levels[level].shape_yx
        pitch = (shape_yx[0] / height, shape_yx[1] / width)
        if abs(height - width * shape_yx[0] / shape_yx[1]) > 1 + height / _MASK_SIDE:
            raise DataError(
                f"{place}: {image.shape_yx[0]} x {image.shape_yx[1]} pixels have other proportions than the slide's "
                f"{shape_yx[0]} x {shape_yx[1]}; give the mask of this slide, of the whole of it"
            )
        inside: NDArray[np.bool_] = (image.read(level, (0, 0, height, width)) != 0).max(0)
        return inside, pitch


def mask_identity(place: str) -> object:
    """Return what tells the state of a mask's file from others; None where it is no single file, or is not there."""
    try:
        return place, fingerprint(place)
    except StorageError:
        return None


def read_outlines(place: str) -> list[Outline]:
    """Read the polygons of a GeoJSON file, those of the class ``Ignore*`` apart.

    Raises
    ------
    DataError
        The file is no GeoJSON, or has no polygon.
    storage.StorageError
        It cannot be read.
    """
    outlines = [one for each in read_objects(place) if each.kind != IGNORED for one in each.outlines]
    if not outlines:
        raise DataError(f"{place}: has no polygon; outline what is to be seen, and export it again")
    return outlines


def read_objects(place: str, most_bytes: int = _GEOJSON_BYTES) -> list[Outlined]:
    """Read the objects of a GeoJSON file, with what it says of each.

    Parameters
    ----------
    place
        Its path or URL.
    most_bytes
        A larger file is refused.

    Raises
    ------
    DataError
        The file is no GeoJSON.
    storage.StorageError
        It cannot be read.
    """
    store, key = open_above(place)
    try:
        content = json.loads(store.get(key, most_bytes))
    except FileNotFoundError:
        raise DataError(f"{place}: does not exist; check the path, or the manifest's column mask") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: is not JSON ({error}); export the outlines again as GeoJSON") from error
    finally:
        store.close()
    try:
        return objects_of(content)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"{place}: is not GeoJSON; export the outlines again as GeoJSON") from error


def objects_of(content: Any) -> list[Outlined]:
    """Turn GeoJSON, such as `to_outlines` makes, into its objects; errors of any kind mean that it is none."""
    return [Outlined(properties, list(_polygons(geometry))) for properties, geometry in _geometries(content, {})]


def _geometries(node: Any, properties: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Geometries of a collection, a list or a single feature, each with the properties of its feature."""
    if isinstance(node, list):
        for each in node:
            yield from _geometries(each, properties)
        return
    match node["type"]:
        case "FeatureCollection":
            yield from _geometries(node["features"], properties)
        case "GeometryCollection":
            yield from _geometries(node["geometries"], properties)
        case "Feature":
            if node.get("geometry"):
                yield from _geometries(node["geometry"], dict(node.get("properties") or {}))
        case _:
            yield properties, node


def _polygons(geometry: dict[str, Any]) -> Iterator[Outline]:
    polygons = {"Polygon": [geometry["coordinates"]], "MultiPolygon": geometry["coordinates"]}
    for rings in polygons.get(geometry["type"], []):
        outer, *holes = [np.asarray([point[:2] for point in ring], np.float64).reshape(-1, 2) for ring in rings]
        if not all(np.isfinite(ring).all() for ring in (outer, *holes)):
            raise ValueError("a coordinate that is not finite")
        yield outer, holes


def _from_outlines(
    outlines: list[Outline], place: str, shape_yx: tuple[int, int]
) -> tuple[NDArray[np.bool_], tuple[float, float]]:
    height, width = shape_yx
    far = np.max([outer.max(0) for outer, _ in outlines], 0)
    if far[0] > width * _BEYOND or far[1] > height * _BEYOND:
        raise DataError(
            f"{place}: its outlines reach to x {far[0]:.0f}, y {far[1]:.0f}, off the slide, which "
            f"is {width} wide and {height} high; give the outlines of this slide, in pixels of its finest level"
        )
    pitch = max(1.0, max(shape_yx) / _MASK_SIDE)
    return fill(outlines, (math.ceil(height / pitch), math.ceil(width / pitch)), pitch), (pitch, pitch)


def fill(outlines: Sequence[Outline], shape: tuple[int, int], pitch: float) -> NDArray[np.bool_]:
    """Fill outlines: a pixel of the mask is in it where its centre lies in one.

    Parameters
    ----------
    outlines
        In pixels of the slide's finest level.
    shape
        (H, W) of the mask.
    pitch
        Side of one of its pixels in pixels of the slide.
    """
    from skimage.draw import polygon2mask

    mask = np.zeros(shape, np.bool_)
    for outer, holes in outlines:
        low = np.clip((outer.min(0) / pitch).astype(int) - 1, 0, mask.shape[::-1])
        high = np.clip((outer.max(0) / pitch).astype(int) + 2, 0, mask.shape[::-1])
        if (high <= low).any():
            continue
        side = (high - low)[::-1]

        def filled(ring: NDArray[np.float64], low: Any = low, side: Any = side) -> NDArray[np.bool_]:
            inside: NDArray[np.bool_] = polygon2mask(tuple(side), (ring / pitch - 0.5 - low)[:, ::-1])
            return inside

        own = filled(outer)
        for hole in holes:
            own &= ~filled(hole)
        mask[low[1] : high[1], low[0] : high[0]] |= own
    return mask


def flat_rings(outlines: Iterable[Outline]) -> list[list[float]]:
    """Rings of outlines, holes too, as flat lists x, y, x, y ... in tenths of a pixel."""
    rings = (ring for outer, holes in outlines for ring in (outer, *holes) if len(ring))
    return [np.round(ring, 1).ravel().tolist() for ring in rings]


def to_outlines(mask: NDArray[np.bool_], pitch_yx: tuple[float, float], name: str) -> dict[str, Any]:
    """Outline a mask: a GeoJSON collection of one polygon for each connected part, with its holes, for QuPath.

    Parameters
    ----------
    mask
        (H, W).
    pitch_yx
        Height and width of one of its pixels in pixels of the slide's finest level.
    name
        The class of the outlines.
    """
    from skimage.measure import approximate_polygon, find_contours, label, regionprops

    scale = np.array(pitch_yx)
    features = []
    for region in regionprops(label(mask, connectivity=1)):
        corner = np.array(region.bbox[:2]) - 1  # a border of one pixel closes every ring
        rings = []
        for contour in find_contours(np.pad(region.image, 1).astype(np.float32), 0.5):
            points = (approximate_polygon(contour, 0.5) + corner + 0.5) * scale
            rings.append(np.round(points[:, ::-1], 1))
        rings.sort(key=lambda ring: -np.ptp(ring, 0).prod())  # the outer ring is around all others
        features.append(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring.tolist() for ring in rings]},
                "properties": {"objectType": "annotation", "classification": {"name": name, "color": [60, 160, 60]}},
            }
        )
    return {"type": "FeatureCollection", "features": features}
