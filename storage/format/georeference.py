"""Where on the Earth a scene lies: the affine transform of its pixels and the coordinate reference system (CRS).

Pyramids carry it twice: in our own block, where it is read from, and as the attributes ``proj:`` and ``spatial:`` of
GeoZarr's conventions, on the group and on the array of every level. Those were chosen over CF's ``spatial_ref``,
which wants a variable of its own beside the image: the conventions describe plain arrays, as the levels of an
OME-Zarr image are, need no WKT, which this package could not write, and are read by later releases of GDAL.

Specifications: https://github.com/zarr-conventions/spatial and https://github.com/zarr-conventions/geo-proj; OGC
GeoTIFF 1.1 (https://docs.ogc.org/is/19-008r4/19-008r4.html).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from storage import typed

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

Transform = tuple[float, float, float, float, float, float]

EPSG_CODES = range(1024, 32767)  # of which GeoTIFF's keys may name one; 32767 says that others define the CRS
MAX_KEYS, MAX_TEXT = 4096, 65536  # numbers of a tag of GeoTIFF keys, and letters, that are kept
_CONVENTIONS = (
    {
        "name": "proj:",
        "uuid": "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "spec_url": "https://github.com/zarr-conventions/geo-proj",
        "description": "Coordinate reference system information for geospatial data",
    },
    {
        "name": "spatial",
        "uuid": "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
        "spec_url": "https://github.com/zarr-conventions/spatial",
        "description": "Spatial coordinate information",
    },
)


@dataclass(frozen=True)
class GeoKeys:
    """The keys of a GeoTIFF as they are stored: what they define, GDAL and PROJ know (section 7 of GeoTIFF 1.1)."""

    directory: tuple[int, ...]  # tag 34735
    doubles: tuple[float, ...] = ()  # tag 34736
    text: str = ""  # tag 34737


@dataclass(frozen=True)
class Georeference:
    """The place of an image in a coordinate reference system.

    Attributes
    ----------
    transform : (a, b, c, d, e, f) as rasterio and GeoZarr order them: ``x = a * column + b * row + c`` and
        ``y = d * column + e * row + f``, where (0, 0) is the outer corner of the first pixel, x is the easting or
        longitude, and y the northing or latitude
    crs : the EPSG code of the CRS; the file's keys where they name none; None where the file has no CRS
    """

    transform: Transform
    crs: int | GeoKeys | None

    def place(self, xy: ArrayLike) -> NDArray[np.float64]:
        """Return the (N, 2) x and y in the CRS of (N, 2) x and y in pixels, where pixel centres are at 0.5."""
        a, b, c, d, e, f = self.transform
        placed: NDArray[np.float64] = np.asarray(xy, np.float64) @ np.array([[a, d], [b, e]]) + np.array([c, f])
        return placed

    def scaled(self, downsample: float) -> Georeference:
        """Return the same place for pixels that are so many times larger along each axis."""
        return Georeference(compose(self.transform, (downsample, 0, 0, 0, downsample, 0)), self.crs)

    @property
    def words(self) -> str:
        """The CRS as people name it, such as "EPSG:32618"."""
        if self.crs is None:
            return "no CRS"
        return f"EPSG:{self.crs}" if isinstance(self.crs, int) else "a CRS of the file's own"


def compose(outer: Transform, inner: Transform) -> Transform:
    """Return the transform that applies ``inner`` first."""
    a, b, c, d, e, f = outer
    k, m, n, p, q, r = inner
    return (a * k + b * p, a * m + b * q, a * n + b * r + c, d * k + e * p, d * m + e * q, d * n + e * r + f)


def inverted(transform: Transform) -> Transform:
    """Return the transform that leads back; `is_sound` tells whether there is one."""
    a, b, c, d, e, f = transform
    whole = a * e - b * d
    k, m, p, q = e / whole, -b / whole, -d / whole, a / whole
    return (k, m, -(k * c + m * f), p, q, -(p * c + q * f))


def is_sound(transform: Transform) -> bool:
    """Whether a transform has finite numbers within reason and flattens no pixel."""
    a, b, _, d, e, _ = transform
    return all(abs(number) <= typed.LARGEST for number in transform) and a * e - b * d != 0


def to_json(georeference: Georeference) -> dict[str, Any]:
    """Everything of a georeference, as JSON can hold it."""
    own: dict[str, Any] = {"transform": list(georeference.transform)}
    if isinstance(georeference.crs, int):
        own["epsg"] = georeference.crs
    elif georeference.crs is not None:
        keys = georeference.crs
        own["geokeys"] = {"directory": list(keys.directory), "doubles": list(keys.doubles), "text": keys.text}
    return own


def from_json(value: Any) -> Georeference | None:
    """Read what `to_json` wrote; None stays None.

    Raises
    ------
    ValueError
        It is nothing that `to_json` writes.
    """
    if value is None:
        return None
    a, b, c, d, e, f = typed.numbers(typed.member(value, "transform"), "transform", 6)
    if not is_sound((a, b, c, d, e, f)):
        raise ValueError("its transform flattens the pixels")
    crs: int | GeoKeys | None = None
    if "epsg" in value:
        crs = typed.integer(value["epsg"], "epsg", EPSG_CODES[0], EPSG_CODES[-1])
    elif "geokeys" in value:
        keys = value["geokeys"]
        doubles = typed.items(typed.member(keys, "doubles"), "doubles", most=MAX_KEYS)
        directory = typed.items(typed.member(keys, "directory"), "directory", most=MAX_KEYS)
        crs = GeoKeys(
            directory=typed.integers(directory, "directory", 0, 2**16 - 1),
            doubles=tuple(typed.number(each, "doubles", -sys.float_info.max, sys.float_info.max) for each in doubles),
            text=typed.text(typed.member(keys, "text"), "text")[:MAX_TEXT],
        )
    return Georeference((a, b, c, d, e, f), crs)


def attributes(georeference: Georeference | None, shape_yx: tuple[int, int]) -> dict[str, Any]:
    """Attributes by GeoZarr's conventions, of an image of such height and width; empty where it has no place."""
    if georeference is None:
        return {}
    known = isinstance(georeference.crs, int)
    return {
        "zarr_conventions": list(_CONVENTIONS if known else _CONVENTIONS[1:]),
        **({"proj:code": f"EPSG:{georeference.crs}"} if known else {}),
        "spatial:dimensions": ["y", "x"],
        "spatial:shape": list(shape_yx),
        "spatial:transform": list(georeference.transform),
    }
