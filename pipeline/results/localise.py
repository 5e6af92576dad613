"""How well a map finds what somebody has outlined: localisation AUC, and free-response ROC (FROC).

Outlines are a GeoJSON file for each slide, as QuPath exports it. A *lesion* is a polygon of it, and a cell of the map
belongs to a lesion that touches it. What is of QuPath's class ``Ignore*`` counts neither way. A file without polygons
says that there is nothing to be found on its slide.

Localisation AUC
    The chance that a cell of a lesion has more attention than a cell outside, over the cells in which the model could
    draw (ties count half). Of several slides it is the mean over those that have both kinds of cells.
FROC
    Detections are the local maxima of the map above the uniform attention, 1, each with its value as confidence. A
    detection in a cell of a lesion finds that lesion; any other is a false positive. The curve is the share of
    lesions found over the mean number of false positives a slide, over all thresholds, slides without lesions
    included; its score is the mean share at 1/4, 1/2, 1, 2, 4 and 8 false positives a slide. So does CAMELYON16
    (Ehteshami Bejnordi et al., JAMA 2017), which also leaves out lesions of isolated cells; here size decides
    nothing.

Shape letters: H W cells of a map, L lesions, S slides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.data.outlines import IGNORED, Outline, fill, read_objects
from pipeline.errors import DataError
from pipeline.files import file_name
from pipeline.results.intervals import Interval, Reals, area, jackknife_interval

RATES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)  # false positives a slide
_FINER = 4  # points along a side of a cell at which it is seen whether an outline touches it
_LEAST = 1.0  # times the uniform attention, below which a maximum detects nothing


@dataclass(frozen=True)
class Annotation:
    """What somebody has outlined on a slide, in pixels of its finest level."""

    lesions: list[Outline]
    ignored: list[Outline]


@dataclass(frozen=True)
class Localised:
    """How well a map of a slide finds its lesions."""

    area: float | None  # localisation AUC; None without cells of either kind
    found: Reals  # (L,): the confidence of each lesion's surest detection; -inf where it has none
    false: Reals  # confidences of the detections outside


@dataclass(frozen=True)
class FROC:
    """Free-response ROC of several slides."""

    rates: Reals  # false positives a slide, rising from 0
    sensitivities: Reals  # share of lesions found
    at: Reals  # sensitivities at `RATES`
    score: float  # their mean
    lesions: int
    slides: int


def read_annotation(folder: Path, slide_id: str, shape_yx: tuple[int, int]) -> Annotation | None:
    """Read the outlines ``SLIDE.geojson`` of a slide; None where there is no such file.

    Raises
    ------
    DataError
        The file is no GeoJSON, or that of another slide.
    storage.StorageError
        It cannot be read.
    """
    place = folder / f"{file_name(slide_id)}.geojson"
    if not place.exists():
        return None
    lesions: list[Outline] = []
    ignored: list[Outline] = []
    for each in read_objects(str(place)):
        (ignored if each.kind == IGNORED else lesions).extend(each.outlines)
    for outer, _ in (*lesions, *ignored):
        x, y = outer.min(0)
        if x > shape_yx[1] or y > shape_yx[0]:
            raise DataError(
                f"{place}: has an outline at x {x:.0f}, y {y:.0f}, off the slide, which is {shape_yx[1]} wide and "
                f"{shape_yx[0]} high; give the outlines of this slide, in pixels of its finest level"
            )
    return Annotation(lesions, ignored)


def localise(heat: NDArray[np.float32], pitch: float, annotation: Annotation) -> Localised:
    """Measure how well a map finds lesions.

    Parameters
    ----------
    heat
        (H, W) attention as multiples of the uniform one; NaN where the model could not draw.
    pitch
        Level-0 pixels of the slide to a cell.
    annotation
        What is to be found.
    """
    lesions = [_touched([each], heat.shape, pitch) for each in annotation.lesions]
    inside = np.zeros(heat.shape, np.bool_)
    for lesion in lesions:
        inside |= lesion
    counted = np.isfinite(heat) & ~(_touched(annotation.ignored, heat.shape, pitch) & ~inside)
    labels, scores = inside[counted].astype(np.int64), heat[counted].astype(np.float64)
    both = bool(labels.any()) and not labels.all()
    measured = area(labels, np.stack([-scores, scores], 1)) if both else None
    rows, columns, values = _maxima(np.where(counted, heat, 0))
    found = [values[lesion[rows, columns]].max(initial=-np.inf) for lesion in lesions]
    return Localised(measured, np.array(found, np.float64), values[~inside[rows, columns]])


def froc(slides: Sequence[Localised]) -> FROC | None:
    """Make the FROC of slides; None where there is no lesion on any."""
    found = np.concatenate([each.found for each in slides]) if slides else np.zeros(0)
    if not len(found):
        return None
    false = np.sort(np.concatenate([each.false for each in slides]))[::-1]
    hits = np.sort(found[np.isfinite(found)])[::-1]
    thresholds = np.unique(np.concatenate([hits, false]))[::-1]
    shares = np.append(0.0, np.searchsorted(-hits, -thresholds, side="right") / len(found))
    rates = np.append(0.0, np.searchsorted(-false, -thresholds, side="right") / len(slides))
    # The best share that is had at no more than so many false positives.
    at = shares[np.searchsorted(rates, RATES, side="right") - 1]
    return FROC(rates, shares, at, float(at.mean()), len(found), len(slides))


def mean_area(slides: Sequence[Localised], cases: NDArray[np.int64]) -> tuple[float, Interval | None] | None:
    """Mean localisation AUC over slides, with its 95 % interval over cases; None where no slide has one.

    Parameters
    ----------
    slides
        S of them.
    cases
        (S,) numbers of their cases.
    """
    measured = np.array([np.nan if each.area is None else each.area for each in slides])
    there = np.isfinite(measured)
    if not there.any():
        return None
    areas, own = measured[there], cases[there]
    if len(np.unique(own)) < 2:
        return float(areas.mean()), None
    return float(areas.mean()), jackknife_interval(lambda rows: float(areas[rows].mean()), own, "logit")


def _touched(outlines: Sequence[Outline], shape: tuple[int, ...], pitch: float) -> NDArray[np.bool_]:
    """Cells (H, W) that outlines touch: by a point of a fine grid inside them, or by a corner of theirs."""
    rows, columns = shape
    fine = fill(outlines, (rows * _FINER, columns * _FINER), pitch / _FINER)
    touched: NDArray[np.bool_] = np.any(fine.reshape(rows, _FINER, columns, _FINER), axis=(1, 3))
    for outer, _ in outlines:
        x, y = (outer / pitch).astype(np.int64).T
        there = (x >= 0) & (y >= 0) & (x < columns) & (y < rows)
        touched[y[there], x[there]] = True
    return touched


def _maxima(heat: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.int64], Reals]:
    """Rows, columns and values of local maxima; a plateau is one, at its cell that is nearest to its middle."""
    from skimage.measure import label, regionprops
    from skimage.morphology import local_maxima

    tops = label(local_maxima(heat, connectivity=2) & (heat > _LEAST), connectivity=2)
    plateaus = [region.coords for region in regionprops(tops)]
    places = [coords[np.square(coords - coords.mean(0)).sum(1).argmin()] for coords in plateaus]
    rows, columns = np.array(places, np.int64).reshape(-1, 2).T
    return rows, columns, heat[rows, columns].astype(np.float64)
