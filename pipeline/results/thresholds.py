"""Decision thresholds: from which probability on a label is answered, where that is not a half.

A threshold is that of the second of two classes, or of one of several labels. It changes what is answered in short
and all that counts right answers, never a probability or a ranking.

Shape letters: S slides, A answers, Q classes or labels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from nested_ats.targets import Classes, MultiLabel, Target
from pipeline.errors import DataError, UsageError
from pipeline.results.intervals import Reals

YOUDEN = "youden"
Thresholds = Mapping[str, float]  # by the name of the label


def labels_of(target: Target) -> tuple[str, ...]:
    """Return the labels that a target has thresholds for: the second of two classes, or every label."""
    if isinstance(target, MultiLabel):
        return target.labels
    return target.classes[1:] if isinstance(target, Classes) and target.outputs == 2 else ()


def decisive(target: Target, answers: Reals, thresholds: Thresholds) -> Reals:
    """Bring every threshold to a half: (S, A) answers -> (S, A) of the same ranking.

    Below and above its threshold a probability is changed in proportion, and probabilities of two classes still add
    up to one. Without thresholds nothing changes.
    """
    if not thresholds:
        return answers
    changed = answers.astype(np.float64)
    for name, threshold in thresholds.items():
        column = target.names.index(name)
        own = answers[:, column]
        changed[:, column] = np.where(
            own < threshold, own / (2 * threshold), 0.5 + (own - threshold) / (2 * (1 - threshold))
        )
        if isinstance(target, Classes):
            changed[:, 1 - column] = 1 - changed[:, column]
    return changed


def choose_thresholds(target: Target, truth: Reals, answers: Reals, wanted: Sequence[str]) -> dict[str, float]:
    """Choose thresholds by slides that were not trained on, or take those that are given.

    Parameters
    ----------
    target
        Two classes, or several labels.
    truth
        (S,) numbers of classes, or (S, Q) labels of 1, 0 and NaN.
    answers
        (S, A) probabilities.
    wanted
        ``youden``, the threshold of the largest sum of sensitivity and specificity (Youden, 1950), for every label;
        or ``LABEL=NUMBER``, of one of two classes or of a label. Those that are given count before those chosen.

    Raises
    ------
    UsageError
        The target has no thresholds, or one is of no label or not between 0 and 1.
    DataError
        All slides are of one kind, so that nothing tells a threshold.
    """
    names = labels_of(target)
    if not names:
        raise UsageError(f"--threshold: for two classes or several labels, and the model answers {_words(target)}")
    given = dict(_read(target, each) for each in wanted if each != YOUDEN)
    if YOUDEN not in wanted:
        return given
    is_so = truth if isinstance(target, MultiLabel) else (truth == 1).astype(np.float64)[:, None]
    own = answers[:, [target.names.index(name) for name in names]]
    return {
        name: given.get(name) or _youden(name, is_so[:, number], own[:, number]) for number, name in enumerate(names)
    }


def _read(target: Target, text: str) -> tuple[str, float]:
    """Read ``LABEL=NUMBER``; a threshold of the first of two classes is one less that of the second."""
    name, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        value = -1.0
    if name not in target.names or not 0 < value < 1:
        raise UsageError(
            f"--threshold {text}: give youden, or a label and a number between 0 and 1, as in {target.names[-1]}=0.3 "
            f"(the model answers {_words(target)})"
        )
    first = isinstance(target, Classes) and name == target.names[0]
    return (target.names[1], 1 - value) if first else (name, value)


def _words(target: Target) -> str:
    return ", ".join(target.names)


def _youden(name: str, truth: Reals, probability: Reals) -> float:
    """Return the threshold between two slides that parts them best; of equally good ones that nearest to a half."""
    known = ~np.isnan(truth)
    is_so, probability = truth[known] > 0, probability[known]
    if is_so.all() or not is_so.any():
        raise DataError(f"--threshold youden: the validation slides are all {'' if is_so.all() else 'not '}{name}")
    values = np.unique(probability)
    middles = (values[1:] + values[:-1]) / 2
    if not len(middles):
        raise DataError(f"--threshold youden: all validation slides have one probability of {name}")
    gains = [(probability[is_so] > middle).mean() - (probability[~is_so] > middle).mean() for middle in middles]
    best = middles[np.isclose(gains, max(gains))]
    return float(best[np.abs(best - 0.5).argmin()])
