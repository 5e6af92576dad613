"""``nested-ats heatmap``: its options, and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed, print_outcome, say


def heatmap(
    run: options.Run,
    slides: options.Slides,
    out: options.Out,
    split: options.Split = None,
    last: options.Last = False,
    draws: options.Draws = None,
    samples: options.Samples = "",
    trust_encoder: options.TrustEncoder = False,
    device: options.Device = "auto",
    formats: Annotated[
        str,
        typer.Option("--format", help="What to write: png, geojson, omezarr, and geotiff (scenes; extra geo)."),
    ] = "png,geojson,omezarr",
    dense: Annotated[
        bool,
        typer.Option("--dense", help="Open every region and encode every patch: whole maps, as dear as all patches."),
    ] = False,
    answer: Annotated[
        str,
        typer.Option(help="Class, label or time that contributions are told of; default: each slide's likeliest."),
    ] = "",
    limit: Annotated[int | None, typer.Option(min=1, help="Draw only so many slides, the first ones.")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show where the model looks, and what each patch adds to the answer: maps, picture, and patches as GeoJSON."""
    from pipeline.results.heatmap import heatmaps
    from pipeline.results.map_files import PICTURE, read_formats
    from pipeline.results.settings import prediction_settings

    options.check_cluster("none", 1, device)
    settings = prediction_settings(
        run,
        last=last,
        draws=draws,
        samples=options.sample_counts(samples),
        trust_encoder=trust_encoder,
        device=device,
    )
    entries, wanted = options.chosen_slides(slides, split, run)[:limit], read_formats(formats)
    done = heatmaps(entries, settings, out, formats=wanted, dense=dense, answer=answer)
    failures = [(one.slide_id, one.error) for one in done if one.error]
    if as_json:
        told = [asdict(one) | {"folder": str(one.folder)} for one in done if not one.error]
        print_outcome(failures, len(done), slides=told)
    for one in done:
        if not one.error and not as_json:
            place = one.folder / PICTURE if "png" in wanted else one.folder
            print(f"{place}  {one.prediction}, attention up to {one.peak:.4g} times uniform")
    for remark in dict.fromkeys(one.remark for one in done if one.remark):
        say(f"note: {remark}")
    exit_if_failed(failures, len(done))
