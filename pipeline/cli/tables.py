"""Options of commands that take labels from tables beside the manifest, and what is made of their values."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.cli.output import say

if TYPE_CHECKING:
    from pipeline.data.manifest import Entry

Labels = Annotated[
    Path | None, typer.Option("--labels", help="Table to take labels from: CSV, Parquet or Excel (extra tables).")
]
Target = Annotated[
    str | None,
    typer.Option("--target", help="Column that is the label (default: label); or several, as in time,event."),
]
Join = Annotated[
    str | None,
    typer.Option("--join", help="slide_id or case_id, by which labels belong to slides; or case_id=COLUMN."),
]
Missing = Annotated[str, typer.Option("--missing", help="Slides that --labels or --splits lacks: fail or drop.")]
Unused = Annotated[str, typer.Option("--unused", help="Labels without a slide: ignore or fail.")]
Conflicts = Annotated[
    str, typer.Option("--conflicts", help="A slide or case with several labels: fail, drop or first.")
]
Alike = Annotated[
    str, typer.Option("--alike", help="Labels that differ in case, blanks or a letter: fail, keep or merge.")
]


def labelled_slides(
    manifest: Path,
    labels: Path | None,
    target: str | None,
    join: str | None,
    *,
    missing: str,
    unused: str,
    conflicts: str,
    alike: str,
    wanted: Sequence[str] = (),
) -> list[Entry]:
    """Read a manifest whose labels may stand in a table of their own, or in another of its columns.

    `wanted` are the columns in which the configuration's target looks; without one, as `target` says.
    """
    from pipeline.data.labels import Rules, choose_target, join_labels
    from pipeline.data.manifest import read_manifest
    from pipeline.errors import UsageError

    rules = Rules(missing, unused, conflicts, alike)
    names = target.split(",") if target else list(wanted) or ["label"]
    single = len(names) == 1 and (not wanted or "label" in wanted)
    if not single and wanted and set(names) != set(wanted):
        raise UsageError(f"--target {target}: the configuration's target looks in {', '.join(wanted)}; leave it out")
    if labels is None and join is not None:
        raise UsageError(f"--join {join}: there are no --labels to join")
    if labels is None and (not single or names == ["label"]):
        return read_manifest(manifest, labelled=single)
    entries = read_manifest(manifest)
    if labels is None:
        entries, remarks = choose_target(entries, names[0], rules=rules)
    else:
        entries, remarks = join_labels(entries, labels, names[0] if single else names, join=join, rules=rules)
    warn(remarks)
    return entries


def warn(remarks: Sequence[str]) -> None:
    """Print remarks on standard error."""
    for remark in remarks:
        say(f"warning: {remark}")
