"""``tissue``: find where slides have something to see, to be looked at, corrected in QuPath, and trained with."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from nested_ats.mask import Prior
from pipeline.data.manifest import Entry, write_manifest
from pipeline.data.outlines import to_outlines
from pipeline.data.slides import open_slide
from pipeline.data.tissue import Finding, find_mask, put_into_pyramid
from pipeline.errors import DataError
from pipeline.files import file_name, make_folder, write_atomic
from pipeline.net import Net
from pipeline.progress import each_slide
from pipeline.results.pictures import thumbnail, to_png
from storage import processors

MANIFEST, TABLE = "manifest.csv", "tissue.csv"
_SHOWN_PIXELS = 320  # a slide on a contact sheet has no more a side
_COLUMNS, _ROWS = 8, 5  # of a contact sheet


@dataclass(frozen=True)
class Tissue:
    """What was found on one slide, or why nothing was."""

    entry: Entry  # its mask is the file that was written
    area_mm2: float | None = None  # none where the slide does not tell what its pixels measure
    share: float = 0.0  # of the slide's area
    error: str = ""
    not_put: str = ""  # why the mask is not in the slide's pyramid, where that was asked for
    shown: tuple[NDArray[Any], NDArray[np.bool_]] | None = None  # a small view (h, w, 3) and the mask (H, W)


def find_tissue(
    entries: Sequence[Entry],
    folder: Path,
    *,
    prior: Prior = "tissue",
    nodata: float | None = None,
    finding: Finding | None = None,
    into_pyramids: bool = False,
) -> list[Tissue]:
    """Write the mask of every slide, as outlines and as an image, a table, a manifest and contact sheets.

    Parameters
    ----------
    entries
        The slides.
    folder
        The folder to write to, which is made where it is missing: ``SLIDE.geojson`` and ``SLIDE.png`` of each slide,
        ``manifest.csv`` in which the outlines are the slides' masks, ``tissue.csv``, and ``contact-1.png`` and so on.
    prior
        What is looked for: ``tissue`` or ``valid`` pixels.
    nodata
        Value from 0 to 1 of pixels that were not recorded, in files that do not tell it.
    finding
        How tissue is found.
    into_pyramids
        Put each mask into its slide's pyramid as well (`pipeline.data.tissue.put_into_pyramid`).

    Returns
    -------
    One of each slide, in their order; one that fails is reported, and the others go on.

    Raises
    ------
    UsageError
        `folder` cannot be written to.
    """
    make_folder(folder)

    def find(entry: Entry) -> Tissue:
        with Net() as net:
            return _find(entry, folder, prior, nodata, finding, into_pyramids)
        return Tissue(entry, error=net.error)

    done: list[Tissue] = []
    found = each_slide("tissue", entries, find, threads=processors())
    while page := list(islice(found, _COLUMNS * _ROWS)):
        write_atomic(folder / f"contact-{len(done) // (_COLUMNS * _ROWS) + 1}.png", _contact_sheet(page))
        done += [replace(one, shown=None) for one in page]
    write_atomic(folder / TABLE, _table(done))
    write_manifest(folder / MANIFEST, [one.entry for one in done if not one.error])
    return done


def _find(
    entry: Entry, folder: Path, prior: Prior, nodata: float | None, finding: Finding | None, into_pyramids: bool
) -> Tissue:
    with open_slide(entry.path) as slide:
        found = find_mask(slide, entry, prior, nodata=nodata, finding=finding)
        if not found.pixels.any():
            raise DataError(
                f"{entry.path}: nothing was found; look at the slide, and try a lower --threshold, or leave it out"
            )
        mpp = entry.mpp or slide.mpp
        small, _ = thumbnail(slide, _SHOWN_PIXELS)
        share = found.area_l0 / math.prod(slide.shape_yx)
        put = Net()
        if into_pyramids:
            with put:
                put_into_pyramid(slide, prior, found)
    place = folder / f"{file_name(entry.slide_id)}.geojson"
    write_atomic(place, json.dumps(to_outlines(found.pixels, found.pitch_yx, prior)) + "\n")
    picture = io.BytesIO()
    imsave(picture, found.pixels, cmap="gray", format="png")
    write_atomic(place.with_suffix(".png"), picture.getvalue())
    area = found.area_l0 * (mpp / 1000) ** 2 if mpp else None
    return Tissue(
        replace(entry, mask=str(place.absolute())),
        area,
        min(share, 1.0),
        not_put=put.error,
        shown=(small, found.pixels),
    )


def _table(done: Sequence[Tissue]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["slide_id", "area_mm2", "share", "error"])
    for one in done:
        area = "" if one.area_mm2 is None else f"{one.area_mm2:.4g}"
        writer.writerow([one.entry.slide_id, area, "" if one.error else f"{one.share:.4f}", one.error])
    return text.getvalue()


def _contact_sheet(found: Sequence[Tissue]) -> bytes:
    """Draw small views of slides with the outline of what was found on them, as a PNG."""
    from matplotlib.figure import Figure

    columns = min(len(found), _COLUMNS)
    rows = -(-len(found) // columns)
    figure = Figure(figsize=(2 * columns, 2.3 * rows), layout="constrained")
    places: Iterator[Any] = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, one in zip(places, [*found, *[None] * columns], strict=False):
        axes.axis("off")
        if one is None:
            continue
        area = "" if one.area_mm2 is None else f", {one.area_mm2:.3g} mm²"
        label = "failed" if one.error else f"{one.share:.0%}{area}"
        axes.set_title(f"{one.entry.slide_id[:28]}\n{label}", fontsize=7, parse_math=False)
        if one.shown:
            view, mask = one.shown
            height, width = view.shape[:2]
            axes.imshow(view, extent=(0, width, height, 0))
            if not mask.all():
                y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(mask.shape, (height, width), strict=True))
                axes.contour(x, y, mask, levels=[0.5], colors=["#00a040"], linewidths=0.8)
    return to_png(figure)
