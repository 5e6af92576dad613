"""The georeference of a GeoTIFF, read from its tags as GDAL reads them.

A transform is that of tag 34264, or made of a pixel's size (33550) and the first tie point (33922). It is kept for
the outer corner of the first pixel, whatever the file's own way (RasterPixelIsPoint means its centre). Ground control
points without a pixel's size, rational polynomials, and files beside the TIFF (``.tfw``, ``.aux.xml``) are not read.

Specification: OGC GeoTIFF 1.1 (https://docs.ogc.org/is/19-008r4/19-008r4.html).
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile

from storage.format.georeference import EPSG_CODES, MAX_KEYS, MAX_TEXT, GeoKeys, Georeference, compose, is_sound
from storage.images.orientation import UPRIGHT, stored_box

if TYPE_CHECKING:
    from storage.format.georeference import Transform

PIXEL_SCALE, TIE_POINTS, TRANSFORMATION = 33550, 33922, 34264
DIRECTORY, DOUBLES, TEXT = 34735, 34736, 34737
MODEL_TYPE, RASTER_TYPE, GEOGRAPHIC, PROJECTED = 1024, 1025, 2048, 3072  # keys of the directory
IS_GEOGRAPHIC, IS_POINT = 2, 2  # values of the first two


def georeference_of(key: tifffile.TiffPage, orientation: int, shape_yx: tuple[int, int]) -> Georeference | None:
    """Read the georeference of a page, None where it has none, or one that places no pixel.

    Parameters
    ----------
    key
        The page.
    orientation, shape_yx
        How the image is stored turned (`storage.images.orientation`), and its height and width when upright: the
        tags are about the image as it is stored, and what is returned is about the upright one.
    """
    directory = _numbers(key, DIRECTORY)
    keys = _short_keys(directory)
    transform = _transform(key, is_point=keys.get(RASTER_TYPE) == IS_POINT)
    if transform is None:
        return None
    if orientation != UPRIGHT:
        transform = compose(transform, _turned(orientation, shape_yx))
    return Georeference(transform, _crs(key, directory, keys)) if is_sound(transform) else None


def crs_file(keys: GeoKeys) -> bytes:
    """Write a GeoTIFF of one pixel in the CRS that keys define, which tells GDAL the CRS, and no place."""
    tags: list[tuple[int, str, int, Any, bool]] = [
        (PIXEL_SCALE, "d", 3, (1.0, 1.0, 0.0), True),
        (TIE_POINTS, "d", 6, (0.0,) * 6, True),
        (DIRECTORY, "H", len(keys.directory), keys.directory, True),
    ]
    if keys.doubles:
        tags.append((DOUBLES, "d", len(keys.doubles), keys.doubles, True))
    if keys.text:
        tags.append((TEXT, "s", 0, keys.text.encode(), True))
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((1, 1), np.uint8), photometric="minisblack", extratags=tags, metadata=None)
    return file.getvalue()


def _numbers(key: tifffile.TiffPage, tag: int) -> tuple[float, ...]:
    """Read the numbers of a tag; none where it is missing, holds other things, or too many."""
    value = key.tags.valueof(tag, ())
    numbers = value if isinstance(value, tuple) else (value,)
    sound = len(numbers) <= MAX_KEYS and all(isinstance(number, int | float) for number in numbers)
    return numbers if sound else ()


def _short_keys(directory: tuple[float, ...]) -> dict[float, float]:
    """Read those keys whose value stands in the directory itself: each has a number, 0, 1, and the value."""
    rows = [directory[i : i + 4] for i in range(4, len(directory) - 3, 4)]
    return {number: value for number, place, _, value in rows if place == 0}


def _transform(key: tifffile.TiffPage, *, is_point: bool) -> Transform | None:
    matrix, scale, tie = (_numbers(key, tag) for tag in (TRANSFORMATION, PIXEL_SCALE, TIE_POINTS))
    if len(scale) >= 2 and len(tie) >= 6 and scale[0] and scale[1]:
        column, row, _, x, y, _ = tie[:6]
        a, e = scale[0], -abs(scale[1])  # GDAL takes rows that run north from a matrix alone
        found = (a, 0.0, x - a * column, 0.0, e, y - e * row)
    elif len(matrix) == 16:
        a, b, _, c, d, e, _, f = matrix[:8]
        found = (a, b, c, d, e, f)
    else:
        return None
    if not all(math.isfinite(number) for number in found):
        return None
    return compose(found, (1, 0, -0.5, 0, 1, -0.5)) if is_point else found


def _turned(orientation: int, shape_yx: tuple[int, int]) -> Transform:
    """From places in the upright image to those in the image as it is stored."""
    (y, x, *_), (y_right, x_right, *_), (y_below, x_below, *_) = (
        stored_box((row, column, 1, 1), shape_yx, orientation) for row, column in ((0, 0), (0, 1), (1, 0))
    )
    centres = (x_right - x, x_below - x, x + 0.5, y_right - y, y_below - y, y + 0.5)
    return compose(centres, (1, 0, -0.5, 0, 1, -0.5))


def _crs(key: tifffile.TiffPage, directory: tuple[float, ...], keys: dict[float, float]) -> int | GeoKeys | None:
    """Return the EPSG code that keys name, or else all of them; None where there are none."""
    geographic = keys.get(MODEL_TYPE) == IS_GEOGRAPHIC or (MODEL_TYPE not in keys and PROJECTED not in keys)
    code = keys.get(GEOGRAPHIC if geographic else PROJECTED)
    if isinstance(code, int) and code in EPSG_CODES:
        return code
    shorts = [each for each in directory if isinstance(each, int) and 0 <= each < 2**16]
    if not set(keys) - {MODEL_TYPE, RASTER_TYPE} or len(shorts) < len(directory):
        return None
    text = key.tags.valueof(TEXT, "")
    text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
    doubles = tuple(float(number) for number in _numbers(key, DOUBLES))
    if not all(math.isfinite(number) for number in doubles) or len(text) > MAX_TEXT:
        return None
    return GeoKeys(tuple(shorts), doubles, text)
