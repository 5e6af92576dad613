"""Compare two sets of predictions of the same slides: which model is better, and how sure that is.

Differences are paired: what is hard for both models does not count against either. That of two areas under the ROC
curve has DeLong's variance over cases; other figures of classes are bootstrapped over cases, and those of other
targets are jackknifed over them.

Shape letters: S slides, Q classes, K cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from nested_ats.targets import Classes, Target
from pipeline.data.targets import columns, is_known
from pipeline.errors import UsageError
from pipeline.results.evaluate import answered, known_outcomes
from pipeline.results.intervals import (
    JACKKNIFE,
    Numbers,
    Reals,
    area,
    area_parts,
    case_numbers,
    jackknife_interval,
)
from pipeline.results.measures import by_ranks, ranking
from pipeline.results.predictions import answers_of, read_about, read_predictions
from pipeline.results.thresholds import decisive
from pipeline.sections import AnyTarget

DELONG, BOOTSTRAP = "DeLong's variance over cases", "bootstrap over cases"
_DRAWS, _AT_ONCE = 2000, 100
_LEAST = 1e-12  # probability, of which there is a logarithm
_NAMED = 5
_Z = NormalDist().inv_cdf(0.975)

Row = Mapping[str, Any]


def compare(one: Path, other: Path, *, include_seen: bool = False, seed: int = 0) -> dict[str, Any]:
    """Compare two folders of predictions on the slides that both have, with labels, and neither model has seen.

    Parameters
    ----------
    one, other
        Folders that ``predict`` wrote.
    include_seen
        Whether slides count that a model was trained or validated on.
    seed
        Decides the resamples.

    Returns
    -------
    ``slides`` and ``cases`` that count; ``figures``; and for each of these, which are ``auc``, ``accuracy``,
    ``balanced_accuracy`` and ``cross_entropy`` of classes, and else the measure by ranks (`measures.ranking`), the
    ``values``, the ``difference`` of the second from the first, its 95 % interval, the two-sided ``p``-value of no
    difference, and the ``method``. A figure is None where it is not defined, as the AUC of one class.

    Raises
    ------
    UsageError
        There are no such slides, the models answer different things, or a slide has two labels.
    """
    tables, target, config = _read(one, other, include_seen=include_seen)
    shared = [slide_id for slide_id in tables[0] if slide_id in tables[1]]
    if not shared:
        raise UsageError(f"{one} and {other}: no slide is in both with a label and unseen by both models")
    pairs = [[table[slide_id] for slide_id in shared] for table in tables]
    told = columns(config)
    if torn := [row["slide_id"] for row, twin in zip(*pairs, strict=True) if any(row[c] != twin[c] for c in told)]:
        raise UsageError(f"{one} and {other}: {len(torn)} slides have two labels: {', '.join(torn[:_NAMED])}")
    outcomes = known_outcomes(str(one), target, config, pairs[0])
    cases = case_numbers((row["case_id"], row["slide_id"]) for row in pairs[0])
    answers = [answers_of(target, rows) for rows in pairs]
    if isinstance(target, Classes):
        labels = outcomes.astype(np.int64)
        chosen = [read_about(folder).get("thresholds", {}) for folder in (one, other)]
        decided = [decisive(target, each, own) for each, own in zip(answers, chosen, strict=True)]
        figures = {"auc": _areas(labels, answers, cases)} | _bootstrapped(labels, answers, decided, cases, seed)
    else:
        figures = {ranking(target).name: _jackknifed(target, outcomes, answers, cases)}
    return {"slides": len(shared), "cases": len(set(cases.tolist())), "figures": list(figures), **figures}


def _read(one: Path, other: Path, *, include_seen: bool) -> tuple[list[dict[str, Row]], Target, AnyTarget]:
    """Read the rows of both that may count, by slide, what they answer, and where a table tells it."""
    tables: list[dict[str, Row]] = []
    told: list[tuple[Target, AnyTarget]] = []
    for folder in (one, other):
        table = read_predictions(folder)
        target, config = answered(read_about(folder), table)
        told.append((target, config))
        usable = [row for row in table if row["status"] == "ok" and is_known(config, row)]
        tables.append({row["slide_id"]: row for row in usable if include_seen or not row["seen"]})
    kinds = [(target.kind, sorted(target.names), columns(config)) for target, config in told]
    if kinds[0] != kinds[1]:
        raise UsageError(f"{one} and {other}: predictions of other classes or another target cannot be compared")
    return tables, *told[0]


def _jackknifed(target: Target, outcomes: Reals, answers: Sequence[Reals], cases: Numbers) -> dict[str, Any] | None:
    """Compare the measures by ranks of two models of another target; None where one is not defined."""

    def difference(rows: Numbers) -> float:
        before, after = (by_ranks(target, outcomes[rows], each[rows]) for each in answers)
        return after - before

    values = [by_ranks(target, outcomes, each) for each in answers]
    if any(map(math.isnan, values)):
        return None
    interval = jackknife_interval(difference, cases, "identity")
    if interval is None:
        return _said(values, (math.nan, math.nan), None, JACKKNIFE)
    error = (interval[1] - interval[0]) / (2 * _Z)
    return _said(values, interval, 2 * NormalDist().cdf(-abs(values[1] - values[0]) / error), JACKKNIFE)


def _areas(labels: Numbers, answers: Sequence[Reals], cases: Numbers) -> dict[str, Any] | None:
    """Compare areas under the ROC curve by the variance of their difference (DeLong et al., 1988)."""
    values = [area(labels, each) for each in answers]
    if values[0] is None or values[1] is None:
        return None
    parts = [area_parts(labels, each, cases)[0] for each in answers]
    error = math.sqrt((np.bincount(cases, parts[1] - parts[0]) ** 2).sum())
    difference, reach = values[1] - values[0], _Z * error
    p = 2 * NormalDist().cdf(-abs(difference) / error) if error > 1e-12 else 1.0 if difference == 0 else None
    return _said(values, (difference - reach, difference + reach), p, DELONG)


def _said(values: Sequence[Any], interval: Sequence[float], p: float | None, method: str) -> dict[str, Any]:
    one, other = (float(value) for value in values)
    limits = [float(limit) for limit in interval]
    return {"values": [one, other], "difference": other - one, "interval_95": limits, "p": p, "method": method}


def _bootstrapped(
    labels: Numbers, answers: Sequence[Reals], decided: Sequence[Reals], cases: Numbers, seed: int
) -> dict[str, Any]:
    """Compare means over slides, and over classes of slides, by resampling whole cases."""
    right = [(each.argmax(-1) == labels).astype(np.float64) for each in decided]
    rows = np.arange(len(labels))
    surprise = [-np.log(np.clip(each[rows, labels], _LEAST, 1)) for each in answers]
    every = np.zeros(len(labels), np.int64)
    figures = {"accuracy": (right, every), "balanced_accuracy": (right, labels), "cross_entropy": (surprise, every)}
    found = {}
    for name, (scores, groups) in figures.items():
        values = [_mean(each, groups) for each in scores]
        draws = np.concatenate(list(_resampled(scores[1] - scores[0], groups, cases, seed)))
        interval = np.quantile(draws, [0.025, 0.975])
        tail = min((draws <= 0).sum(), (draws >= 0).sum())
        p = min(1.0, 2 * (tail + 1) / (len(draws) + 1))
        found[name] = _said(values, interval, float(p), BOOTSTRAP)
    return found


def _mean(scores: Reals, groups: Numbers) -> float:
    """Return the mean over groups of the mean over their slides."""
    return float(np.mean([scores[groups == group].mean() for group in np.unique(groups)]))


def _resampled(scores: Reals, groups: Numbers, cases: Numbers, seed: int) -> Iterator[Reals]:
    """Yield `_mean` of resamples of K of the K cases; a group that is not in a resample does not count there."""
    generator, count = np.random.default_rng(seed), int(cases.max()) + 1
    sums, sizes = (
        np.stack([np.bincount(cases[groups == g], each[groups == g], minlength=count) for g in np.unique(groups)], 1)
        for each in (scores, np.ones_like(scores))
    )  # (K, groups)
    for _ in range(_DRAWS // _AT_ONCE):
        times = generator.multinomial(count, np.full(count, 1 / count), size=_AT_ONCE)
        with np.errstate(invalid="ignore"):
            yield np.nanmean((times @ sums) / (times @ sizes), 1)
