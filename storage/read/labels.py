"""The label images that ``storage.conversion.labels`` writes into pyramids."""

from __future__ import annotations

import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

from storage.format.ome_zarr import parse_pyramid
from storage.place.stores import open_store
from storage.read.slide import Slide

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def read_label(
    location: str | os.PathLike[str], name: str, made_of: dict[str, Any], shape_yx: tuple[int, int]
) -> NDArray[np.bool_] | None:
    """Read a mask that `write_label` has written into a pyramid.

    Parameters
    ----------
    location, name, made_of
        As `write_label` took them.
    shape_yx
        Height and width that it has.

    Returns
    -------
    (H, W), or None where there is another, made of something else

    Raises
    ------
    StorageError
        There is none, or it is damaged or cannot be read.
    """
    place = f"{os.fspath(location).rstrip('/')}/labels/{name}"
    with closing(open_store(place)) as store:
        info = parse_pyramid(store.get, place)
    if info.provenance != made_of or info.levels[0].shape != (1, *shape_yx):
        return None
    with Slide(place) as label:
        mask: NDArray[np.bool_] = label.read(0, (0, 0, *shape_yx))[0] != 0
    return mask
