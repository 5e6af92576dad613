"""``nested-ats heatmap``: its options, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import (
    Device,
    Draws,
    Out,
    Run,
    Samples,
    Slides,
    Split,
    TrustEncoder,
    check_cluster,
    chosen_slides,
    numbers,
)
from pipeline.cli.output import end


def heatmap(
    run: Run,
    slides: Slides,
    out: Out,
    split: Split = None,
    draws: Draws = None,
    samples: Samples = "",
    trust_encoder: TrustEncoder = False,
    device: Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many slides only.")] = None,
) -> None:
    """Show where the model looks: OME-Zarr attention map, picture, and patches as GeoJSON."""
    from pipeline.results.heatmap import PICTURE, heatmaps
    from pipeline.results.settings import prediction_settings

    check_cluster("none", 1, device)
    settings = prediction_settings(
        run, draws=draws, samples=numbers(samples), trust_encoder=trust_encoder, device=device
    )
    done = heatmaps(chosen_slides(slides, split, run)[:limit], settings, out)
    for one in done:
        if not one.error:
            print(f"{one.folder / PICTURE}  {one.prediction}, attention up to {one.peak:.4g} times uniform")
    end([(one.slide_id, one.error) for one in done if one.error], len(done))
