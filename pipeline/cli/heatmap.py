"""``nested-ats heatmap``: its options, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed, say


def heatmap(
    run: options.Run,
    slides: options.Slides,
    out: options.Out,
    split: options.Split = None,
    draws: options.Draws = None,
    samples: options.Samples = "",
    trust_encoder: options.TrustEncoder = False,
    device: options.Device = "auto",
    geotiff: Annotated[
        bool, typer.Option("--geotiff", help="Write attention as a GeoTIFF in the CRS of the scene too (extra geo).")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Draw only so many slides, the first ones.")] = None,
) -> None:
    """Show where the model looks: OME-Zarr attention map, picture, and patches as GeoJSON."""
    from pipeline.results.heatmap import PICTURE, heatmaps
    from pipeline.results.settings import prediction_settings

    options.check_cluster("none", 1, device)
    settings = prediction_settings(
        run, draws=draws, samples=options.sample_counts(samples), trust_encoder=trust_encoder, device=device
    )
    done = heatmaps(options.chosen_slides(slides, split, run)[:limit], settings, out, geotiff=geotiff)
    for one in done:
        if not one.error:
            print(f"{one.folder / PICTURE}  {one.prediction}, attention up to {one.peak:.4g} times uniform")
    for remark in dict.fromkeys(one.remark for one in done if one.remark):
        say(f"note: {remark}")
    exit_if_failed([(one.slide_id, one.error) for one in done if one.error], len(done))
