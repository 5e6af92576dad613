"""Compare level 0 with the image that it was made from, pixel by pixel.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from storage.errors import StorageError
from storage.images.opening import open_image

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from storage.conversion.build import PixelSource
    from storage.place.location import Pages
    from storage.validation.problems import Check, Place


@contextmanager
def open_source(
    check: Check,
    source: str | os.PathLike[str] | None,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    allow_sparse: bool = False,
    pages: Pages = None,
) -> Iterator[PixelSource | None]:
    """Open the source, if there is one; where level 0 cannot equal it, note that and yield None."""
    if source is None:
        yield None
        return
    with open_image(source, allow_sparse=allow_sparse, pages=pages) as image:
        same = (image.shape, image.dtype) == (shape, dtype)
        if not same:
            text = f"(C, H, W) = {shape} of {dtype}; the source is {image.shape} of {image.dtype}"
            check.add(0, None, "pixels", text)
        yield image if same else None


def compare_source(
    check: Check, source: PixelSource | None, pixels: NDArray[Any], origin: Place, shard: Place, chunk: int
) -> None:
    """Compare (C, h, w) pixels of level 0 with the same box of the source, if there is one."""
    if source is None:
        return
    try:
        expected = source.read(*origin, *pixels.shape[1:])
    except StorageError as error:
        check.add(0, shard, "unchecked", f"the source cannot be read there ({error})")
        return
    if wrong := differences(pixels, expected, origin, chunk):
        check.add(0, shard, "pixels", f"{wrong} the source's")


def differences(pixels: NDArray[Any], expected: NDArray[Any], origin: Place, chunk: int) -> str:
    """Say how many pixels differ and where the first one is, if any differ; NaN equals NaN."""
    different = pixels != expected
    if pixels.dtype.kind == "f":
        different &= ~(np.isnan(pixels) & np.isnan(expected))
    places = np.argwhere(different.any(axis=0))
    if not len(places):
        return ""
    y, x = (places[0] + origin).tolist()
    where = f"the first at y={y}, x={x} in chunk {(y // chunk, x // chunk)}"
    return f"{len(places)} of {different[0].size} pixels, {where}, are not"
