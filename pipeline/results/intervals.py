"""95 % intervals of measures over few slides, some of one case; none shrinks to a point where all went well.

Slides of one case are not independent: what they contribute is summed before it is squared. All intervals are closed
forms, so equal predictions have equal intervals, and ten classes of a thousand slides take no time.

Shape letters: S slides, Q classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]
Numbers = NDArray[np.int64]
Reals = NDArray[np.float64]
Interval = tuple[float, float]
Scale = Literal[
    "identity", "log", "logit", "fisher"
]  # on which a measure varies most nearly as a normal variable does

WILSON = "Wilson's score interval, slides of a case counted by how far they agree"
MOVER = "Wilson's score interval of each class, combined by MOVER"
DELONG = "DeLong's variance over cases, on the logit scale"
NEWCOMBE = "Newcombe's score interval (method 5): too few cases, or none ranked wrongly, for DeLong's"
JACKKNIFE = "jackknife over cases"
_Z = NormalDist().inv_cdf(0.975)


def case_numbers(identities: Iterable[tuple[str, str]]) -> Numbers:
    """Number the cases of slides, (S,), by their case and slide ids; a slide without a case is a case of its own."""
    one: dict[str, str] = {}  # text for each case, as there may be a million slides
    told = (f"case {case_id}" if case_id else f"slide {slide_id}" for case_id, slide_id in identities)
    names = [one.setdefault(name, name) for name in told]
    number = {name: place for place, name in enumerate(sorted(one))}
    return np.fromiter(map(number.__getitem__, names), np.int64, len(names))


def accuracy_interval(right: Bools, cases: Numbers) -> Interval:
    """Return the interval of a proportion (Wilson, 1927).

    The size of the sample is the number of independent slides that would vary as much: that of the slides where each
    case has one slide, and that of the cases where the slides of a case, or all slides, are alike.

    Parameters
    ----------
    right
        Whether each slide is right, (S,) with S >= 1.
    cases
        The number of the case of each slide, (S,).
    """
    share = float(right.mean())
    spread = float((np.bincount(cases, right - share) ** 2).sum())
    if share in (0.0, 1.0):
        size: float = len(np.unique(cases))
    else:
        size = min(share * (1 - share) * len(right) ** 2 / max(spread, 1e-12), len(right))
    low, high = wilson(share, size)
    return float(low), float(high)


def wilson(share: float | Reals, size: float | NDArray[Any]) -> tuple[Reals, Reals]:
    """Return the limits of the intervals of proportions of so many independent slides (Wilson, 1927)."""
    wide = _Z**2 / np.asarray(size, dtype=np.float64)
    half = _Z * np.sqrt(share * (1 - share) / size + wide / (4 * size))
    return np.maximum((share + wide / 2 - half) / (1 + wide), 0.0), np.minimum(
        (share + wide / 2 + half) / (1 + wide), 1.0
    )


def balanced_interval(right: Bools, labels: Numbers, cases: Numbers) -> Interval:
    """Return the interval of the mean over classes of the share that is right (MOVER: Zou and Donner, 2008).

    Parameters
    ----------
    right, labels, cases
        They are (S,) each; classes that do not occur are left out of the mean.
    """
    present = np.unique(labels)
    shares = np.array([right[labels == label].mean() for label in present])
    limits = np.array([accuracy_interval(right[labels == label], cases[labels == label]) for label in present])
    below, above = (np.sqrt(((limits[:, side] - shares) ** 2).sum()) / len(present) for side in (0, 1))
    return float(shares.mean() - below), float(shares.mean() + above)


def area(labels: Numbers, probabilities: Reals) -> float | None:
    """Return the mean one-against-rest area under the ROC curve over the classes that occur, or None for one class.

    Parameters
    ----------
    labels
        The numbers of the classes, (S,) in [0, Q).
    probabilities
        The probabilities of the classes, (S, Q).
    """
    present = np.unique(labels)
    if len(present) == 1:
        return None
    placements = (_placements(labels == label, probabilities[:, label])[labels == label] for label in present)
    return float(np.mean([each.mean() for each in placements]))


def area_interval(labels: Numbers, probabilities: Reals, cases: Numbers) -> tuple[Interval, str]:
    """Return the interval of `area`, where there is one, and its method.

    The method is that of DeLong et al. (1988), which Obuchowski (1997) extends to slides of one case; with several
    classes, what each slide contributes to the areas of all is summed. Where there is no variance to estimate, as in
    a perfect ranking or with a class of a single case, it is method 5 of Newcombe (2006) for the class of fewest
    cases.
    """
    value = area(labels, probabilities)
    assert value is not None  # noqa: S101  the caller has looked
    total, counts = area_parts(labels, probabilities, cases)
    error = math.sqrt((np.bincount(cases, total) ** 2).sum())
    if min(map(min, counts)) < 2 or error < 1e-9 or not 0 < value < 1:
        few = min(counts)
        return (_newcombe(value, *few), 1 - _newcombe(1 - value, *few)), NEWCOMBE
    middle, half = math.log(value / (1 - value)), _Z * error / (value * (1 - value))
    return (_logistic(middle - half), _logistic(middle + half)), DELONG


def area_parts(labels: Numbers, probabilities: Reals, cases: Numbers) -> tuple[Reals, list[tuple[int, int]]]:
    """Return what each slide contributes to the error of `area`, (S,), and the numbers of cases of classes and rests.

    The contributions are summed over the slides of a case. The sum of the squares of these is the variance of the
    area (DeLong), and, with those of another model on the same slides subtracted before, that of the difference.
    """
    present = np.unique(labels)
    total, counts = np.zeros(len(labels)), []
    for label in present:
        positive = labels == label
        placements = _placements(positive, probabilities[:, label])
        sizes = []
        for side in (positive, ~positive):
            sizes.append(len(np.unique(cases[side])))
            unbiased = math.sqrt(sizes[-1] / max(sizes[-1] - 1, 1))
            total[side] += (placements[side] - placements[side].mean()) * unbiased / side.sum() / len(present)
        counts.append((sizes[0], sizes[1]))
    return total, counts


def jackknife_interval(statistic: Callable[[Numbers], float], cases: Numbers, scale: Scale) -> Interval | None:
    """Return the interval of a statistic from its values without one group of cases each (Tukey, 1958).

    There are at most 200 groups, of cases as they come. None where the statistic does not vary or cannot be computed
    without some group, as of few cases.

    Parameters
    ----------
    statistic
        Maps numbers of slides to a value.
    cases
        (S,), the number of the case of each slide.
    scale
        The scale on which the variance is taken.
    """
    groups = np.unique(cases, return_inverse=True)[1] % _GROUPS
    number = int(groups.max()) + 1
    to_scale, back = _SCALES[scale]
    value = statistic(np.arange(len(cases)))
    try:
        center = to_scale(value)
        without = np.array([to_scale(statistic(np.flatnonzero(groups != group))) for group in range(number)])
    except (ValueError, ZeroDivisionError):  # on the edge of the scale
        return None
    error = math.sqrt(float(((without - without.mean()) ** 2).sum()) * (number - 1) / number)
    if number < 2 or not error > 1e-9:
        return None
    return back(center - _Z * error), back(center + _Z * error)


def _placements(positive: Bools, scores: Reals) -> Reals:
    """Return the share of the other kind that each slide is ranked rightly against, (S,); ties count half.

    The mean over either kind is the area. By ranks this is many times faster than scikit-learn's.
    """
    placed = np.empty(len(scores))
    ranked = ranks(scores)
    for side in (positive, ~positive):
        below = (ranked[side] - ranks(scores[side])) / max((~side).sum(), 1)
        placed[side] = below if side is positive else 1 - below
    return placed


def ranks(values: Reals) -> Reals:
    """Rank values from 1 on; equal values share their mean rank."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    shared: Reals = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return shared


def _newcombe(value: float, positives: int, negatives: int) -> float:
    """Return the lower limit: the area that `value` lies above by just what its standard error allows."""
    if value < 1e-9:
        return 0.0
    mean_size = (positives + negatives) / 2 - 1

    def excess(area: float) -> float:
        spread = 1 + mean_size * ((1 - area) / (2 - area) + area / (1 + area))
        return value - area - _Z * math.sqrt(max(area * (1 - area), 0.0) * spread / (positives * negatives))

    low, high = 0.0, value - 1e-10
    for _ in range(60):  # until no other number lies between
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return low


def _logit(value: float) -> float:
    return math.log(value / (1 - value))


def _logistic(value: float) -> float:
    return 1 / (1 + math.exp(-value)) if value > -700 else 0.0


def _same(value: float) -> float:
    return value


_GROUPS = 200
_SCALES: dict[str, tuple[Callable[[float], float], Callable[[float], float]]] = {
    "identity": (_same, _same),
    "log": (math.log, math.exp),
    "logit": (_logit, _logistic),
    "fisher": (math.atanh, math.tanh),
}
