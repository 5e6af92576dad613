"""``nested-ats split``: its options, and what it prints."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.options import AsJson, Overwrite, Seed
from pipeline.cli.output import print_outcome, say, say_next
from pipeline.cli.tables import Tables, labelled_slides, warn, with_tables

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Sequence

    from pipeline.data.manifest import Entry

_GRADES = 20  # numbers of at most so many values are grades


@with_tables
def split(
    manifest: Annotated[Path, typer.Argument(help="CSV, Parquet or Excel: slide_id, path, label, ...")],
    out: Annotated[Path, typer.Option("--out", help="Manifest to write, a CSV.")],
    tables: Tables,
    folds: Annotated[
        int | None, typer.Option(min=2, help="Deal the slides that are not for the test out to so many folds.")
    ] = None,
    validation: Annotated[float, typer.Option(min=0, max=1, help="Share of cases to validate on.")] = 0.0,
    test: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of cases to test on; default: 0.2, with --folds 0.")
    ] = None,
    group: Annotated[
        str, typer.Option(help="Column whose slides stay together; those of a case always do.")
    ] = "case_id",
    stratify: Annotated[
        str, typer.Option(help="Column whose values are spread evenly, or several with commas between.")
    ] = "label",
    site: Annotated[
        str | None, typer.Option(help="Column of sites (centres, scanners), each of which goes to one fold whole.")
    ] = None,
    spatial_block: Annotated[
        float | None,
        typer.Option(min=0.001, max=10_000, help="Keep scenes of one block of so many kilometres a side together."),
    ] = None,
    duplicates: Annotated[
        bool, typer.Option(help="Open the slides to find those of the same pixels, and keep them together.")
    ] = True,
    seed: Seed = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a manifest with columns split and fold, drawn by case and label; without --folds as train draws them.

    Where the manifest has splits, --folds keeps its test and deals out its training slides.
    """
    from pipeline.data.folds import assign_folds
    from pipeline.data.groups import join_groups
    from pipeline.data.manifest import write_manifest
    from pipeline.data.splits import assign_splits
    from pipeline.errors import UsageError

    if out.suffix.lower() != ".csv":
        raise UsageError(f"{out}: a manifest is written as CSV; name it .csv")
    if out.exists() and not overwrite:
        raise UsageError(f"{out}: is there already; give another --out, or --overwrite to replace it")
    share = test if test is not None else 0.0 if folds else 0.2
    if validation + share >= 1:
        raise UsageError(f"--validation {validation:g} --test {share:g}: together they leave nothing to train on")
    if folds and validation:
        raise UsageError("--folds and --validation: train takes the validation of a fold (see data.validation)")
    entries = labelled_slides(manifest, tables)
    if any(entry.fold for entry in entries) or (any(entry.split for entry in entries) and (test or not folds)):
        raise UsageError(f"{manifest}: has splits or folds already; take these columns out to draw others")
    groups = _groups(entries, group, site, spatial_block, duplicates=duplicates)
    joined = None if groups == join_groups(entries) else groups  # cases alone are drawn as train draws them
    strata = _strata(entries, stratify)
    chosen = assign_splits(entries, validation=validation, test=share, seed=seed, groups=joined, strata=strata)
    if folds:
        chosen = assign_folds(chosen, folds, seed=seed, groups=joined, strata=strata)
    write_manifest(out, chosen)
    counted = [replace(entry, label=strata[entry.slide_id]) for entry in chosen]
    if as_json:
        print_outcome([], len(chosen), manifest=str(out), **_counts(counted))
        return
    _print_counts(counted)
    if spatial_block is not None:
        print(f"{len(set(groups.values()))} groups of blocks of {spatial_block:g} km")
    print(out)
    say_next("train", "--manifest", out, "--out", "runs/first", *(["--folds", "all"] if folds else []))


def _groups(
    entries: Sequence[Entry], group: str, site: str | None, spatial_block: float | None, *, duplicates: bool
) -> dict[str, str]:
    """Join the slides that must stay together."""
    from pipeline.data.blocks import spatial_groups
    from pipeline.data.duplicates import find_identities
    from pipeline.data.groups import join_groups

    shared = [_column(entries, name) for name in (group, site) if name is not None]
    if spatial_block is not None:
        shared.append(spatial_groups(entries, spatial_block))
    if duplicates:
        identities = find_identities(entries)
        _tell_copies(entries, identities)
        shared.append(identities)
    return join_groups(entries, *shared)


def _tell_copies(entries: Sequence[Entry], identities: dict[str, str]) -> None:
    """Say which slides have the same pixels, and how many were not looked at."""
    from pipeline.data.duplicates import copy_remarks, name_copies

    unknown = len(entries) - len(identities)
    if unknown:
        say(f"{unknown} of {len(entries)} slides cannot be opened: whether they are copies is not known")
    warn([*name_copies(entries, identities), *copy_remarks(entries, identities)])


def _column(entries: Sequence[Entry], name: str) -> dict[str, str]:
    """Return the cells of a column by slide id."""
    from pipeline.data.manifest import COLUMNS
    from pipeline.errors import UsageError

    if name in COLUMNS:
        return {entry.slide_id: str(getattr(entry, name) or "") for entry in entries}
    if not any(name in entry.extra for entry in entries):
        there = ", ".join(dict.fromkeys(column for entry in entries for column in entry.extra)) or "none"
        raise UsageError(f"column {name}: neither the manifest nor --labels has it; further columns: {there}")
    return {entry.slide_id: entry.extra.get(name, "") for entry in entries}


def _strata(entries: Sequence[Entry], stratify: str) -> dict[str, str]:
    """Name the stratum of each slide; of numbers these are quarters."""
    from pipeline.errors import UsageError

    columns = [_in_quarters(_column(entries, name.strip())) for name in stratify.split(",")]
    if not any(any(column.values()) for column in columns):
        raise UsageError(f"--stratify {stratify}: empty for all slides; name another column, as in --stratify event")
    return {entry.slide_id: " / ".join(column[entry.slide_id] for column in columns) for entry in entries}


def _in_quarters(column: dict[str, str]) -> dict[str, str]:
    """Put numbers of many values into four groups of about equal size; other cells stay as they are."""
    from statistics import quantiles

    try:
        numbers = {slide_id: float(cell) for slide_id, cell in column.items()}
    except ValueError:
        return column
    if len(set(numbers.values())) <= _GRADES:
        return column
    edges = quantiles(numbers.values(), n=4)
    return {slide_id: f"quarter {sum(value > edge for edge in edges) + 1}" for slide_id, value in numbers.items()}


def _counts(entries: Sequence[Entry]) -> dict[str, Any]:
    """Count slides by split, fold and stratum, as plain values."""
    from pipeline.data.folds import count_folds, fold_gaps
    from pipeline.data.splits import count_splits

    found: dict[str, Any] = {"splits": {name: dict(counts) for name, counts in count_splits(entries).items()}}
    if folds := count_folds(entries):
        found["folds"] = {name: dict(counts) for name, counts in folds.items()}
        found["folds_differ_by"] = fold_gaps(entries)
    return found


def _print_counts(entries: Sequence[Entry]) -> None:
    """Print a table of slides and cases by split, fold and stratum, and how far apart folds are."""
    from pipeline.data.folds import count_folds, fold_gaps, fold_names
    from pipeline.data.splits import count_splits

    for name, counts in count_splits(entries).items():
        _print_row(name, counts, [entry for entry in entries if entry.split == name])
    folds = count_folds(entries)
    for name, counts in folds.items():
        _print_row(f"fold {name}", counts, [entry for entry in entries if entry.fold == name])
    if not folds:
        return
    gaps = fold_gaps(entries)
    print("folds differ by at most: " + ", ".join(f"{gap} cases of {label}" for label, gap in gaps.items()))
    for label in gaps:
        bare = [name for name in fold_names(entries) if not folds[name][label]]
        if bare:
            warn([f"no slide of {label} in fold {', '.join(bare)}: ask for fewer folds, or join classes"])


def _print_row(name: str, counts: Counter[str], entries: Sequence[Entry]) -> None:
    from pipeline.data.groups import case_of

    cases = len({case_of(entry) for entry in entries})
    of_cases = "" if cases == len(entries) else f" of {cases} cases"
    labels = ", ".join(f"{count} {label}" for label, count in sorted(counts.items()))
    print(f"{name}: {counts.total()} slides{of_cases} ({labels})")
