"""Outlined objects as the page draws them: rings of x and y in pixels of the slide's finest level."""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.data.outlines import Outlined, flat_rings, read_objects
from pipeline.errors import DataError

_MOST_BYTES = 2**26  # of a file
_MOST_POINTS = 2_000_000
_MEASUREMENTS = 8  # that are shown of an object


def objects_in(place: str, shape_yx: tuple[int, int]) -> dict[str, Any]:
    """Read the objects of a GeoJSON file that the page can draw.

    Parameters
    ----------
    place
        Path or URL of the file, in pixels of the slide, as QuPath writes it.
    shape_yx
        Height and width of the slide.

    Returns
    -------
    ``objects`` with ``name``, ``colour`` ("" where the file has none), ``rings`` (flat lists x, y, x, y ...) and
    ``measurements``, and ``left_out``: how many others there are, without an area or beyond what is drawn.

    Raises
    ------
    DataError
        The file is no GeoJSON, or that of another slide.
    storage.StorageError
        It cannot be read, or is too large.
    """
    return plain_objects(read_objects(place, _MOST_BYTES), place, shape_yx)


def plain_objects(found: list[Outlined], place: str, shape_yx: tuple[int, int]) -> dict[str, Any]:
    """Turn objects into what the page draws; see `objects_in`."""
    height, width = shape_yx
    objects, points = [], 0
    for each in found:
        rings = [ring for outer, holes in each.outlines for ring in (outer, *holes) if len(ring)]
        points += sum(map(len, rings))
        if points > _MOST_POINTS:
            break
        if not rings:
            continue
        x, y = np.min([ring.min(0) for ring in rings], 0)
        if x > width or y > height:
            raise DataError(
                f"{place}: has an object at x {x:.0f}, y {y:.0f}, off the slide, which is {width} wide and {height} "
                "high; give the outlines of this slide, in pixels of its finest level"
            )
        objects.append(
            {
                "name": _name(each),
                "colour": _colour(each.properties),
                "rings": flat_rings(each.outlines),
                "measurements": _measurements(each.properties),
            }
        )
    return {"objects": objects, "left_out": len(found) - len(objects)}


def _name(each: Outlined) -> str:
    own = str(each.properties.get("name") or "")
    return ": ".join(part[:100] for part in (each.kind, own) if part)


def _colour(properties: dict[str, Any]) -> str:
    """The colour as #rrggbb; QuPath has it at the class, or at the object."""
    kind = properties.get("classification")
    for place in (kind if isinstance(kind, dict) else {}, properties):
        colour = place.get("color")
        if isinstance(colour, list) and len(colour) == 3 and all(v in range(256) for v in colour):
            return "#" + bytes(map(int, colour)).hex()
    return ""


def _measurements(properties: dict[str, Any]) -> dict[str, float]:
    found = properties.get("measurements")
    pairs = found.items() if isinstance(found, dict) else ()
    numbers = [(str(name)[:60], float(value)) for name, value in pairs if isinstance(value, int | float)]
    return dict([(name, value) for name, value in numbers if np.isfinite(value)][:_MEASUREMENTS])
