"""Answers to the slides of a case as one answer, where each slide was answered by itself.

Where slides were answered together (`data.unit: case`) there is one answer already.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from nested_ats.targets import Classes, MultiLabel, Target
from pipeline.data.targets import binary, columns
from pipeline.errors import UsageError
from pipeline.results.predictions import SIGNS, answer_columns, in_short
from pipeline.results.thresholds import Thresholds
from pipeline.sections import AnyTarget

How = Literal["mean", "max", "noisy-or"]

Row = dict[str, Any]


def choose_how(name: str | None) -> How | None:
    """Return one of the ways, by its name.

    Raises
    ------
    UsageError
        There is none of this name.
    """
    if name is None or name in get_args(How):
        return name  # type: ignore[return-value]
    raise UsageError(f"--by-case {name}: choose {', '.join(get_args(How))}")


def answer_cases(
    rows: Sequence[Mapping[str, Any]],
    target: Target,
    config: AnyTarget,
    how: How,
    positive: str = "",
    thresholds: Thresholds | None = None,
) -> list[Row]:
    """Make one row of all slides of a case; a slide without a case stays as it is.

    Parameters
    ----------
    rows
        Rows of a table of predictions, all answered, with what is true.
    target, config
        What was answered, and where a table tells it.
    how
        ``mean`` of the answers: the slides of a case must agree in what is true. ``max``: the highest probability of
        any slide, or ``noisy-or``: that not all slides are negative if they are independent (Pearl, 1988); a case is
        then positive if one of its slides is. These two are for labels, and for two classes, of which one is
        `positive`.
    thresholds
        From which probability on a label is answered for a slide; it holds for a case too, but not for ``noisy-or``.

    Raises
    ------
    UsageError
        The slides of a case differ in what is true; or `how` is not for this target, or needs `positive`.
    """
    _check(target, how, positive)
    cases: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(f"case {row['case_id']}" if row["case_id"] else f"slide {row['slide_id']}", []).append(row)
    chosen = {} if how == "noisy-or" else thresholds or {}
    return [_together(slides, target, config, how, positive, chosen) for slides in cases.values()]


def _check(target: Target, how: How, positive: str) -> None:
    if how == "mean":
        return
    if isinstance(target, Classes):
        if target.outputs != 2 or positive not in target.classes:
            raise UsageError(
                f"--by-case {how}: give --positive, one of two classes (the model has {', '.join(target.classes)}); "
                "or take --by-case mean"
            )
    elif not isinstance(target, MultiLabel):
        raise UsageError(f"--by-case {how}: the model answers no classes ({target.kind}); take --by-case mean")


def _together(
    slides: Sequence[Mapping[str, Any]],
    target: Target,
    config: AnyTarget,
    how: How,
    positive: str,
    thresholds: Thresholds,
) -> Row:
    first = dict(slides[0])
    if len(slides) == 1:
        return first
    named: Row = {"slide_id": first["case_id"]}
    for column in columns(config):
        named[column] = _truth([row[column] for row in slides], first["case_id"], column, target, how, positive)
    for sign in SIGNS:
        values = [row[sign] for row in slides if row.get(sign) is not None]
        named[sign] = math.fsum(values) / len(values) if values else None
    names = answer_columns(target)
    answers = {name: _combine([float(row[name]) for row in slides], how) for name in names}
    if isinstance(target, Classes) and how != "mean":
        answers = _two_classes(answers, f"prob_{positive}")
    named["seen"] = next((row["seen"] for row in slides if row.get("seen")), "")
    return first | named | answers | {"prediction": in_short(target, [answers[name] for name in names], thresholds)}


def _combine(values: Sequence[float], how: How) -> float:
    if how == "mean":
        return math.fsum(values) / len(values)
    return max(values) if how == "max" else 1 - math.prod(1 - value for value in values)


def _two_classes(answers: Mapping[str, float], positive: str) -> dict[str, float]:
    return {name: value if name == positive else 1 - answers[positive] for name, value in answers.items()}


def _truth(cells: Sequence[Any], case: str, column: str, target: Target, how: How, positive: str) -> Any:
    """What is true of a case, as a cell of the table."""
    if how != "mean":
        known = [str(cell) for cell in cells if cell not in ("", None)]
        holds = [cell for cell in known if (cell == positive if isinstance(target, Classes) else binary(cell) == 1)]
        return (holds or known or [""])[0]
    if len(set(cells)) > 1:
        found = ", ".join(sorted({str(cell) for cell in cells}))
        raise UsageError(
            f"case {case}: its slides have several values in column {column} ({found}); take --by-case max, with "
            "which a case is positive if one of its slides is, or mend the manifest"
        )
    return cells[0]
