"""``evaluate``: how good predictions are, with intervals by resampling cases.

Shape letters: S slides, Q classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import UsageError
from pipeline.files import write_json
from pipeline.predict import read_predictions, table_digest

METRICS = "metrics.json"
_RESAMPLES = 1000

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]


def evaluate(folder: Path, *, split: str | None = None, seed: int = 0) -> dict[str, Any]:
    """Compare predictions with their labels and write metrics.json beside them.

    Parameters
    ----------
    folder
        Of the predictions.
    split
        Slides of this split only.
    seed
        Of the resampling.

    Returns
    -------
    ``accuracy``, ``balanced_accuracy`` and ``auc`` (mean one-against-rest area under the ROC curve), each with its
    95 % bootstrap interval over cases, ``cross_entropy``, the confusion matrix (rows: labels), counts, and
    ``predictions``, by which the report sees whether they have changed since.

    Raises
    ------
    UsageError
        There is nothing to evaluate.
    """
    rows = [row for row in read_predictions(folder) if split is None or row["split"] == split]
    where = f"{folder}" + (f", split {split}" if split else "")
    usable = [row for row in rows if row["status"] == "ok" and row["label"]]
    if not usable:
        raise UsageError(f"{where}: no predicted slide has a label; {len(rows)} slides are there")
    classes = [name.removeprefix("prob_") for name in usable[0] if name.startswith("prob_")]
    strange = sorted({row["label"] for row in usable} - set(classes))
    if strange:
        raise UsageError(f"{where}: labels the model does not know: {', '.join(strange)}")
    labels = np.array([classes.index(row["label"]) for row in usable])
    probabilities = np.array([[row[f"prob_{name}"] for name in classes] for row in usable])
    cases = [row["case_id"] or f"slide {row['slide_id']}" for row in usable]
    metrics: dict[str, Any] = {
        "split": split or "all",
        "predictions": table_digest(folder),
        "slides": len(usable),
        "failed": sum(row["status"] != "ok" for row in rows),
        "unlabelled": sum(not row["label"] for row in rows),
        "cases": len(set(cases)),
        "classes": classes,
    }
    for name, measure in MEASURES.items():
        value = measure(labels, probabilities)
        interval = None if value is None else _interval(measure, labels, probabilities, cases, seed)
        metrics[name] = {"value": value, "interval_95": interval}
    truth = np.clip(probabilities[np.arange(len(labels)), labels], 1e-12, 1)
    metrics["cross_entropy"] = float(-np.log(truth).mean())
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    np.add.at(confusion, (labels, probabilities.argmax(-1)), 1)
    metrics["confusion"] = confusion.tolist()
    write_json(folder / METRICS, metrics)
    return metrics


def _accuracy(labels: Labels, probabilities: Probabilities) -> float | None:
    return float((probabilities.argmax(-1) == labels).mean())


def _balanced_accuracy(labels: Labels, probabilities: Probabilities) -> float | None:
    right = probabilities.argmax(-1) == labels
    return float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))


def _auc(labels: Labels, probabilities: Probabilities) -> float | None:
    """None where one class alone occurs; classes that do not occur are left out of the mean."""
    present = np.unique(labels)
    if len(present) == 1:
        return None
    return float(np.mean([_rank_auc(labels == label, probabilities[:, label]) for label in present]))


def _rank_auc(positive: NDArray[np.bool_], scores: Probabilities) -> float:
    """Area under the ROC curve by the Mann-Whitney statistic; ties count half.

    Many times faster than scikit-learn's, which the bootstrap would wait for: 13 s for ten classes of 1,000 slides.
    """
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ones = int(positive.sum())
    return float((ranks[positive].sum() - ones * (ones + 1) / 2) / (ones * (len(scores) - ones)))


MEASURES: dict[str, Callable[[Labels, Probabilities], float | None]] = {
    "accuracy": _accuracy,
    "balanced_accuracy": _balanced_accuracy,
    "auc": _auc,
}


def _interval(
    measure: Callable[[Labels, Probabilities], float | None],
    labels: Labels,
    probabilities: Probabilities,
    cases: Sequence[str],
    seed: int,
) -> tuple[float, float] | None:
    """95 % percentile interval over resampled cases; none for a single case."""
    groups: dict[str, list[int]] = {}
    for i, case in enumerate(cases):
        groups.setdefault(case, []).append(i)
    members = [np.array(group) for group in groups.values()]
    if len(members) == 1:
        return None
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(_RESAMPLES):
        chosen = np.concatenate([members[i] for i in rng.integers(len(members), size=len(members))])
        value = measure(labels[chosen], probabilities[chosen])
        if value is not None:
            values.append(value)
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)
