"""Find what is wrong with a pyramid of another writer, as far as ``Slide`` reads it."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

from storage.errors import StorageError, TransferError
from storage.validation.pixels import compare_source, open_source

if TYPE_CHECKING:
    import os

    from storage.conversion.build import PixelSource
    from storage.read.slide import Slide
    from storage.validation.problems import Check, Place

FOREIGN_SIDE = 1024  # pixels; boxes of other writers' pyramids are read in whole shards of about this side


def check_foreign(check: Check, slide: Slide, source: str | os.PathLike[str] | None) -> None:
    """Check a pyramid of another writer as far as ``Slide`` reads it."""
    message = "of another writer, without a table of shards: missing or exchanged ones are not noticed"
    check.add(None, None, "unchecked", message + ("" if check.full else "; no chunk was decoded"))
    if not check.full:
        return
    shapes = [(len(slide.channels), *level.shape_yx) for level in slide.levels]
    with open_source(check, source, shapes[0], slide.dtype) as image:
        tasks = []
        for number, level in enumerate(slide.levels):
            side = level.shard * -(-FOREIGN_SIDE // level.shard)
            height, width = level.shape_yx
            places = [(y, x) for y in range(0, height, side) for x in range(0, width, side)]
            tasks += [partial(_examine_box, check, slide, number, place, side, image) for place in places]
        check.run(tasks, sum(map(math.prod, shapes)) * slide.dtype.itemsize)


def _examine_box(
    check: Check, slide: Slide, number: int, origin: Place, side: int, source: PixelSource | None
) -> None:
    """Read a box of whole shards; where it does not decode, read its chunks one by one and name those that do not."""
    level = slide.levels[number]
    (y, x), (height, width) = origin, level.shape_yx
    h, w = min(side, height - y), min(side, width - x)
    try:
        pixels = slide.read(number, (y, x, h, w))
    except TransferError:
        raise
    except StorageError:
        chunks = [(top, left) for top in range(y, y + h, level.chunk) for left in range(x, x + w, level.chunk)]
        for top, left in chunks:
            try:
                slide.read(number, (top, left, min(level.chunk, y + h - top), min(level.chunk, x + w - left)))
            except StorageError as error:
                place = (top // level.chunk, left // level.chunk)
                check.add(number, place, "chunk", str(error).removeprefix(f"{slide.location}: "))
    else:
        if number == 0:
            shard = (y // level.shard, x // level.shard)
            compare_source(check, source, pixels, origin, shard, level.chunk)
    check.advance(len(slide.channels) * h * w * slide.dtype.itemsize)
