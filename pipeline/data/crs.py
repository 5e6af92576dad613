"""Coordinate reference systems of scenes, as PROJ and GDAL know them, by the packages of the extra ``geo``.

pyproj is used for what has an EPSG code; rasterio besides for a CRS that a file defines by keys of its own, which
GDAL understands. Both are imported where they are used: without scenes on the Earth nobody needs them.

Shape letters: N places.
"""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pipeline.errors import DataError, UsageError
from pipeline.units import MICROMETRES
from storage.format.georeference import Georeference
from storage.images.geotiff import crs_file

WGS84 = 4326
_ROUNDING = 1e-9  # degrees
_SQUARE = 1.02  # times that a pixel's sides may differ
_MEND = "give the scene its own: gdal_edit -a_srs EPSG:... FILE"


def needed(package: str, purpose: str, *, extra: str = "geo") -> Any:
    """Import a package of an extra.

    Raises
    ------
    UsageError
        It is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(
            f"{purpose} needs {package}, which is not installed: pip install 'nested-ats[{extra}]'"
        ) from error


def to_wgs84(georeference: Georeference, xy: ArrayLike, where: str) -> NDArray[np.float64]:
    """Turn places in pixels of a scene into longitudes and latitudes.

    Parameters
    ----------
    georeference
        That of the scene.
    xy
        (N, 2) x and y in pixels, where the centre of the first pixel is at 0.5.
    where
        The scene's location, for messages.

    Returns
    -------
    (N, 2) longitudes, from -180 to 180, and latitudes of WGS 84, in degrees

    Raises
    ------
    UsageError
        The extra ``geo`` is not installed.
    DataError
        The scene has no CRS, or none that is known, or lies outside of what its CRS is for.
    """
    pyproj = needed("pyproj", "to place scenes on the Earth (WGS 84)")
    crs = known_crs(georeference, where)
    try:
        transformer = pyproj.Transformer.from_crs(crs, WGS84, always_xy=True)
    except pyproj.exceptions.ProjError as error:
        raise DataError(f"{where}: its CRS is of no place on the Earth ({_short(error)}); {_MEND}") from error
    x, y = georeference.place(xy).T
    placed = np.stack(transformer.transform(x, y), -1)
    if not np.isfinite(placed).all():
        raise DataError(f"{where}: parts of it lie outside of what its CRS is for; see its georeference")
    beyond = np.abs(placed[:, 0]) > 180 + _ROUNDING  # of scenes in degrees that go on over the antimeridian
    placed[beyond, 0] = (placed[beyond, 0] + 180) % 360 - 180
    placed[:, 0] = placed[:, 0].clip(-180, 180)
    return placed


def known_crs(georeference: Georeference, where: str) -> Any:
    """Return the CRS of a scene as a ``pyproj.CRS``.

    Raises
    ------
    UsageError, DataError
        As `to_wgs84`.
    """
    pyproj = needed("pyproj", "to tell the coordinate reference system of scenes")
    try:
        if isinstance(georeference.crs, int):
            return pyproj.CRS.from_epsg(georeference.crs)
        return pyproj.CRS.from_wkt(gdal_crs(georeference, where).to_wkt())
    except pyproj.exceptions.CRSError as error:
        raise DataError(f"{where}: {_unknown(georeference)} ({_short(error)})") from error


def gdal_crs(georeference: Georeference, where: str) -> Any:
    """Return the CRS of a scene as a ``rasterio.crs.CRS``.

    Raises
    ------
    UsageError, DataError
        As `to_wgs84`.
    """
    if georeference.crs is None:
        raise DataError(f"{where}: a scene without a coordinate reference system (CRS); {_MEND}")
    rasterio = needed("rasterio", "a CRS for GDAL, or one that a file defines itself,")
    from rasterio.errors import CRSError, RasterioError

    try:
        if isinstance(georeference.crs, int):
            return rasterio.crs.CRS.from_epsg(georeference.crs)
        with rasterio.MemoryFile(crs_file(georeference.crs)) as file, file.open() as image:
            crs = image.crs
    except (CRSError, RasterioError, UnicodeError) as error:  # names may be of any bytes
        raise DataError(f"{where}: {_unknown(georeference)} ({_short(error)})") from error
    if crs is None:
        raise DataError(f"{where}: {_unknown(georeference)}")
    return crs


def metres_per_pixel(georeference: Georeference, where: str) -> tuple[float, float] | None:
    """Height and width of a pixel in metres of a projected CRS; None where the CRS is none, or is in degrees.

    Raises
    ------
    UsageError, DataError
        As `to_wgs84`.
    """
    if georeference.crs is None:
        return None
    crs = known_crs(georeference, where)
    if not crs.is_projected:
        return None
    metres = crs.axis_info[0].unit_conversion_factor
    a, b, _, d, e, _ = georeference.transform
    return math.hypot(b, e) * metres, math.hypot(a, d) * metres


def scene_mpp(georeference: Georeference, where: str) -> float:
    """Micrometres that a pixel of a scene measures.

    Raises
    ------
    UsageError
        The extra ``geo`` is not installed.
    DataError
        The scene has no CRS, or one that is unknown or in degrees, or its pixels are not square.
    """
    if georeference.crs is None:
        raise DataError(f"{where}: a scene without a coordinate reference system (CRS); {_MEND}")
    sides = metres_per_pixel(georeference, where)
    if sides is None:
        raise DataError(
            f"{where}: its CRS ({georeference.words}) is in degrees, which are of no one length, and the model looks "
            "at metres; warp it to a projected one, such as UTM: gdalwarp -t_srs EPSG:326.. IN.tif OUT.tif"
        )
    if max(sides) > min(sides) * _SQUARE:
        raise DataError(
            f"{where}: its pixels are {sides[0]:g} m high and {sides[1]:g} m wide, and the model means square ones; "
            "resample it: gdalwarp -tr SIDE SIDE IN.tif OUT.tif"
        )
    return sides[1] * MICROMETRES


def _unknown(georeference: Georeference) -> str:
    if isinstance(georeference.crs, int):
        return f"EPSG:{georeference.crs} is not known; {_MEND}"
    return f"its keys define no CRS that GDAL knows; {_MEND}"


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120]
