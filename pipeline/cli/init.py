"""``nested-ats init``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import AsJson, Overwrite, named_channels
from pipeline.cli.output import exit_if_failed, print_outcome, say, say_next


def init(
    preset: Annotated[str, typer.Argument(help="histology, scenes, megapixel or features.")],
    out: Annotated[Path, typer.Option("--out", help="YAML file to write.")] = Path("config.yaml"),
    manifest: Annotated[
        Path | None, typer.Option(help="Table of the slides, to which scale, levels and channels are fitted.")
    ] = None,
    encoder: Annotated[
        str | None,
        typer.Option(help="Published encoder of histology (see info uni); default: one that is on this machine."),
    ] = None,
    channels: Annotated[
        str, typer.Option(help="Channels of scenes to see, as in B04,B03,B02; their mean and spread are measured.")
    ] = "",
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration to begin with, made for the slides of a manifest."""
    from pipeline.config import load_config
    from pipeline.data.manifest import read_manifest
    from pipeline.errors import UsageError
    from pipeline.files import write_atomic
    from pipeline.presets import write_preset

    if out.exists() and not overwrite:
        raise UsageError(f"{out}: is there already; give --overwrite to replace it, or another --out")
    entries = read_manifest(manifest) if manifest else []
    text, slides = write_preset(preset, entries, encoder, str(manifest), named_channels(channels))
    write_atomic(out, text)
    load_config(out)  # what we write is a configuration
    say(f"{out} is written")
    say_next("train", "--manifest", manifest or "labels.csv", "--out", "runs/first", "--config", out)
    failures = slides.failures if slides else ()
    if as_json:
        print_outcome(failures, len(entries), config=str(out))
    exit_if_failed(failures, len(entries))
