"""``nested-ats features``: its options, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from pipeline.cli import options
from pipeline.cli.output import exit_if_failed


def features(
    slides: options.Slides,
    config: Annotated[Path | None, typer.Option(help="YAML, as train takes it; model.trainable is none.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Override, as in model.mpp=0.5.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for files of features too, one a slide.")] = None,
    layout: Annotated[
        Literal["trident", "clam"],
        typer.Option("--format", help="Layout of these files: h5, or h5_files and pt_files."),
    ] = "trident",
    given: Annotated[
        Path | None,
        typer.Option(
            "--from", help="Folder of h5 files by TRIDENT or CLAM to take features from, instead of encoding."
        ),
    ] = None,
    cluster: options.Cluster = "none",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    device: options.Device = "auto",
    slide_timeout: options.SlideTimeout = 3600.0,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Encode every patch that a model with a frozen encoder may look at; run again, it goes on where it was.

    Training, predict and heatmap with this configuration then read no patch.
    """
    from pipeline.config import load_config
    from pipeline.data.discovery import name_slides
    from pipeline.results.extract import Plan, extract

    options.check_cluster(cluster, workers, device)
    chosen = load_config(config, settings)
    plan = Plan(config=chosen, out=out, layout=layout, device=device, overwrite=overwrite, given=given)
    done = extract(name_slides(slides), plan, address=cluster, workers=workers, timeout_s=slide_timeout)
    if as_json:
        print(json.dumps([asdict(one) for one in done], indent=2))
    else:
        sound = [one for one in done if not one.error]
        patches, encoded, missing = (
            sum(getattr(one, name) for one in sound) for name in ("patches", "encoded", "missing")
        )
        rest = f"{encoded} of them encoded now" if given is None else f"{missing} of them not in the files"
        print(f"{len(sound)} slides, {patches} patches, {rest}")
        if out is not None:
            print(out)
    exit_if_failed([(one.slide_id, one.error) for one in done if one.error], len(done))
