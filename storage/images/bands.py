"""Several files as the bands of one image, as satellites deliver them: one file a band, some of coarser pixels.

The image has the pixels of the finest file. A coarser band has, at each of them, the value of its own pixel in which
the centre of that one lies (nearest neighbour): no value is made not measured, and none is mixed with "no data".

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import UnsupportedImageError
from storage.format.georeference import compose, inverted
from storage.images.image import Image
from storage.images.tiff import TiffImage
from storage.limits import LIMITS, Limits
from storage.place.location import files_of, short_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

NEAR = 0.5  # pixels, by which a band may be turned or stretched over its whole side
CUT_ALIKE = "cut them alike: gdalwarp -te XMIN YMIN XMAX YMAX IN.tif OUT.tif"


@dataclass(frozen=True)
class Grid:
    """Where the pixels of an image lie in a band: in number ``floor(step * (i + 0.5) + first)``, along y and x."""

    step_yx: tuple[float, float]
    first_yx: tuple[float, float]
    shape_yx: tuple[int, int]  # of the band, in whose last pixels the image may end

    def between(self, downsample: float, own: float, shape_yx: tuple[int, int]) -> Grid:
        """The grid between a coarser level of the image and one of the band, by their downsamples."""
        (y, x), (first_y, first_x) = self.step_yx, self.first_yx
        scale = downsample / own
        return Grid((y * scale, x * scale), (first_y / own, first_x / own), shape_yx)

    def indexes(self, axis: int, start: int, count: int) -> NDArray[np.int64]:
        """Numbers of the band's rows (axis 0) or columns (1) for those of the image from ``start`` on, (count,)."""
        centres = start + np.arange(count) + 0.5
        places = self.step_yx[axis] * centres + self.first_yx[axis]
        found: NDArray[np.int64] = np.floor(places).astype(np.int64).clip(0, self.shape_yx[axis] - 1)
        return found


class BandsImage(Image):
    """Band files as one image; see ``Image``.

    Attributes
    ----------
    files, images : the files of the bands, and they opened
    finest : number of the file that has the finest pixels
    grids : where the pixels of the finest lie in each of them

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
        A file cannot be read, has no place on the Earth, or another CRS, extent, type or "no data" than the finest.
    """

    def __init__(
        self, location: str | os.PathLike[str], *, allow_sparse: bool = False, limits: Limits = LIMITS
    ) -> None:
        super().__init__(os.fspath(location), limits, allow_sparse=allow_sparse)
        self.files = files_of(location)
        with ExitStack() as held:
            self.images = [
                held.enter_context(TiffImage(file, allow_sparse=allow_sparse, limits=limits)) for file in self.files
            ]
            self._describe()
            held.pop_all()

    def _describe(self) -> None:
        sizes = [_pixel_area(image) for image in self.images]
        self.finest = sizes.index(min(sizes))
        first = self.images[self.finest]
        self.grids = [_grid(first, image) for image in self.images]
        self.dtype, self.bits, self.nodata = first.dtype, first.bits, first.nodata
        self.georeference, self.segment_yx = first.georeference, first.segment_yx
        self.direct = all(image.direct for image in self.images)
        self.channels = tuple(_names(self.files, self.images))
        if any(image.alpha is not None for image in self.images):
            self.alpha, self.channels = len(self.channels), (*self.channels, "mask")
        if len(self.channels) > self._limits.channels:
            raise self._unsupported(f"{len(self.channels)} bands, and at most {self._limits.channels} are read")
        self.shape = (len(self.channels), *first.shape[1:])

    def read(self, y: int, x: int, h: int, w: int) -> NDArray[Any]:
        """(C, h, w) of a box inside the image; see `TiffImage.read`."""
        self._check_box(y, x, h, w)
        parts = []
        for image, grid in zip(self.images, self.grids, strict=True):
            rows, columns = grid.indexes(0, y, h), grid.indexes(1, x, w)
            if not h or not w:
                parts.append(np.empty((image.shape[0], h, w), self.dtype))
                continue
            top, left = int(rows.min()), int(columns.min())
            block = image.read(top, left, int(rows.max()) + 1 - top, int(columns.max()) + 1 - left)
            parts.append(block[:, rows - top][:, :, columns - left])
        return self.joined(parts)

    def joined(self, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
        """Join pixels (..., C, h, w) of each file to those of the image: hidden is what any file hides."""
        axis = parts[0].ndim - 3
        values, shown = [], []
        for part, image in zip(parts, self.images, strict=True):
            values.append(part if image.alpha is None else np.delete(part, image.alpha, axis))
            if image.alpha is not None:
                shown.append(part[..., image.alpha : image.alpha + 1, :, :])
        return np.concatenate([*values, reduce(np.minimum, shown)] if shown else values, axis)

    def close(self) -> None:
        """Close the files."""
        for image in self.images:
            image.close()


def _pixel_area(image: TiffImage) -> float:
    if image.georeference is None:
        raise UnsupportedImageError(
            f"{image.location}: has no place on the Earth, by which it could lie on the other bands; give it one: "
            "gdal_edit -a_srs EPSG:... -a_ullr ... FILE"
        )
    a, b, _, d, e, _ = image.georeference.transform
    return abs(a * e - b * d)


def _grid(first: TiffImage, image: TiffImage) -> Grid:
    """Lay a band under the finest one, or refuse."""
    place, own = first.georeference, image.georeference
    assert place is not None  # noqa: S101  as `_pixel_area` has seen
    assert own is not None  # noqa: S101

    def refused(reason: str) -> UnsupportedImageError:
        return UnsupportedImageError(f"{image.location}: {reason}")

    other = f"another band of its scene, {first.location},"
    if own.crs != place.crs:
        raise refused(
            f"is in {own.words}, and {other} in {place.words}; warp it: gdalwarp -t_srs {place.words} IN.tif OUT.tif"
        )
    for name, mine, theirs in (
        ("numbers of type", image.dtype, first.dtype),
        ("bits", image.bits, first.bits),
        ("nodata", image.nodata, first.nodata),
    ):
        if str(mine) != str(theirs):  # NaN is NaN
            raise refused(f"has {name} {mine}, and {other} {theirs}; make them alike by gdal_translate")
    x_step, x_turn, x_first, y_turn, y_step, y_first = compose(inverted(own.transform), place.transform)
    (height, width), (own_height, own_width) = first.shape[1:], image.shape[1:]
    if abs(x_turn) * height > NEAR or abs(y_turn) * width > NEAR:
        raise refused(f"lies turned against {other} which is not resampled; warp one onto the other by gdalwarp")
    ends = [
        (x_first, x_first + x_step * width, own_width),
        (y_first, y_first + y_step * height, own_height),
    ]
    # Landsat's bands of 15 m begin half a pixel of 30 m before the others.
    off = max(max(abs(min(start, end)), abs(max(start, end) - side)) for start, end, side in ends)
    if off > 1:
        raise refused(f"covers another area than {other} by up to {off:.1f} of its pixels; {CUT_ALIKE}")
    return Grid((y_step, x_step), (y_first, x_first), (own_height, own_width))


def _names(files: Sequence[str], images: Sequence[TiffImage]) -> list[str]:
    """Name the bands: as the files name them, if that tells all apart, else by what tells the files' names apart."""
    own = [[name for c, name in enumerate(image.channels) if c != image.alpha] for image in images]
    flat = [name for names in own for name in names]
    if len(set(flat)) == len(flat) and not any(name.isdecimal() for name in flat):
        return flat
    return [
        short if len(names) == 1 else f"{short}_{name}"
        for short, names in zip(short_names(files), own, strict=True)
        for name in names
    ]
