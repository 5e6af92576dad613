"""From the cells of a table to what is true of a slide, as a target takes it, and from training slides to the target.

A table is a manifest or one of predictions; both have a column ``label`` and whatever else their user brought.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nested_ats.targets import (
    Classes,
    Cox,
    DiscreteSurvival,
    MultiLabel,
    Ordinal,
    Regression,
    Target,
)
from pipeline.data.manifest import Entry, number
from pipeline.errors import UsageError
from pipeline.sections import (
    AnyTarget,
    ClassesTarget,
    CoxTarget,
    MultiLabelTarget,
    OrdinalTarget,
    RegressionTarget,
    SurvivalTarget,
)

_YES, _NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no")
_UNKNOWN = ("", "nan", "na", "n/a", "none")
_STRATA = 4  # groups of equally many slides that a number is divided into

Row = Mapping[str, object]  # cells by column


def row_of(entry: Entry) -> Row:
    """Return the cells of a slide that a target may be told by."""
    return {"label": entry.label, **entry.extra}


def columns(config: AnyTarget) -> tuple[str, ...]:
    """Return the columns that hold what is true."""
    if isinstance(config, MultiLabelTarget):
        return config.columns
    if isinstance(config, CoxTarget | SurvivalTarget):
        return (config.time, config.event)
    return (config.column,)


def is_known(config: AnyTarget, row: Row) -> bool:
    """Tell whether what is true of a slide is known; of several labels one is enough."""
    cells = [_told(config, _cell(row, name)) for name in columns(config)]
    return any(cells) if isinstance(config, MultiLabelTarget) else all(cells)


def check_table(config: AnyTarget, entries: Sequence[Entry]) -> None:
    """See that the columns of a target are there and hold what it needs.

    Raises
    ------
    UsageError
        A column is missing, or cells are empty, no number, not 0 or 1, or a time not above 0; all are named.
    """
    wanted = columns(config)
    there = {"label"}.union(*(entry.extra for entry in entries))
    problems = [f"target.{config.kind}: the manifest has no column {name}" for name in wanted if name not in there]
    if not problems:
        for entry in entries:
            row = row_of(entry)
            if not is_known(config, row):
                empty = [name for name in wanted if not _told(config, _cell(row, name))]
                problems.append(f"slide {entry.slide_id}: {', '.join(empty)} is missing")
            else:
                problems += [f"slide {entry.slide_id}: {why}" for why in _wrong_cells(config, row)]
    if problems:
        shown = "; ".join(problems[:10]) + (f"; and {len(problems) - 10} more" if len(problems) > 10 else "")
        raise UsageError(f"{shown}; mend the table, or leave these slides out")


def learn_target(config: AnyTarget, training: Sequence[Entry]) -> Target:
    """Find what the model is to answer from the training slides.

    Raises
    ------
    UsageError
        They do not differ, or grades have no order.
    """
    rows = [row_of(entry) for entry in training]
    if isinstance(config, MultiLabelTarget):
        known = {name: [cell for row in rows if _told(config, cell := _cell(row, name))] for name in config.columns}
        even = [name for name, cells in known.items() if len({binary(cell) for cell in cells}) < 2]
        if even:
            raise UsageError(f"target: of {', '.join(even)} the training slides have only one value; leave it out")
        return MultiLabel(config.columns)
    if isinstance(config, RegressionTarget):
        values = np.array([_number(row, config.column) for row in rows])
        if not values.std() > 0:
            raise UsageError(
                f"target: {config.column} is {values[0]:g} for all {len(values)} training slides; take another "
                "column, or slides that differ in it"
            )
        return Regression(float(values.mean()), float(values.std()))
    if isinstance(config, CoxTarget | SurvivalTarget):
        return _learn_survival(config, rows)
    names = _class_names(config, rows)
    return Ordinal(names) if isinstance(config, OrdinalTarget) else Classes(names)


def truth(target: Target, config: AnyTarget, rows: Sequence[Row], *, raw: bool = False) -> Tensor:
    """Make what `Target.loss` takes of rows whose truth is known.

    Of a `Cox` target it is time and event, (B, 2), from which the loss takes its own, and of all that are about time
    where it is to be `raw`.
    """
    if isinstance(target, Classes):
        return torch.tensor([target.classes.index(_cell(row, columns(config)[0])) for row in rows], dtype=torch.int64)
    if isinstance(target, Regression):
        return torch.tensor([_number(row, columns(config)[0]) for row in rows])
    if isinstance(target, MultiLabel):
        values = [[binary(_cell(row, name)) for name in target.labels] for row in rows]
        return torch.tensor(values).reshape(len(rows), target.outputs)
    time_column, event_column = columns(config)
    times = torch.tensor([_number(row, time_column) for row in rows], dtype=torch.float64)
    events = torch.tensor([binary(_cell(row, event_column)) for row in rows], dtype=torch.float64)
    if isinstance(target, DiscreteSurvival) and not raw:
        return target.intervals(times, events)
    return torch.stack([times, events], -1)


def strata(config: AnyTarget, entries: Sequence[Entry]) -> list[str]:
    """Return the stratum of each slide, of which every split gets its share."""
    rows = [row_of(entry) for entry in entries]
    if isinstance(config, CoxTarget | SurvivalTarget):
        return [f"{binary(_cell(row, config.event)):g}" for row in rows]
    if isinstance(config, RegressionTarget):
        values = np.array([_number(row, config.column) for row in rows])
        edges = np.quantile(values, np.linspace(0, 1, _STRATA + 1)[1:-1])
        return [str(place) for place in np.searchsorted(edges, values)]
    return ["/".join(_cell(row, name) for name in columns(config)) for row in rows]


def by_stratum(
    config: AnyTarget, entries: Sequence[Entry], split: Callable[[Sequence[Entry]], Sequence[Entry]]
) -> list[Entry]:
    """Split slides by a function that looks at labels, which stand for their strata meanwhile."""
    labelled = [replace(e, label=name) for e, name in zip(entries, strata(config, entries), strict=True)]
    return [replace(done, label=e.label) for e, done in zip(entries, split(labelled), strict=True)]


def _learn_survival(config: CoxTarget | SurvivalTarget, rows: Sequence[Row]) -> Target:
    events = [binary(_cell(row, config.event)) == 1 for row in rows]
    times = np.array([_number(row, config.time) for row in rows])
    if sum(events) < 2:
        raise UsageError(
            f"target: {config.event} is 1 for {sum(events)} training slides; at least two are needed: "
            "take more slides, or deal them out by nested-ats split --stratify " + config.event
        )
    if isinstance(config, CoxTarget):
        return Cox()
    happened = np.sort(times[np.array(events)])
    ends = np.unique(np.quantile(happened, np.linspace(0, 1, config.intervals + 1)[1:]))
    return DiscreteSurvival(config.times or tuple(float(end) for end in ends))


def _class_names(config: ClassesTarget | OrdinalTarget, rows: Sequence[Row]) -> tuple[str, ...]:
    there = Counter(_cell(row, config.column) for row in rows)
    if len(there) < 2:
        raise UsageError(
            f"training slides need at least two different labels (found: {', '.join(sorted(there)) or 'none'}); of a "
            "fold or split that lacks a class, deal slides out by nested-ats split, or into fewer folds"
        )
    if isinstance(config, ClassesTarget):
        return tuple(sorted(there))
    if config.order:
        lacking = [name for name in config.order if name not in there]
        if lacking or set(there) - set(config.order):
            strange = ", ".join(sorted(set(there) - set(config.order))) or "none"
            raise UsageError(
                f"target.order: grades that no training slide has: {', '.join(lacking) or 'none'}; labels without a "
                f"place: {strange}"
            )
        return config.order
    try:
        return tuple(sorted(there, key=float))
    except ValueError:
        raise UsageError(
            f"target.order: name the grades from the lowest to the highest ({', '.join(sorted(there))})"
        ) from None


def _wrong_cells(config: AnyTarget, row: Row) -> list[str]:
    """Say what is wrong with the cells of one slide."""
    if isinstance(config, MultiLabelTarget):
        cells = {name: _cell(row, name) for name in config.columns}
        return [
            f"{name} is {cell!r}, not 0 or 1"
            for name, cell in cells.items()
            if _told(config, cell) and math.isnan(binary(cell))
        ]
    if isinstance(config, RegressionTarget):
        return _wrong_number(row, config.column)
    if isinstance(config, CoxTarget | SurvivalTarget):
        wrong, event = _wrong_number(row, config.time), _cell(row, config.event)
        if not wrong and _number(row, config.time) <= 0:
            wrong = [f"{config.time} is {_cell(row, config.time)}; times must be above 0"]
        if math.isnan(binary(event)):
            wrong.append(f"{config.event} is {event!r}, not 0 or 1")
        return wrong
    return []


def _wrong_number(row: Row, column: str) -> list[str]:
    try:
        finite = math.isfinite(_number(row, column))
    except ValueError:
        finite = False
    return [] if finite else [f"{column} is {_cell(row, column)!r}, not a number"]


def _cell(row: Row, column: str) -> str:
    return str(row.get(column) or "")


def _told(config: AnyTarget, cell: str) -> bool:
    """Whether a cell tells anything; a class may have any name."""
    return cell != "" if isinstance(config, ClassesTarget | OrdinalTarget) else cell.casefold() not in _UNKNOWN


def _number(row: Row, column: str) -> float:
    value = number(_cell(row, column))
    return math.nan if value is None else value


def binary(cell: str) -> float:
    """Return 1 or 0 of a cell that says yes or no, NaN of any other."""
    return 1.0 if cell.casefold() in _YES else 0.0 if cell.casefold() in _NO else math.nan
