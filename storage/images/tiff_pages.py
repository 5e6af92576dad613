"""Choose among the pages of a TIFF that has several images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import tifffile

from storage.images.tiff_kinds import choose_page

if TYPE_CHECKING:
    from collections.abc import Sequence


def series_of(pages: Sequence[tifffile.TiffPage | tifffile.TiffFrame]) -> tifffile.TiffPageSeries:
    """Make one image of a page, or of several of one size, each of which is a channel.

    Raises
    ------
    RuntimeError
        The pages are of different sizes.
    """
    whole = [page.aspage() for page in pages]
    first = whole[0]
    if len(whole) == 1:
        return tifffile.TiffPageSeries(whole, first.shape, first.dtype, first.axes)
    if any(page.shape != first.shape for page in whole):
        raise RuntimeError("pages that do not have one keyframe")  # as tifffile puts it
    return tifffile.TiffPageSeries(whole, (len(whole), *first.shape), first.dtype, f"C{first.axes}")


STACKS = ("generic", "uniform", "shaped", "imagej", "ome")  # tifffile's kinds of files whose pages may be images


def images_in(tif: tifffile.TiffFile) -> list[int]:
    """Numbers of the pages that are images of their own: no masks, no copies of lower resolution.

    Of slides of scanners there is one image, whatever labels and overviews they hold.
    """
    if tif.series[0].kind not in STACKS or tif.is_svs:
        return [0]
    pages = ((number, page.aspage()) for number, page in enumerate(tif.pages))
    return [number for number, page in pages if not (page.is_mask or page.is_reduced)]


def masks_of(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> list[tifffile.TiffPage]:
    """List the masks of an image of one page, and of its coarser copies.

    They are pages that say so (bit 2 of NewSubfileType), between the image and the next one that is neither a mask
    nor a copy of lower resolution.
    """
    index = series.keyframe.index
    if len(series.pages) != 1 or not isinstance(index, int):
        return []
    masks = []
    for number in range(index + 1, len(tif.pages)):
        page = tif.pages[number].aspage()
        if page.is_mask:
            masks.append(page)
        elif not page.is_reduced:
            break
    return masks


def why_unclear(tif: tifffile.TiffFile, series: tifffile.TiffPageSeries) -> str:
    """Tell why the baseline image of a file may not be the one that is meant; the answer is empty where it is clear.

    A first image that is smaller than a later one may be its thumbnail, in a file of no kind that tells its images
    apart.
    """
    page = series.keyframe
    if series.kind != "generic":
        return ""
    own = page.imagelength * page.imagewidth
    others = [other.keyframe for other in tif.series if not (other.keyframe.is_reduced or other.keyframe.is_mask)]
    largest = max(others, key=lambda other: other.imagelength * other.imagewidth, default=page)
    if largest.imagelength * largest.imagewidth > own:
        what = f"its first image of {page.imagelength} x {page.imagewidth} pixels is smaller than a later one"
        what += f" of {largest.imagelength} x {largest.imagewidth}"
        return f"{what}, of which it may be a thumbnail; {choose_page(len(tif.pages)).removeprefix('or ')}"
    return ""
