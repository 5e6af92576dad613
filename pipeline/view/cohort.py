"""Which slides a viewer shows, and what belongs to each: its prediction, and the files that are drawn over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.files import file_name
from pipeline.results.heatmap import MAP, OBJECTS, PIXEL_OBJECTS, REGIONS
from pipeline.results.predictions import TABLE, read_about, read_predictions

LAYERS = ("patches", "regions", "annotations", "tissue")  # that are outlines


@dataclass(frozen=True, kw_only=True)
class Case:
    """A slide and what there is to show of it."""

    entry: Entry
    row: Mapping[str, Any] = field(default_factory=dict)  # of a table of predictions
    attention: str = ""  # path of a pyramid
    outlines: Mapping[str, str] = field(default_factory=dict)  # path of a GeoJSON file, for each of `LAYERS`
    find_tissue: bool = False

    @property
    def label(self) -> str:
        """Of the manifest, or of the table of predictions."""
        return self.entry.label or str(self.row.get("label") or "")

    @property
    def prediction(self) -> str:
        """What was predicted, in short; empty where nothing was."""
        return str(self.row.get("prediction") or "")

    @property
    def probabilities(self) -> dict[str, float]:
        """Of each class or label, as predicted."""
        found = {name.removeprefix("prob_"): value for name, value in self.row.items() if name.startswith("prob_")}
        return {name: value for name, value in found.items() if isinstance(value, float) and math.isfinite(value)}


def cases_of(
    entries: Sequence[Entry],
    *,
    predictions: Sequence[Path] = (),
    heatmaps: Sequence[Path] = (),
    annotations: Path | None = None,
    tissue: bool = False,
) -> list[Case]:
    """Collect what there is to show of slides.

    Parameters
    ----------
    entries
        The slides.
    predictions
        Folders that `predict` has written; of a slide that is in several, the first one's row is taken.
    heatmaps
        Folders that `heatmap` has written.
    annotations
        A folder with ``SLIDE.geojson`` for slides, in pixels.
    tissue
        Whether tissue is found where a slide has no mask in its manifest.

    Raises
    ------
    UsageError
        A folder holds nothing of these slides.
    """
    tables = [_rows(folder) for folder in predictions]
    cases = [
        Case(
            entry=entry,
            row=next((row for find in tables if (row := find(entry))), {}),
            attention=_first(folder / file_name(entry.slide_id) / MAP for folder in heatmaps),
            outlines=dict(_outlines(entry, heatmaps, annotations)),
            find_tissue=tissue,
        )
        for entry in entries
    ]
    _check(predictions, any(case.row for case in cases), f"no prediction of {_some(entries)}", "predict")
    _check(heatmaps, any(case.attention for case in cases), f"no heatmap of {_some(entries)}", "heatmap")
    if annotations and not any("annotations" in case.outlines for case in cases):
        name = file_name(entries[0].slide_id)
        raise UsageError(f"{annotations}: no outlines of {_some(entries)} here; name them as in {name}.geojson")
    return cases


def _rows(folder: Path) -> Callable[[Entry], dict[str, Any] | None]:
    """Make the function that finds a slide's row, or that of its case where cases were predicted."""
    by_case = read_about(folder).get("settings", {}).get("unit") == "case"
    rows = {str(row.get("slide_id")): row for row in read_predictions(folder)}
    return lambda entry: rows.get(entry.case_id or entry.slide_id if by_case else entry.slide_id)


def of_run(run: Path) -> tuple[list[Path], list[Path]]:
    """Find folders of predictions and of heatmaps in that of a run.

    Raises
    ------
    UsageError
        There are none.
    """
    folders = [run, *sorted(path for path in run.glob("*") if path.is_dir())]
    predictions = [folder for folder in folders if (folder / f"{TABLE}.parquet").is_file()]
    heatmaps = [folder for folder in folders if next(folder.glob(f"*/{MAP}"), None)]
    if not predictions and not heatmaps:
        raise UsageError(
            f"{run}: no predictions and no heatmaps in it; run nested-ats predict and heatmap with --out {run}/..., "
            "or name their folders by --predictions and --heatmaps"
        )
    return predictions, heatmaps


def _outlines(entry: Entry, heatmaps: Sequence[Path], annotations: Path | None) -> Iterator[tuple[str, str]]:
    """Yield the layers that a slide has, and their files."""
    name = file_name(entry.slide_id)
    places: dict[str, Iterable[Path]] = {
        "patches": (folder / name / each for folder in heatmaps for each in (PIXEL_OBJECTS, OBJECTS)),
        "regions": (folder / name / REGIONS for folder in heatmaps),
        "annotations": [annotations / f"{name}.geojson"] if annotations else (),
    }
    for layer, files in places.items():
        if found := _first(files):
            yield layer, found
    if entry.mask:
        yield "tissue", entry.mask


def _first(places: Iterable[Path]) -> str:
    return next((str(place) for place in places if place.exists()), "")


def _check(folders: Sequence[Path], found: bool, what: str, command: str) -> None:
    if folders and not found:
        raise UsageError(f"{folders[0]}: {what} here; give the --out of nested-ats {command}")


def _some(entries: Sequence[Entry]) -> str:
    return entries[0].slide_id + (f" and {len(entries) - 1} others" if len(entries) > 1 else "")
