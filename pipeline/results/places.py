"""What heatmaps say of scenes on the Earth: maps as GeoTIFFs, and patches in WGS 84.

Shape letters: H W cells of a map, N patches.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.crs import gdal_crs, needed, to_wgs84
from pipeline.errors import DataError
from storage import Slide
from storage.format.georeference import Georeference

_TILE = 512  # pixels, as GDAL's own default for such files
_ROWS = 1024  # of a level whose data is looked for at once


def georeference_of(slide: Slide) -> Georeference:
    """Return the georeference that a GeoTIFF needs.

    Raises
    ------
    DataError
        The slide has none.
    """
    if slide.georeference is None:
        raise DataError(
            f"{slide.location}: has no georeference, which --format geotiff needs; leave that out, or convert a "
            "pyramid that was made before georeferences were kept again"
        )
    return slide.georeference


def map_geotiff(slide: Slide, values: NDArray[np.float32], pitch: float, band: str) -> bytes:
    """Make a cloud-optimised GeoTIFF of a map that lies on its scene, in the scene's CRS.

    Parameters
    ----------
    slide
        The open scene.
    values
        The map, (H, W); it is NaN where there is nothing to see.
    pitch
        How many level-0 pixels a cell of `values` has on a side.
    band
        What the map shows.

    Returns
    -------
    A file of one float32 band; it is NaN, which is its "no data", where the scene has no data either.

    Raises
    ------
    UsageError
        rasterio is not installed.
    DataError
        The scene has no georeference, or a CRS that is not known.
    """
    rasterio = needed("rasterio", "--format geotiff")
    place = georeference_of(slide)
    profile = {
        "driver": "COG",
        "dtype": "float32",
        "count": 1,
        "height": values.shape[0],
        "width": values.shape[1],
        "nodata": np.nan,
        "crs": None if place.crs is None else gdal_crs(place, slide.location),
        "transform": rasterio.Affine(*place.scaled(pitch).transform),
        "compress": "deflate",
        "predictor": "yes",
        "blocksize": _TILE,
        "overview_resampling": "average",
    }
    with rasterio.MemoryFile() as file:
        with file.open(**profile) as image:
            image.write(np.where(has_data(slide, values.shape, pitch), values, np.float32(np.nan)), 1)
            image.set_band_description(1, band)
        return bytes(file.read())


def has_data(slide: Slide, shape: tuple[int, ...], pitch: float) -> NDArray[np.bool_]:
    """Tell in which cells, of so many level-0 pixels a side, a scene has data in any pixel: (H, W) of `shape`."""
    number = max(i for i, level in enumerate(slide.levels) if i == 0 or level.downsample <= pitch)
    level = slide.levels[number]
    height, width = level.shape_yx
    found = np.zeros(shape, bool)
    cell = pitch / level.downsample  # not under 1, so that a pixel touches two cells at most
    for top in range(0, height, _ROWS):
        rows = np.arange(top, min(top + _ROWS, height))
        valid = slide.valid(number, [(top, 0, len(rows), width)])
        if valid is None:
            return np.ones(shape, bool)
        across = np.zeros((shape[1], len(rows)), bool)
        _join(across, valid[0].T, np.arange(width), cell)
        _join(found, across.T, rows, cell)
    return found


def _join(out: NDArray[np.bool_], lines: NDArray[np.bool_], pixels: NDArray[np.int64], cell: float) -> None:
    """Enter lines (P, N) of so many pixels in the lines (H, N) of the cells that they touch."""
    for edge in (0.0, 0.999):
        cells = np.minimum(((pixels + edge) / cell).astype(np.int64), len(out) - 1)
        first = np.flatnonzero(np.diff(cells, prepend=-1))
        out[cells[first]] |= np.logical_or.reduceat(lines, first, axis=0)


def in_wgs84(collection: dict[str, Any], slide: Slide) -> dict[str, Any]:
    """Turn a GeoJSON collection of convex polygons in level-0 pixels into one in WGS 84, as RFC 7946 has it.

    Outer rings turn counterclockwise, and what crosses the antimeridian is cut there (its sections 3.1.6 and 3.1.9).

    Raises
    ------
    UsageError, DataError
        As `pipeline.data.crs.to_wgs84`.
    """
    features = collection["features"]
    if not features:
        return collection
    rings = np.array([feature["geometry"]["coordinates"][0] for feature in features], np.float64)
    placed = to_wgs84(georeference_of(slide), rings.reshape(-1, 2), slide.location).reshape(rings.shape)
    geometries = [_geometry(ring[:-1]) for ring in placed]
    return collection | {
        "features": [feature | {"geometry": own} for feature, own in zip(features, geometries, strict=True)]
    }


def _geometry(ring: NDArray[np.float64]) -> dict[str, Any]:
    """Geometry of a convex ring (N, 2) of longitudes and latitudes."""
    if np.ptp(ring[:, 0]) <= 180:
        return {"type": "Polygon", "coordinates": [_closed(ring)]}
    east = ring + np.array([360.0, 0.0]) * (ring[:, :1] < 0)  # as if longitudes went on beyond 180
    parts = [_cut(east, 1.0), _cut(east, -1.0) - np.array([360.0, 0.0])]  # neither is empty: both have corners
    return {"type": "MultiPolygon", "coordinates": [[_closed(part)] for part in parts if np.ptp(part[:, 0]) > 0]}


def _cut(ring: NDArray[np.float64], side: float) -> NDArray[np.float64]:
    """Keep the part of a convex ring that lies west (1) or east (-1) of 180 degrees."""
    kept: list[NDArray[np.float64]] = []
    for one, other in pairwise([*ring, ring[0]]):
        inside, next_inside = (side * (180 - point[0]) >= 0 for point in (one, other))
        if inside:
            kept.append(one)
        if inside != next_inside:
            kept.append(one + (other - one) * (180 - one[0]) / (other[0] - one[0]))
    return np.array(kept).reshape(-1, 2)


def _closed(ring: NDArray[np.float64]) -> list[list[float]]:
    x, y = ring.T
    clockwise = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) < 0
    points: list[list[float]] = (ring[::-1] if clockwise else ring).tolist()
    return [*points, points[0]]
