"""``nested-ats synth``: data sets to try things on."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from pipeline.cli.options import AsJson, Out, Seed
from pipeline.cli.output import print_place

synth = typer.Typer(help="Make a data set to try things on, offline.", no_args_is_help=True)


@synth.command("signs")
def synth_signs(
    out: Out,
    count: Annotated[int, typer.Option(min=1, help="Scenes.")] = 700,
    size: Annotated[int, typer.Option(min=64, help="Side of a scene in pixels.")] = 1024,
    signs: Annotated[int, typer.Option(min=1, help="Sign discs in each scene.")] = 3,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of test scenes.")] = 0.2,
    label: Annotated[str, typer.Option(help="Give every scene this label: none, 50, 70 or 80.")] = "",
    compression: Annotated[
        Literal["deflate", "jpeg", "lzw", "zstd", "none"], typer.Option(help="Compression of the TIFFs.")
    ] = "deflate",
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Write textured scenes with small number signs; the label is the number, as with the paper's speed limits."""
    from pipeline.data.sets import write_signs
    from pipeline.data.signs import LABELS
    from pipeline.progress import progress

    with progress("synth", "images") as update:
        manifest = write_signs(
            out,
            count=count,
            size=size,
            seed=seed,
            signs=signs,
            splits=(1 - test, 0.0, test),
            labels=[label] if label else LABELS,
            compression=None if compression == "none" else compression,
            progress=lambda done, total: update(done, total, ""),
        )
    print_place("manifest", manifest, as_json=as_json)
