"""``nested-ats convert``: its options, and what it prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pipeline.cli.options import AsJson, Cluster, FailFast, Overwrite
from pipeline.cli.output import exit_if_failed, print_all, say_next

if TYPE_CHECKING:
    from pipeline.data.manifest import Entry
    from storage import ConvertOptions

Sources = Annotated[
    list[str],
    typer.Argument(
        help="Images (TIFF, SVS, PNG, JPEG, BMP) by path or URL, folders, 'patterns/**/*.tif', or a manifest."
    ),
]
Target = Annotated[str, typer.Option("--out", help="Folder or s3://, gs:// URL to write to.")]
Manifest = Annotated[
    Path | None,
    typer.Option(help="Manifest to write or add to; default: OUT/manifest.csv, for a URL ./manifest.csv."),
]
Codec = Annotated[str, typer.Option(help="lz4 reads fastest, zstd is smaller.")]
Chunk = Annotated[int, typer.Option(help="Side in pixels of what is read at once.")]
Shard = Annotated[int, typer.Option(help="Side in pixels of a file, a multiple of --chunk.")]
NameBy = Annotated[
    str, typer.Option(help="Slide ids: name, of the file; path, below the folder given, as in site/007.svs.")
]
Mpp = Annotated[float | None, typer.Option(min=0, help="Micrometres per pixel, over what files say.")]
MinLevelSize = Annotated[int, typer.Option(min=1, help="Levels go on down to this longer side, in pixels.")]
AllowSparse = Annotated[bool, typer.Option("--allow-sparse", help="Read TIFF tiles that are not stored as zeros.")]
Page = Annotated[
    str,
    typer.Option(
        "--page",
        "--pages",
        help="Page of TIFFs that have several, from 0; channels: each is a channel of one; slides: each is a slide.",
    ),
]
Executor = Annotated[str, typer.Option(help="threads, processes, or the tcp://HOST:PORT of a Dask scheduler.")]
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Threads, processes or Ray workers; default: one a processor, and one thread more."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Look at the images, say what would be made, stop.")]


def convert(
    sources: Sources,
    out: Target,
    manifest: Manifest = None,
    codec: Codec = "lz4",
    chunk: Chunk = 128,
    shard: Shard = 2048,
    name_by: NameBy = "name",
    mpp: Mpp = None,
    min_level_size: MinLevelSize = 64,
    page: Page = "",
    allow_sparse: AllowSparse = False,
    executor: Executor = "threads",
    cluster: Cluster = "none",
    workers: Workers = None,
    overwrite: Overwrite = False,
    fail_fast: FailFast = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Turn images into OME-Zarr pyramids and write a manifest of them; run again, it goes on where it was."""
    from pipeline.convert import convert_all, known_slides, manifest_path, summary
    from pipeline.data.discovery import find_images
    from pipeline.data.pages import page_slides
    from pipeline.errors import UsageError
    from storage import ConvertOptions

    _check_executor(executor, cluster)
    try:
        options = ConvertOptions(
            codec=codec,
            chunk=chunk,
            shard=shard,
            min_level_size=min_level_size,
            mpp=mpp,
            pages=None if page == "slides" else _pages(page),
            allow_sparse=allow_sparse,
        )
    except ValueError as error:
        raise UsageError(str(error)) from error
    entries = find_images(sources, name_by=name_by, known=known_slides(out, manifest))
    entries = list(page_slides(entries)) if page == "slides" else entries
    if dry_run:
        _plan(entries, out, options, as_json=as_json)
        return
    conversions = convert_all(
        entries,
        out,
        options=options,
        manifest=manifest,
        executor=executor,
        address=cluster,
        workers=workers,
        overwrite=overwrite,
        fail_fast=fail_fast,
    )
    failures = [(one.entry.slide_id, one.error) for one in conversions if one.error]
    listed = [manifest or manifest_path(out)] if len(failures) < len(conversions) else []
    print_all([asdict(one) for one in conversions] if as_json else [summary(conversions), *listed])
    exit_if_failed(failures, len(conversions))
    say_next("init", "PRESET", "--manifest", *listed)


def _pages(text: str) -> int | Literal["channels"] | None:
    from pipeline.errors import UsageError

    if text == "channels":
        return "channels"
    if text and not text.isdecimal():
        raise UsageError(f"--page {text}: give the number of a page, from 0, channels, or slides")
    return int(text) if text else None


def _check_executor(executor: str, cluster: str) -> None:
    from pipeline.errors import UsageError
    from storage.conversion.executors import check_executor

    if cluster != "none" and executor != "threads":
        raise UsageError(f"--cluster {cluster} and --executor {executor}: give one of them")
    try:
        check_executor(executor)
    except ValueError:
        raise UsageError(f"--executor {executor}: choose threads, processes or tcp://HOST:PORT") from None


def _plan(entries: Sequence[Entry], out: str, options: ConvertOptions, *, as_json: bool) -> None:
    from pipeline.convert import plan_all

    plans = plan_all(entries, out, options=options)
    print_all([asdict(plan) for plan in plans] if as_json else [plan.text for plan in plans if not plan.error])
    exit_if_failed([(plan.entry.slide_id, plan.error) for plan in plans if plan.error], len(plans))
