"""``nested-ats validate``: its options, and what it prints."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from pipeline.cli.options import AsJson
from pipeline.cli.output import exit_if_failed, print_all


def validate(
    pyramids: Annotated[
        list[str], typer.Argument(help="Pyramids by path or URL, folders of them, 'patterns', or a manifest.")
    ],
    full: Annotated[
        bool, typer.Option("--full", help="Decode every chunk, and compare each level with the next coarser one.")
    ] = False,
    source: Annotated[
        str | None, typer.Option(help="Image that the pyramid was made from, to compare with; implies --full.")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Folder or manifest of such images, found by slide name; implies --full.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads; default: one for each processor.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say which pyramids are sound, and what is wrong with the others and where; --full does more than checksums."""
    from pipeline.errors import UsageError
    from pipeline.validate import find_pyramids, find_sources, validate_all

    entries = find_pyramids(pyramids)
    if source is not None and (sources is not None or len(entries) > 1):
        raise UsageError("--source is for one pyramid; for several give --sources, a folder or manifest of images")
    images = None if sources is None else find_sources(sources)
    if source is not None:
        images = {entries[0].slide_id: source}
    found = validate_all(entries, sources=images, full=full, workers=workers)
    if as_json:
        print_all([{"sound": one.sound, **asdict(one)} for one in found])
    else:
        print_all([line for one in found for line in one.lines()])
    exit_if_failed([(one.entry.slide_id, one.error or one.verdict) for one in found if not one.sound], len(found))
