"""Which slides a viewer shows, and what belongs to each: its prediction, and the files that are drawn over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.files import file_name
from pipeline.results.map_files import MAP, OBJECTS, PIXEL_OBJECTS, REGIONS, pyramid
from pipeline.results.predictions import read_about, read_predictions
from pipeline.results.table import TABLE

LAYERS = ("patches", "regions", "annotations", "tissue")  # that are outlines


@dataclass(frozen=True, kw_only=True)
class Case:
    """A slide and what there is to show of it."""

    entry: Entry
    row: Mapping[str, Any] = field(default_factory=dict)  # of a table of predictions
    attention: str = ""  # path of a pyramid
    contribution: str = ""  # likewise
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
    cases = []
    for entry in entries:
        name = file_name(entry.slide_id)
        row = next((row for find in tables if (row := find(entry))), {})
        outlines = next((found for folder in heatmaps if (found := drawn_in(folder / name))), {})
        maps = {name: outlines.pop(name, "") for name in ("attention", "contribution")}
        if annotations and (annotations / f"{name}.geojson").exists():
            outlines["annotations"] = str(annotations / f"{name}.geojson")
        if entry.mask:
            outlines["tissue"] = entry.mask
        cases.append(Case(entry=entry, row=row, outlines=outlines, find_tissue=tissue, **maps))
    _check(predictions, any(case.row for case in cases), f"no prediction of {_some(entries)}", "predict")
    _check(heatmaps, any(case.attention for case in cases), f"no heatmap of {_some(entries)}", "heatmap")
    if annotations and not any("annotations" in case.outlines for case in cases):
        name = file_name(entries[0].slide_id)
        raise UsageError(f"{annotations}: no outlines of {_some(entries)} here; name them as in {name}.geojson")
    return cases


def _rows(folder: Path) -> Callable[[Entry], Mapping[str, Any] | None]:
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


def drawn_in(folder: Path) -> dict[str, str]:
    """Paths of what `heatmap` has written of a slide: of maps, ``patches`` and ``regions`` by name."""
    names = {
        "attention": [MAP],
        "contribution": [pyramid("contribution")],
        "patches": [PIXEL_OBJECTS, OBJECTS],
        "regions": [REGIONS],
    }
    if not (folder / MAP).exists():
        return {}
    there = {
        layer: [str(folder / name) for name in some if (folder / name).exists()] for layer, some in names.items()
    }
    return {layer: places[0] for layer, places in there.items() if places}


def _check(folders: Sequence[Path], found: bool, what: str, command: str) -> None:
    if folders and not found:
        raise UsageError(f"{folders[0]}: {what} here; give the --out of nested-ats {command}")


def _some(entries: Sequence[Entry]) -> str:
    return entries[0].slide_id + (f" and {len(entries) - 1} others" if len(entries) > 1 else "")
