"""Blocks of the Earth's surface, whose scenes stay together when splits are drawn.

Scenes that lie beside each other look alike: split at random, a model is tested on what it has as good as seen
(Roberts et al. 2017, https://doi.org/10.1111/ecog.02881). Blocks are cells of a grid of whole rows and columns on the
sphere, all of about the wanted height and width at any latitude, which no single map projection has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.data.crs import needed, to_wgs84
from pipeline.data.groups import join_groups
from pipeline.data.manifest import Entry
from pipeline.data.slides import open_slide
from pipeline.errors import DataError
from pipeline.net import Net
from pipeline.progress import each_slide
from storage import processors

_KM_PER_DEGREE = 2 * math.pi * 6371.0088 / 360  # of the mean sphere (IUGG)
_NAMED = 5  # failures in a message

Block = tuple[int, int]  # row from the equator northwards, column from the antimeridian eastwards


def spatial_groups(entries: Sequence[Entry], kilometres: float) -> dict[str, str]:
    """Group scenes by the blocks in which their centres lie, and by their cases.

    Parameters
    ----------
    entries
        The scenes.
    kilometres
        Height and width of a block.

    Returns
    -------
    The name of each slide's group by its id. Slides of one block or of one case are of one group.

    Raises
    ------
    UsageError
        The extra ``geo`` is not installed.
    DataError
        Scenes cannot be opened, or do not tell where on the Earth they lie; they are named.
    """
    needed("pyproj", "--spatial-block")
    centres = list(each_slide("open", entries, _centre, threads=processors()))
    wrong = [f"{entry.slide_id}: {why}" for entry, why in zip(entries, centres, strict=True) if isinstance(why, str)]
    if wrong:
        more = f"; and {len(wrong) - _NAMED} more" if len(wrong) > _NAMED else ""
        raise DataError(
            f"{len(wrong)} of {len(entries)} scenes have no place on the Earth, so that no block is theirs: "
            f"{'; '.join(wrong[:_NAMED])}{more}"
        )
    blocks = {
        entry.slide_id: block_of(*centre, kilometres)
        for entry, centre in zip(entries, centres, strict=True)
        if not isinstance(centre, str)
    }
    return join_groups(entries, blocks)


def block_of(longitude: float, latitude: float, kilometres: float) -> Block:
    """Return the row and column of the block of a place in degrees; a block has so many kilometres a side."""
    row = math.floor(latitude * _KM_PER_DEGREE / kilometres)
    middle = math.radians(min(max((row + 0.5) * kilometres / _KM_PER_DEGREE, -90), 90))
    columns = max(1, round(360 * _KM_PER_DEGREE * math.cos(middle) / kilometres))
    return row, math.floor((longitude + 180) / 360 * columns) % columns


def _centre(entry: Entry) -> tuple[float, float] | str:
    """Longitude and latitude of a scene's centre, or why it has none."""
    with Net() as net, open_slide(entry.path) as slide:
        if slide.georeference is None:
            return (
                f"{entry.path}: no georeference; leave it out, or, if it is a pyramid that was made before "
                "georeferences were kept, convert it again"
            )
        height, width = slide.shape_yx
        longitude, latitude = to_wgs84(slide.georeference, [(width / 2, height / 2)], entry.path)[0]
        return float(longitude), float(latitude)
    return net.error
