"""``nested-ats stats``: its options, and what it prints."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.options import AsJson, FailFast, named_channels
from pipeline.cli.output import exit_if_failed, say

if TYPE_CHECKING:
    from pipeline.stats import Stats


def stats(
    slides: Annotated[list[str], typer.Argument(help="A manifest, or images or pyramids by path or URL.")],
    split: Annotated[str, typer.Option(help="Slides of this split count: train, val or test.")] = "train",
    channels: Annotated[
        str, typer.Option(help="Channels by name or number from 0, as in B04,B03,B02 (data.channels); default: all.")
    ] = "",
    out: Annotated[Path | None, typer.Option("--out", help="JSON file to write too.")] = None,
    fail_fast: FailFast = False,
    as_json: AsJson = False,
) -> None:
    """Measure mean, spread and percentiles of each channel over the training slides, for model.mean and model.std.

    Pixels are on the scale of the model, where the largest of integers is 1, and those without data do not count.
    Of each slide the finest level of at most 4 million pixels of 3 channels is read.
    """
    from pipeline.data.discovery import name_slides
    from pipeline.files import make_folder, write_json
    from pipeline.stats import measure

    entries = name_slides(slides)
    if not any(entry.split for entry in entries):
        say("the slides have no split: all of them count")
    found = measure(entries, split=split, channels=named_channels(channels) or None, fail_fast=fail_fast)
    plain = asdict(found) | {"failures": dict(found.failures)}
    if out is not None:
        make_folder(out.parent)
        write_json(out, plain)
    if as_json:
        print(json.dumps(plain, indent=2))
    else:
        _print_table(found)
    exit_if_failed(found.failures, len(found.downsamples) + len(found.failures))


def _print_table(found: Stats) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    headers = ["channel", *(f"{p} %" for p in found.channels[0].percentiles), "mean", "std", "pixels"]
    table = Table(*(Column(header, no_wrap=True) for header in headers), box=None)
    for channel in found.channels:
        numbers = [*channel.percentiles.values(), channel.mean, channel.std]
        table.add_row(channel.name, *(f"{number:.4g}" for number in numbers), f"{channel.pixels:,}")
    Console().print(table)
    steps = sorted(set(found.downsamples.values()))
    levels = f"{steps[0]:g}" if len(steps) == 1 else f"{steps[0]:g} to {steps[-1]:g}"
    print(f"{len(found.downsamples)} slides, read at downsample {levels}; for the configuration:")
    for line in found.lines:
        print(line)
