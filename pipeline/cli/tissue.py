"""``nested-ats tissue``: its options, and what it prints."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.cli.options import AsJson, Out, Slides
from pipeline.cli.output import exit_if_failed, print_outcome, say


def tissue(
    slides: Slides,
    out: Out,
    valid: Annotated[
        bool, typer.Option("--valid", help="Find the recorded area of scenes (all but nodata) instead of tissue.")
    ] = False,
    nodata: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="With --valid: value, from 0 to 1, of pixels never recorded, if untold."),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Saturation above which is tissue; default: Otsu's, per slide.")
    ] = None,
    mpp: Annotated[float, typer.Option(min=0.1, help="Micrometres per pixel of the view that is looked at.")] = 8.0,
    speck: Annotated[
        float, typer.Option(min=0, help="Square millimetres under which what is found is left out.")
    ] = 0.02,
    hole: Annotated[float, typer.Option(min=0, help="Square millimetres under which a hole is filled.")] = 0.02,
    into_pyramids: Annotated[
        bool,
        typer.Option("--into-pyramids", help="Put each mask into its slide's pyramid as well, as an OME-Zarr label."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Find the tissue of slides: outlines for QuPath, areas, a contact sheet, and a manifest to train with."""
    from nested_ats.mask import Prior
    from pipeline.data.discovery import name_slides
    from pipeline.data.tissue import Finding
    from pipeline.tissue import MANIFEST, find_tissue

    finding = Finding(mpp=mpp, threshold=threshold, speck_um2=speck * 1e6, hole_um2=hole * 1e6)
    prior: Prior = "valid" if valid else "tissue"
    done = find_tissue(
        name_slides(slides), out, prior=prior, nodata=nodata, finding=finding, into_pyramids=into_pyramids
    )
    found = [one for one in done if not one.error]
    failures = [(one.entry.slide_id, one.error or one.not_put) for one in done if one.error or one.not_put]
    if as_json:
        slides_of = [{"slide_id": o.entry.slide_id, "share": o.share, "area_mm2": o.area_mm2} for o in found]
        print_outcome(failures, len(done), manifest=str(out / MANIFEST) if found else None, slides=slides_of)
    else:
        for one in found:
            area = "" if one.area_mm2 is None else f", {one.area_mm2:.4g} mm2"
            print(f"{one.entry.slide_id}: {one.share:.1%} of the slide{area}")
    if found:
        say(
            f"look at {out}/contact-1.png; outlines that you change in QuPath count when you train with "
            f"{out / MANIFEST} and model.prior column"
        )
    exit_if_failed(failures, len(done))
