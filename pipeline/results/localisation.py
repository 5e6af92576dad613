"""What the report says of how well attention finds what somebody has outlined (`pipeline.results.localise`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np

from pipeline.errors import UsageError
from pipeline.results.intervals import case_numbers
from pipeline.results.localise import RATES, Annotation, Localised, froc, localise, mean_area, read_annotation
from pipeline.results.map_files import MAP
from pipeline.results.page import table, text
from pipeline.results.plots import free_response
from storage import Slide


class Compared(NamedTuple):
    """A slide whose attention was compared with outlines."""

    slide_id: str
    sample: str
    found: Localised
    page: str  # of the slide, from the report's folder


def compare(folder: Path, look: Mapping[str, Any], annotations: Path | None) -> tuple[Annotation, Localised] | None:
    """Compare the attention of a slide's heatmap with its outlines; None where it has none.

    Raises
    ------
    UsageError
        The heatmap has no map.
    DataError
        The outlines are not those of the slide.
    """
    annotation = annotations and read_annotation(annotations, str(look["slide_id"]), tuple(look["shape"]))
    if not annotation:
        return None
    if not (folder / MAP).exists():
        raise UsageError(f"{folder / MAP}: is gone; run nested-ats heatmap again, with omezarr among --format")
    with Slide(folder / MAP) as slide:
        heat = slide.read(0, (0, 0, *slide.shape_yx))[0]
    return annotation, localise(heat, look["attention_xy"][0] / heat.shape[1], annotation)


def localisation(compared: Sequence[Compared], case_of: Mapping[str, str]) -> str:
    """Write the section: localisation AUC and FROC of the cohort, and a table of slides.

    Parameters
    ----------
    compared
        The slides.
    case_of
        The case of each sample, where it has one.
    """
    cases = case_numbers((case_of.get(each.sample, ""), each.sample) for each in compared)
    found = [each.found for each in compared]
    rows = [("slides with outlines", str(len(compared)))]
    if measured := mean_area(found, cases):
        value, interval = measured
        limits = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        rows.append(("localisation AUC, mean over slides", f"{value:.3f}{limits}"))
    plot = ""
    if curve := froc(found):
        rows.append(("outlined regions (lesions)", str(curve.lesions)))
        pairs = zip(RATES, curve.at, strict=True)
        rows += [(f"found at {rate:g} false positives a slide", f"{share:.3f}") for rate, share in pairs]
        rows.append(("FROC score, their mean", f"{curve.score:.3f}"))
        plot = f"<div class=plots>{free_response(curve.rates, curve.sensitivities)}</div>"
    said = (
        "<p class=soft>Localisation AUC is the chance that a cell inside an outline has more attention than one "
        "outside, where the model could draw; in brackets the 95 % interval over cases. FROC as in CAMELYON16: "
        "detections are the local maxima of attention above chance.</p>"
    )
    return f"<h2>Localisation</h2>{table(['', 'value'], rows)}{plot}{said}{_each(compared)}"


def _each(compared: Sequence[Compared]) -> str:
    lines = []
    for each in sorted(compared, key=lambda one: 1.0 if one.found.area is None else one.found.area):
        area, lesions = each.found.area, each.found.found
        cells = [
            f'<a href="{quote(each.page)}">{text(each.slide_id)}</a>',
            "" if area is None else f"{area:.3f}",
            f"{int(np.isfinite(lesions).sum())} of {len(lesions)}",
            str(len(each.found.false)),
        ]
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th scope=col>{name}</th>" for name in ("slide", "AUC", "regions found", "maxima outside"))
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
