"""``open_image``: which kind of image file this is, told by its first bytes and not by its name."""

from __future__ import annotations

import os
from contextlib import closing

from storage.errors import UnsupportedImageError
from storage.images.bands import BandsImage
from storage.images.image import ACCEPTED
from storage.images.openslide_image import OpenSlideImage, instead_of
from storage.images.raster import MAGIC_BYTES, RasterImage, raster_kind
from storage.images.tiff import TiffImage
from storage.images.tiff_pages import images_in
from storage.images.tiff_structure import TiffStructure
from storage.place.files import RandomFile
from storage.place.location import Pages, files_of, split_page

TIFF_MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
MIRAX = ".mrxs"  # a slide's first file, which is a JPEG


def open_image(
    location: str | os.PathLike[str], *, allow_sparse: bool = False, pages: Pages = None
) -> TiffImage | RasterImage | OpenSlideImage | BandsImage:
    """Open a TIFF, PNG, JPEG or BMP, or with the extra "slides" what OpenSlide reads.

    Parameters
    ----------
    location
        A path or a URL (http, https, s3, gs, az), with a page or with further bands (``storage.place.location``).
    allow_sparse
        Read tiles of a TIFF that are not stored as zeros rather than refuse the file.
    pages
        The page of a TIFF to read, numbered from 0, or "channels" for all of them as the channels of one image.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """
    if len(files_of(location)) > 1:
        if pages is not None:
            raise UnsupportedImageError(f"{os.fspath(location)}: several files, of which no page is taken")
        return BandsImage(location, allow_sparse=allow_sparse)
    place, page = split_page(location)
    pages = page if pages is None else pages
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


def image_pages(location: str | os.PathLike[str]) -> list[int]:
    """Numbers of the pages of a file that are images of their own; of what is no TIFF of several pages, 0.

    Raises
    ------
    MissingImageError, UnsupportedImageError, CorruptImageError, TransferError
    """
    return _Pages(location).numbers if image_kind(os.fspath(location)) == "TIFF" else [0]


class _Pages(TiffStructure):
    """The pages of a TIFF, none of which is described."""

    def _open(self, *, coarser: bool) -> None:  # noqa: ARG002
        with self._parsed() as (tif, _):
            self.numbers = images_in(tif)
        self.close()


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
