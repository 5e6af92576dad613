"""``evaluate``: say how good predictions are, with intervals over cases, and whether anything was learned.

Shape letters: S slides, Q classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.data.manifest import SPLITS
from pipeline.data.splits import SEEN, count_seen
from pipeline.errors import UsageError
from pipeline.files import write_json
from pipeline.results.intervals import (
    MOVER,
    WILSON,
    Numbers,
    Reals,
    accuracy_interval,
    area,
    area_interval,
    balanced_interval,
    case_numbers,
)
from pipeline.results.predictions import SIGNS, read_about, read_predictions, table_digest
from pipeline.results.verdict import class_shares, guess_cross_entropy, verdict

METRICS = "metrics.json"


def evaluate(folder: Path, *, split: str | None = None, include_seen: bool = False) -> dict[str, Any]:
    """Compare predictions with their labels and write metrics.json beside them.

    Parameters
    ----------
    folder
        The folder of the predictions.
    split
        If given, only slides of this split count.
    include_seen
        Whether slides count that the model was trained or validated on; they do where `split` asks for them.

    Returns
    -------
    ``accuracy``, ``balanced_accuracy`` and ``auc`` (mean one-against-rest area under the ROC curve), each with its
    95 % interval over cases and the method of the interval; ``cross_entropy``, and that of guessing by class
    frequencies; the confusion matrix (rows are labels); counts; the ``split`` of the slides; ``verdict`` (what speaks
    against anything having been learned, or an empty text); and ``predictions`` and ``model``, by which the report
    sees whether they have changed since and belong to its run.

    Raises
    ------
    UsageError
        There is nothing to evaluate, or several models made the predictions.
    """
    about, table = read_about(folder), read_predictions(folder)
    model = _one_model(folder, table, about)
    rows = [row for row in table if split is None or row["split"] == split]
    where = f"{folder}" + (f", split {split}" if split else "")
    labelled = [row for row in rows if row["status"] == "ok" and row["label"]]
    included = include_seen or split in SEEN
    usable = [row for row in labelled if included or not row.get("seen")]
    if not usable:
        seen = f", {len(labelled)} of them seen in training: --include-seen counts those" if labelled else ""
        raise UsageError(f"{where}: no predicted slide has a label; {len(rows)} slides are there{seen}")
    classes = [name.removeprefix("prob_") for name in usable[0] if name.startswith("prob_")]
    strange = sorted({row["label"] for row in usable} - set(classes))
    if strange:
        raise UsageError(f"{where}: labels the model does not know: {', '.join(strange)}")
    labels = np.array([classes.index(row["label"]) for row in usable])
    probabilities = np.array([[row[f"prob_{name}"] for name in classes] for row in usable])
    cases = case_numbers((row["case_id"], row["slide_id"]) for row in usable)
    metrics: dict[str, Any] = {
        "split": _splits(usable),
        "predictions": table_digest(folder),
        "model": model,
        "slides": len(usable),
        "seen": count_seen(labelled),
        "seen_included": included,
        "failed": sum(row["status"] != "ok" for row in rows),
        "unlabelled": sum(not row["label"] for row in rows),
        "cases": len(set(cases.tolist())),
        "classes": classes,
    }
    metrics |= _measure(labels, probabilities, cases)
    truth = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    metrics["cross_entropy"] = float(-np.log(truth).mean())
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(-1)), 1)
    metrics["confusion"] = confusion.tolist()
    metrics |= _judge(metrics, usable, about)
    write_json(folder / METRICS, metrics)
    return metrics


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


def _measure(labels: Numbers, probabilities: Reals, cases: Numbers) -> dict[str, dict[str, Any]]:
    """Measure accuracy, balanced accuracy and AUC, each with its interval and method; one case has no interval."""
    right = probabilities.argmax(-1) == labels
    balanced = float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    values = {"accuracy": float(right.mean()), "balanced_accuracy": balanced, "auc": area(labels, probabilities)}
    found: dict[str, dict[str, Any]] = {
        name: {"value": value, "interval_95": None, "method": ""} for name, value in values.items()
    }
    if len(set(cases.tolist())) > 1:
        found["accuracy"] |= {"interval_95": accuracy_interval(right, cases), "method": WILSON}
        found["balanced_accuracy"] |= {"interval_95": balanced_interval(right, labels, cases), "method": MOVER}
        if values["auc"] is not None:
            interval, method = area_interval(labels, probabilities, cases)
            found["auc"] |= {"interval_95": interval, "method": method}
    return found


def _judge(metrics: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]) -> dict[str, Any]:
    """Add the cross-entropy of guessing, by the class frequencies that `predict` found in the run, and a verdict."""
    labels = [row["label"] for row in rows]
    shares = about.get("class_shares") or class_shares([], metrics["classes"], balanced=True)
    guess, judged = guess_cross_entropy(shares, labels), metrics["auc"]["value"] is not None
    signs = {name: [row[name] for row in rows if row.get(name) is not None] for name in SIGNS}
    mean = {name: float(np.mean(values)) if values else None for name, values in signs.items()}
    words = verdict(
        cross_entropy=metrics["cross_entropy"],
        guess=guess if judged else math.inf,  # on slides of one class nothing beats to answer always that class
        auc=metrics["auc"]["value"],
        interval=metrics["auc"]["interval_95"],
        entropy=mean["entropy"] or 0.0,
        uniform=mean["uniform_entropy"] or 0.0,
        background=mean["background"],
    )
    return {"guess_cross_entropy": guess, **mean, "verdict": words}
