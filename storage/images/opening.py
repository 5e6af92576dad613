"""``open_image``: which kind of image file this is, told by its first bytes and not by its name."""

from __future__ import annotations

import os
from contextlib import closing

from storage.errors import UnsupportedImageError
from storage.images.image import ACCEPTED
from storage.images.openslide_image import OpenSlideImage, instead_of
from storage.images.raster import MAGIC_BYTES, RasterImage, raster_kind
from storage.images.tiff import TiffImage
from storage.images.tiff_pages import Pages
from storage.place.files import RandomFile

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MIRAX = ".mrxs"  # a slide's first file, which is a JPEG


def open_image(
    location: str | os.PathLike[str], *, allow_sparse: bool = False, pages: Pages = None
) -> TiffImage | RasterImage | OpenSlideImage:
    """Open a TIFF, PNG, JPEG or BMP, or with the extra "slides" what OpenSlide reads.

    Parameters
    ----------
    location
        A path or a URL (http, https, s3, gs, az).
    allow_sparse
        Read tiles of a TIFF that are not stored as zeros rather than refuse the file.
    pages
        The page of a TIFF to read, numbered from 0, or "channels" for all of them as the channels of one image.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """
    place = os.fspath(location)
    try:
        match image_kind(place):
            case "TIFF":
                return TiffImage(place, allow_sparse=allow_sparse, pages=pages)
            case "raster" if pages not in (None, 0):
                raise UnsupportedImageError(f"{place}: one image, which has no other pages")
            case "raster":
                return RasterImage(place)
            case other:
                raise UnsupportedImageError(f"{place}: {other}; give {ACCEPTED}")
    except UnsupportedImageError as error:
        if pages is not None:  # OpenSlide has none to choose
            raise
        return instead_of(error, place)


def image_kind(place: str) -> str:
    """Tell a file: "TIFF", "raster" (PNG, JPEG, BMP), or in words what it is instead.

    Raises
    ------
    MissingImageError, UnsupportedImageError, TransferError
        It cannot be read.
    """
    with closing(RandomFile(place)) as file:
        first = file.read_at(0, MAGIC_BYTES)
    if first.startswith(TIFF_MAGICS):
        return "TIFF"
    if raster_kind(first) and not place.lower().endswith(MIRAX):
        return "raster"
    return "not an image of a kind that is read" if first else "an empty file"
