"""``nested-ats split``: its options, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import Overwrite, Seed


def split(
    manifest: Annotated[Path, typer.Argument(help="CSV or Parquet: slide_id, path, label, ...")],
    out: Annotated[Path, typer.Option("--out", help="Manifest to write, a CSV.")],
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share of cases to validate on.")] = 0.0,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of cases to test on.")] = 0.2,
    spatial_block: Annotated[
        float | None,
        typer.Option(min=0.001, max=10_000, help="Keep scenes of one block of so many kilometres a side together."),
    ] = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write a manifest with a column split, drawn by case and label as train draws it, or by blocks of the Earth."""
    from pipeline.data.blocks import spatial_groups
    from pipeline.data.manifest import read_manifest, write_manifest
    from pipeline.data.splits import assign_splits, count_splits
    from pipeline.errors import UsageError

    entries = read_manifest(manifest, labelled=True)
    if any(entry.split for entry in entries):
        raise UsageError(f"{manifest}: has splits already; take its column split out to draw others")
    if validation + test >= 1:
        raise UsageError(f"--validation {validation:g} --test {test:g}: together they leave nothing to train on")
    if out.suffix.lower() != ".csv":
        raise UsageError(f"{out}: a manifest is written as CSV; name it .csv")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: is there already; give another --out, or --overwrite to replace it")
    groups = None if spatial_block is None else spatial_groups(entries, spatial_block)
    chosen = assign_splits(entries, validation=validation, test=test, seed=seed, groups=groups)
    write_manifest(out, chosen)
    for name, counts in count_splits(chosen).items():
        print(f"{name}: {counts.total()} slides ({', '.join(f'{n} {label}' for label, n in sorted(counts.items()))})")
    if groups is not None:
        print(f"{len(set(groups.values()))} groups of blocks of {spatial_block:g} km")
    print(out)
