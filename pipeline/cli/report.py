"""``nested-ats report``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, Run
from pipeline.cli.output import print_place


def report(
    run: Run,
    predictions: Annotated[Path, typer.Argument(help="Folder of predictions that were evaluated.")],
    out: Annotated[Path, typer.Option("--out", help="HTML file to write.")],
    heatmaps: Annotated[Path | None, typer.Option(help="Folder that heatmap wrote.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Folder with SLIDE.geojson, as QuPath exports it: does attention find it?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one self-contained HTML page: training, results, slides and heatmaps."""
    from pipeline.results.report import report as write

    page = write(run, predictions, out, heatmaps=heatmaps, annotations=annotations)
    print_place("report", page, as_json=as_json)
