"""``nested-ats view``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.output import say


def view(
    slides: Annotated[
        list[str], typer.Argument(help="A manifest, or slides and folders of slides by path, pattern or URL.")
    ],
    run: Annotated[
        Path | None, typer.Option(help="Folder of a run: predictions and heatmaps in it are shown.")
    ] = None,
    predictions: Annotated[Path | None, typer.Option(help="Folder that nested-ats predict wrote.")] = None,
    heatmaps: Annotated[Path | None, typer.Option(help="Folder that nested-ats heatmap wrote.")] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="Folder with SLIDE.geojson, as QuPath exports it, for slides.")
    ] = None,
    tissue: Annotated[
        bool, typer.Option("--tissue", help="Find and outline the tissue of the slides shown.")
    ] = False,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine; 0: any that is free.")] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open a browser, where there is one.")
    ] = True,
) -> None:
    """Show slides in a browser, at any zoom, with attention, patches, outlines, labels and predictions."""
    from pipeline.data.crs import needed
    from pipeline.data.discovery import find_slides

    for package in ("starlette", "uvicorn"):
        needed(package, "nested-ats view", extra="view")
    from pipeline.view.browser import open_browser
    from pipeline.view.cohort import cases_of, of_run
    from pipeline.view.serving import Serving

    own_predictions, own_heatmaps = of_run(run) if run else ([], [])
    cases = cases_of(
        find_slides(slides),
        predictions=[predictions] if predictions else own_predictions,
        heatmaps=[heatmaps] if heatmaps else own_heatmaps,
        annotations=annotations,
        tissue=tissue,
    )
    with Serving(cases, port=port) as serving:
        print(serving.url, flush=True)
        say(f"{len(cases)} slides; the address works on this machine alone, until Ctrl-C ends this command")
        try:
            if browser:
                open_browser(serving.url)
            serving.wait()
        except KeyboardInterrupt:
            say("ended")
