"""``evaluate``: say how good predictions are, with intervals over cases, and whether anything was learned.

Shape letters: S slides, A answers, Q labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nested_ats.targets import Classes, DiscreteSurvival, Target, read_target
from pipeline.config import parse_config
from pipeline.data.manifest import SPLITS
from pipeline.data.splits import SEEN, count_seen
from pipeline.data.targets import columns, is_known, truth
from pipeline.errors import UsageError
from pipeline.files import write_json
from pipeline.results.by_case import How, answer_cases
from pipeline.results.intervals import Numbers, Reals, case_numbers
from pipeline.results.measures import brier, calibration_error, measure, ranking
from pipeline.results.predictions import (
    ABOUT,
    OWN_COLUMNS,
    SIGNS,
    answers_of,
    read_about,
    read_predictions,
    table_digest,
)
from pipeline.results.thresholds import decisive
from pipeline.results.verdict import class_shares, guess_cross_entropy, verdict
from pipeline.sections import AnyTarget, ClassesTarget

METRICS = "metrics.json"
_GROUPS = 50  # values of a column, that figures are given for


def evaluate(
    folder: Path,
    *,
    split: str | None = None,
    include_seen: bool = False,
    by_case: How | None = None,
    positive: str = "",
    by: str | None = None,
) -> dict[str, Any]:
    """Compare predictions with their labels and write metrics.json beside them.

    Parameters
    ----------
    folder
        The folder of the predictions.
    split
        If given, only slides of this split count.
    include_seen
        Whether slides count that the model was trained or validated on; they do where `split` asks for them.
    by_case, positive
        How the answers to the slides of a case become one (`answer_cases`); by default every slide counts.
    by
        A column of the manifest, as of sites, by whose values the measures are given too.

    Returns
    -------
    The measures of the target (`pipeline.results.measures`; of classes ``accuracy``, ``balanced_accuracy`` and
    ``auc``, the mean one-against-rest area under the ROC curve), each with its 95 % interval over cases and the
    method of the interval, and their names; ``by``, the same for each value of that column; the ``thresholds``
    that were chosen (`calibrate`), by which right answers are counted; of classes the ``cross_entropy``, that of
    guessing by class frequencies and the confusion matrix (rows are labels); counts; the ``split`` of the slides;
    ``verdict`` (what speaks against anything having been learned, or an empty text); and ``predictions`` and
    ``model``, by which the report sees whether they have changed since and belong to its run.

    Raises
    ------
    UsageError
        There is nothing to evaluate, or several models made the predictions.
    """
    about, table = read_about(folder), read_predictions(folder)
    model = _one_model(folder, table, about)
    target, config = answered(about, table)
    rows = [row for row in table if split is None or row["split"] == split]
    where = f"{folder}" + (f", split {split}" if split else "")
    labelled = [row for row in rows if row["status"] == "ok" and is_known(config, row)]
    included = include_seen or split in SEEN
    usable: Sequence[Mapping[str, Any]] = [row for row in labelled if included or not row.get("seen")]
    if not usable:
        seen = f", {len(labelled)} of them seen in training: --include-seen counts those" if labelled else ""
        raise UsageError(f"{where}: no predicted slide has a label; {len(rows)} slides are there{seen}")
    if by_case:
        usable = answer_cases(usable, target, config, by_case, positive, about.get("thresholds"))
    outcomes = known_outcomes(where, target, config, usable)
    answers = answers_of(target, usable)
    thresholds = {} if by_case == "noisy-or" else about.get("thresholds", {})
    decided = decisive(target, answers, thresholds)
    cases = case_numbers((row["case_id"], row["slide_id"]) for row in usable)
    measures = measure(target, outcomes, decided, cases)
    metrics: dict[str, Any] = {
        "split": _splits(usable),
        "predictions": table_digest(folder),
        "model": model,
        "slides": len(usable),
        "seen": count_seen(labelled),
        "seen_included": included,
        "failed": sum(row["status"] != "ok" for row in rows),
        "unlabelled": sum(not is_known(config, row) for row in rows),
        "cases": len(set(cases.tolist())),
        "by_case": {"how": by_case, "positive": positive} if by_case else None,
        "target": target.plain,
        "thresholds": thresholds,
        "by": _by_column(where, by, target, usable, outcomes, decided) if by else None,
        "measures": list(measures),
        **measures,
    }
    if isinstance(target, Classes):
        metrics |= _of_classes(target, outcomes.astype(np.int64), answers, decided)
        metrics["guess_cross_entropy"] = _guess(about, target, [target.classes[int(label)] for label in outcomes])
    if isinstance(target, DiscreteSurvival):
        metrics["brier"] = brier(target, outcomes, answers)
    metrics |= _judge(metrics, target, usable)
    write_json(folder / METRICS, metrics)
    return metrics


def _by_column(
    where: str, column: str, target: Target, rows: Sequence[Mapping[str, Any]], outcomes: Reals, decided: Reals
) -> dict[str, Any]:
    """Measure the slides of each value of a column apart."""
    if missing := sum(column not in row for row in rows):
        names = ", ".join(name for name in rows[0] if name not in OWN_COLUMNS and not name.startswith("prob_"))
        raise UsageError(
            f"{where}: --by {column}: {missing} of {len(rows)} slides lack this column; there are {names}"
        )
    values = [str(row[column] or "none") for row in rows]
    if len(set(values)) > _GROUPS:
        raise UsageError(f"{where}: --by {column}: has {len(set(values))} values, and {_GROUPS} are the most")
    groups = {}
    for value in sorted(set(values)):
        own = [number for number, each in enumerate(values) if each == value]
        cases = case_numbers((rows[number]["case_id"], rows[number]["slide_id"]) for number in own)
        measures = measure(target, outcomes[own], decided[own], cases)
        groups[value] = {"slides": len(own), "cases": len(set(cases.tolist())), **measures}
    return {"column": column, "groups": groups}


def answered(about: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> tuple[Target, AnyTarget]:
    """Return what was answered, and where a table tells it, from predict.json; earlier ones answer classes."""
    if "target" in about:
        return read_target(about["target"]), parse_config({"target": about["told_by"]}, ABOUT).target
    names = dict.fromkeys(name for row in table for name in row if name.startswith("prob_"))
    classes = tuple(name.removeprefix("prob_") for name in names)
    return Classes(classes or ("",)), ClassesTarget()  # there are none where all slides failed


def known_outcomes(where: str, target: Target, config: AnyTarget, rows: Sequence[Mapping[str, Any]]) -> Reals:
    """Return what is true of slides: (S,), or (S, Q) of labels, or (S, 2) times and events."""
    if isinstance(target, Classes):
        strange = sorted({str(row[columns(config)[0]]) for row in rows} - set(target.classes))
        if strange:
            raise UsageError(f"{where}: labels the model does not know: {', '.join(strange)}")
    return np.asarray(truth(target, config, rows, raw=True).numpy(), dtype=np.float64)


def _of_classes(target: Classes, labels: Numbers, probabilities: Reals, decided: Reals) -> dict[str, Any]:
    confusion = np.zeros((target.outputs, target.outputs), np.int64)
    np.add.at(confusion, (labels, decided.argmax(-1)), 1)
    chosen = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    return {
        "classes": list(target.classes),
        "cross_entropy": float(-np.log(chosen).mean()),
        "ece": calibration_error(probabilities, labels),
        "confusion": confusion.tolist(),
    }


def _one_model(folder: Path, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> str | None:
    """Return the fingerprint of the one model that made all predictions; None where the table does not say."""
    models = {row.get("model") for row in rows} | ({about["model"]} if "model" in about else set())
    if len(models) > 1:
        names = ", ".join(sorted(str(model) for model in models))
        raise UsageError(f"{folder}: predictions of several models ({names}); run nested-ats predict again")
    return next(iter(models), None)


def _splits(rows: Sequence[Mapping[str, Any]]) -> str:
    """Say which splits the slides belong to, as in "test", or "12 of train, 4 of no split"."""
    counts = Counter(row["split"] for row in rows)
    order = [name for name in (*SPLITS, "") if counts[name]]
    if len(order) == 1:
        return order[0] or "none given"
    return ", ".join(f"{counts[name]} of {name or 'no split'}" for name in order)


def _guess(about: Mapping[str, Any], target: Classes, labels: Sequence[str]) -> float:
    """Return the cross-entropy of guessing by the class frequencies that `predict` found in the run."""
    shares = about.get("class_shares") or class_shares([], target.classes, balanced=True)
    return guess_cross_entropy(shares, labels)


def _judge(metrics: Mapping[str, Any], target: Target, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Add the means of the signs, and a verdict."""
    ranked = metrics.get(ranking(target).name) or {"value": None, "interval_95": None}
    # On slides of one class nothing beats to answer always that class; other targets are judged by their ranks.
    guess = metrics.get("guess_cross_entropy", math.inf) if ranked["value"] is not None else math.inf
    signs = {name: [row[name] for row in rows if row.get(name) is not None] for name in SIGNS}
    mean = {name: float(np.mean(values)) if values else None for name, values in signs.items()}
    words = verdict(
        target,
        loss=metrics.get("cross_entropy", 0.0),
        guess=guess,
        ranked=ranked["value"],
        interval=ranked["interval_95"],
        entropy=mean["entropy"] or 0.0,
        uniform=mean["uniform_entropy"] or 0.0,
        background=mean["background"],
    )
    return {**mean, "verdict": words}
