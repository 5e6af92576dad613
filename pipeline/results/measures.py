"""How good answers are, for each kind of target, with 95 % intervals over cases.

Shape letters: S slides, A answers, Q classes or labels, T times.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nested_ats.targets import Cox, DiscreteSurvival, MultiLabel, Ordinal, Regression, Target
from pipeline.results.intervals import (
    JACKKNIFE,
    MOVER,
    WILSON,
    Interval,
    Numbers,
    Reals,
    Scale,
    accuracy_interval,
    area,
    area_interval,
    balanced_interval,
    jackknife_interval,
    ranks,
)

_BINS = 15
Found = dict[str, dict[str, Any]]  # by name: value, interval_95 (or None), and the method of the interval


class Ranking(NamedTuple):
    """The measure that tells by ranks whether anything was learned."""

    name: str
    chance: float  # its value where nothing was


def ranking(target: Target) -> Ranking:
    """Return the measure by which a target is judged."""
    if isinstance(target, Regression):
        return Ranking("spearman", 0.0)
    if isinstance(target, Cox | DiscreteSurvival):
        return Ranking("concordance", 0.5)
    return Ranking("auc", 0.5)


def calibration_error(probabilities: Reals, labels: Numbers) -> float:
    """Return the expected calibration error (Guo et al., 2017): how far sureness is from the share that is right.

    Slides are put into 15 bins of equal width by the probability of the class that is answered. The error is the mean
    over slides of the distance of a bin's mean probability from the share of its answers that are right.

    Parameters
    ----------
    probabilities
        (S, Q), S >= 1.
    labels
        (S,), the numbers of the true classes.
    """
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    bins = np.clip(np.ceil(sure * _BINS).astype(np.int64) - 1, 0, _BINS - 1)
    return float(np.abs(np.bincount(bins, sure - right)).sum() / len(labels))


def measure_names(target: Target) -> tuple[str, ...]:
    """Return the names of the measures that every target of this kind has (`measure`)."""
    if isinstance(target, MultiLabel):
        return "accuracy", "auc"
    if isinstance(target, Regression):
        return "mae", "r2", "pearson", "spearman"
    if isinstance(target, Cox | DiscreteSurvival):
        return ("concordance",)
    return "accuracy", "balanced_accuracy", "auc", *(["quadratic_kappa"] if isinstance(target, Ordinal) else [])


def badness(validation: Mapping[str, float], target: Target, figure: str) -> float:
    """Return what `TrainConfig.best_by` wants small of a validation's figures, NaN where it has not this one."""
    value = validation.get(f"val_{target.loss_name if figure == 'loss' else figure}", math.nan)
    return value if figure in ("loss", "mae") else -value


def measure(target: Target, truth: Reals, answers: Reals, cases: Numbers) -> Found:
    """Measure answers.

    Parameters
    ----------
    target
        What was answered.
    truth
        (S,) numbers of classes, or values; (S, Q) labels of 1, 0 and NaN; (S, 2) times and events.
    answers
        (S, A), see `Target.answers`.
    cases
        (S,) numbers of the cases, over which intervals are. With one case there is none.
    """
    several = len(np.unique(cases)) > 1
    if isinstance(target, MultiLabel):
        found = _of_labels(target, truth, answers, cases)
    elif isinstance(target, Regression):
        found = _of_numbers(truth, answers[:, 0], cases)
    elif isinstance(target, Cox | DiscreteSurvival):
        found = _of_times(truth, risks(target, answers), cases)
    else:
        found = _of_classes(target, truth.astype(np.int64), answers, cases)
    return found if several else {name: {**one, "interval_95": None, "method": ""} for name, one in found.items()}


def by_ranks(target: Target, truth: Reals, answers: Reals) -> float:
    """Return the value of the measure of `ranking` for a target that is not of classes; NaN where it is not defined.

    The parameters are those of `measure`.
    """
    if isinstance(target, MultiLabel):
        return _mean_area(truth, answers)
    if isinstance(target, Regression):
        return correlation(ranks(truth), ranks(answers[:, 0]))
    found = concordance(truth[:, 0], truth[:, 1], risks(target, answers))
    return math.nan if found is None else found


def risks(target: Target, answers: Reals) -> Reals:
    """Return one number a slide that is higher where the event comes earlier, (S,).

    It is the log hazard ratio, or how many of the intervals are not expected to be survived.
    """
    return answers[:, 0] if isinstance(target, Cox) else (1 - answers).sum(1)


def brier(target: DiscreteSurvival, truth: Reals, answers: Reals) -> list[float] | None:
    """Return the Brier score at each time, weighted for censoring (Graf et al., 1999); None without scikit-survival.

    Parameters
    ----------
    target
        Its times are those of the scores.
    truth
        (S, 2) times and events; the distribution of censoring is theirs.
    answers
        (S, T) probabilities to survive.
    """
    try:
        from sksurv.metrics import brier_score
    except ImportError:
        return None
    outcomes = np.array([(event > 0, time) for time, event in truth], dtype=[("event", bool), ("time", float)])
    inside = [i for i, time in enumerate(target.times) if truth[:, 0].min() <= time < truth[:, 0].max()]
    if not inside:
        return [math.nan] * len(target.times)
    scores = [math.nan] * len(target.times)
    _, found = brier_score(outcomes, outcomes, answers[:, inside], [target.times[i] for i in inside])
    for i, score in zip(inside, found, strict=True):
        scores[i] = float(score)
    return scores


def _of_classes(target: Target, labels: Numbers, probabilities: Reals, cases: Numbers) -> Found:
    right = probabilities.argmax(-1) == labels
    balanced = float(np.mean([right[labels == label].mean() for label in np.unique(labels)]))
    found = {
        "accuracy": _one(float(right.mean()), accuracy_interval(right, cases), WILSON),
        "balanced_accuracy": _one(balanced, balanced_interval(right, labels, cases), MOVER),
        "auc": _area(labels, probabilities, cases),
    }
    if isinstance(target, Ordinal):
        guesses = probabilities.argmax(-1)
        classes = len(target.classes)
        found["quadratic_kappa"] = _jackknifed(
            lambda rows: quadratic_kappa(labels[rows], guesses[rows], classes), cases, "identity"
        )
    return found


def _of_labels(target: MultiLabel, truth: Reals, probabilities: Reals, cases: Numbers) -> Found:
    known = ~np.isnan(truth)
    right = ((probabilities > 0.5) == (truth > 0.5))[known]
    of_slides = np.broadcast_to(cases[:, None], truth.shape)[known]
    found = {"accuracy": _one(float(right.mean()), accuracy_interval(right, of_slides), WILSON)}
    found["auc"] = _jackknifed(lambda rows: _mean_area(truth[rows], probabilities[rows]), cases, "logit")
    for number, name in enumerate(target.labels):
        mine = known[:, number]
        both = np.stack([1 - probabilities[mine, number], probabilities[mine, number]], 1)
        if mine.any():
            found[f"auc_{name}"] = _area(truth[mine, number].astype(np.int64), both, cases[mine])
    return found


def _of_numbers(truth: Reals, answers: Reals, cases: Numbers) -> Found:
    ranked = ranks(truth), ranks(answers)
    varied = float(((truth - truth.mean()) ** 2).sum()) > 0

    def unexplained(rows: NDArray[np.int64]) -> float:
        spread = ((truth[rows] - truth[rows].mean()) ** 2).sum()
        return float(1 - ((truth[rows] - answers[rows]) ** 2).sum() / spread) if spread > 0 else math.nan

    found = {"mae": _jackknifed(lambda rows: float(np.abs(truth[rows] - answers[rows]).mean()), cases, "log")}
    if not varied:
        return found | {name: _one(None, None, "") for name in ("r2", "pearson", "spearman")}
    found["r2"] = _jackknifed(unexplained, cases, "identity")
    found["pearson"] = _jackknifed(lambda rows: correlation(truth[rows], answers[rows]), cases, "fisher")
    found["spearman"] = _jackknifed(lambda rows: correlation(ranked[0][rows], ranked[1][rows]), cases, "fisher")
    return found


def _of_times(truth: Reals, risk: Reals, cases: Numbers) -> Found:
    value = concordance(truth[:, 0], truth[:, 1], risk)
    if value is None:
        return {"concordance": _one(None, None, "")}

    def without(rows: NDArray[np.int64]) -> float:
        found = concordance(truth[rows, 0], truth[rows, 1], risk[rows])
        return math.nan if found is None else found

    return {"concordance": _jackknifed(without, cases, "logit")}


def quadratic_kappa(labels: Numbers, guesses: Numbers, classes: int) -> float:
    """Return Cohen's kappa with quadratic weights (Cohen, 1968); NaN where neither varies."""
    table = np.zeros((classes, classes))
    np.add.at(table, (labels, guesses), 1.0)
    number = np.arange(classes)
    weights = (number[:, None] - number[None, :]) ** 2
    expected = np.outer(table.sum(1), table.sum(0)) / table.sum()
    total = float((weights * expected).sum())
    return 1 - float((weights * table).sum()) / total if total > 0 else math.nan


def correlation(one: Reals, other: Reals) -> float:
    """Return Pearson's correlation; 0 where one of them does not vary, as it then tells nothing of the other."""
    one, other = one - one.mean(), other - other.mean()
    spread = math.sqrt(float((one**2).sum()) * float((other**2).sum()))
    return float((one * other).sum()) / spread if spread > 0 else 0.0


def concordance(times: Reals, events: Reals, risk: Reals) -> float | None:
    """Return Harrell's C: of the pairs of known order, the share in which the earlier event has the higher risk.

    Equal risks count half. It is None where no pair can be compared.

    Parameters
    ----------
    times, events, risk
        (S,) each; events are 1 where the event was seen.
    """
    concordant = comparable = 0.0
    for row in np.flatnonzero(events > 0):
        later = (times > times[row]) | ((times == times[row]) & (events == 0))
        comparable += later.sum()
        concordant += (risk[later] < risk[row]).sum() + 0.5 * (risk[later] == risk[row]).sum()
    return float(concordant / comparable) if comparable else None


def kaplan_meier(times: Reals, events: Reals) -> tuple[Reals, Reals]:
    """Return the distinct times, (T,), and the share without the event past each (Kaplan and Meier, 1958).

    Parameters
    ----------
    times, events
        (S,) each; events are 1 where the event was seen.
    """
    distinct, place = np.unique(times, return_inverse=True)
    at_risk = len(times) - np.concatenate([[0], np.bincount(place).cumsum()[:-1]])
    happened = np.bincount(place, weights=events > 0, minlength=len(distinct))
    survival: Reals = np.cumprod(1 - happened / at_risk)
    return distinct.astype(np.float64), survival


def _mean_area(truth: Reals, probabilities: Reals) -> float:
    """Return the mean area under the ROC curves of the labels that occur both ways."""
    areas = []
    for label, probability in zip(truth.T, probabilities.T, strict=True):
        known = ~np.isnan(label)
        if known.any():
            value = area(label[known].astype(np.int64), np.stack([1 - probability[known], probability[known]], 1))
            areas += [] if value is None else [value]
    return float(np.mean(areas)) if areas else math.nan


def _area(labels: Numbers, probabilities: Reals, cases: Numbers) -> dict[str, Any]:
    value = area(labels, probabilities)
    if value is None or len(np.unique(cases)) < 2:
        return _one(value, None, "")
    return _one(value, *area_interval(labels, probabilities, cases))


def _jackknifed(statistic: Callable[[NDArray[np.int64]], float], cases: Numbers, scale: Scale) -> dict[str, Any]:
    value = statistic(np.arange(len(cases)))
    if not math.isfinite(value):
        return _one(None, None, "")
    interval = jackknife_interval(statistic, cases, scale)
    return _one(value, interval, JACKKNIFE if interval else "")


def _one(value: float | None, interval: Interval | None, method: str) -> dict[str, Any]:
    return {"value": value, "interval_95": interval, "method": method}


def words_of(found: Mapping[str, Any]) -> str:
    """Write a value with its interval, as in ``0.91 [0.84, 0.95]``."""
    value, interval = found["value"], found["interval_95"]
    text = "undefined" if value is None else f"{value:.3f}"
    return text + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
