"""Options of commands that take labels from tables beside the manifest, and what is made of their values."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.cli.output import say

if TYPE_CHECKING:
    from pipeline.data.manifest import Entry


@dataclass(frozen=True, kw_only=True)
class Tables:
    """Where labels come from, and what is done about those that do not fit; `with_tables` makes options of it."""

    labels: Annotated[
        Path | None, typer.Option(help="Table to take labels from: CSV, Parquet or Excel (extra tables).")
    ] = None
    target: Annotated[
        str | None, typer.Option(help="Column that is the label (default: label); or several, as in time,event.")
    ] = None
    join: Annotated[
        str | None, typer.Option(help="slide_id or case_id, by which labels belong to slides; or case_id=COLUMN.")
    ] = None
    missing: Annotated[str, typer.Option(help="Slides that --labels or --splits lacks: fail or drop.")] = "fail"
    unused: Annotated[str, typer.Option(help="Labels without a slide: ignore or fail.")] = "ignore"
    conflicts: Annotated[str, typer.Option(help="A slide or case with several labels: fail, drop or first.")] = "fail"
    alike: Annotated[
        str, typer.Option(help="Labels that differ in case, blanks or a letter: fail, keep or merge.")
    ] = "fail"


def with_tables(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command, in place of its parameter ``tables``, the options of `Tables`."""
    shown = inspect.signature(command, eval_str=True)
    rest = [one for one in shown.parameters.values() if one.name != "tables"]
    own = list(inspect.signature(Tables, eval_str=True).parameters.values())

    @wraps(command)
    def run(**values: Any) -> None:
        tables = Tables(**{one.name: values.pop(one.name) for one in own})
        command(**values, tables=tables)

    parameters = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in rest] + own
    run.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def labelled_slides(manifest: Path, tables: Tables, wanted: Sequence[str] = ()) -> list[Entry]:
    """Read a manifest whose labels may stand in a table of their own, or in another of its columns.

    `wanted` are the columns in which the configuration's target looks; without one, as `tables.target` says.
    """
    from pipeline.data.labels import Rules, choose_target, join_labels
    from pipeline.data.manifest import read_manifest
    from pipeline.errors import UsageError

    labels, target, join = tables.labels, tables.target, tables.join
    rules = Rules(tables.missing, tables.unused, tables.conflicts, tables.alike)
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
