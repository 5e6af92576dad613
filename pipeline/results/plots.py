"""Plots of a report, by Plotly: how a run trained, and what is true against what was answered.

Shape letters: S slides, Q classes, T times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nested_ats.targets import Target
from pipeline.results.intervals import Numbers, Reals, accuracy_interval, wilson
from pipeline.results.measures import badness, kaplan_meier, ranking
from pipeline.results.verdict import in_words

_BINS = 8  # of the calibration, at most
_LEAST_IN_BIN = 5  # slides
_POINTS = 2000  # of a curve, or of a cloud; a screen shows no more
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe and Ito's, told apart by all


def curves(name: str, target: Target, metrics: Sequence[Mapping[str, Any]], best_by: str) -> list[str]:
    """Plot each figure of a training over its epochs, with the epoch whose weights are kept.

    Parameters
    ----------
    name
        The name of the run, by which its plots are told from those of others.
    target
        What was answered.
    metrics
        The metrics of each epoch, at least one.
    best_by
        ``train.best_by`` of the run.
    """
    epochs = [line["epoch"] for line in metrics]
    loss, by = target.loss_name, ranking(target).name
    names = {loss: in_words(loss), "accuracy": "accuracy", by: by, "entropy": "entropy of attention, nats"}
    best = best_epoch(target, metrics, best_by)
    place = re.sub(r"[^\w-]", "_", name)
    plots = []
    for figure, title in names.items():
        lines = []
        for prefix, label, colour in (("", "training", _COLOURS[0]), ("val_", "validation", _COLOURS[1])):
            if prefix + figure in metrics[0]:
                values = [line.get(prefix + figure) for line in metrics]
                lines.append(_line(epochs, values, label, colour))
        if lines:
            plots.append(_html(f"curve-{figure}-{place}", lines, title, x="epoch", mark=best))
    return plots


def best_epoch(target: Target, metrics: Sequence[Mapping[str, Any]], best_by: str) -> int | None:
    """Return the epoch whose weights are kept, by ``train.best_by``; None without validation."""
    judged = [(badness(line, target, best_by), int(line["epoch"])) for line in metrics]
    judged = [(value, epoch) for value, epoch in judged if math.isfinite(value)]
    return min(judged)[1] if judged else None


def roc(labels: Numbers, probabilities: Reals, names: Sequence[str]) -> str:
    """Plot the receiver operating characteristic of each class against the rest, with 95 % bands of its height."""
    lines: list[Any] = [_chance()]
    for number, name, colour in _one_of(names):
        positive = labels == number
        if positive.any() and not positive.all():
            hit, false = _thin(*_rates(positive, probabilities[:, number]))
            low, high = wilson(hit, int(positive.sum()))
            lines += [_band(false, low, high, colour), _line(false, hit, name, colour, shape="hv")]
    return _html("roc", lines, "ROC", x="false positive rate", y="true positive rate", unit=True)


def precision_recall(labels: Numbers, probabilities: Reals, names: Sequence[str]) -> str:
    """Plot precision over recall of each class against the rest, with 95 % bands of the precision."""
    lines: list[Any] = []
    for number, name, colour in _one_of(names):
        positive = labels == number
        if positive.any():
            order = np.argsort(-probabilities[:, number], kind="stable")
            hits, taken = positive[order].cumsum(), np.arange(1, len(order) + 1)
            last = np.append(np.diff(probabilities[order, number]) != 0, True)  # equal scores are taken together
            precision, recall, taken = _thin((hits / taken)[last], (hits / positive.sum())[last], taken[last])
            low, high = wilson(precision, taken)
            lines += [_band(recall, low, high, colour), _line(recall, precision, name, colour)]
    return _html("precision-recall", lines, "Precision and recall", x="recall", y="precision", unit=True)


def calibration(labels: Numbers, probabilities: Reals, cases: Numbers) -> str:
    """Plot how often the answered class is right over its probability, in bins of equally many slides."""
    sure, right = probabilities.max(1), probabilities.argmax(1) == labels
    order = np.argsort(sure, kind="stable")
    bins = np.array_split(order, max(1, min(_BINS, len(order) // _LEAST_IN_BIN)))
    said, seen = [float(sure[rows].mean()) for rows in bins], [float(right[rows].mean()) for rows in bins]
    limits = [accuracy_interval(right[rows], cases[rows]) for rows in bins]
    points = {
        **_line(said, seen, "slides", _COLOURS[0]),
        "mode": "markers",
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - value for (_, high), value in zip(limits, seen, strict=True)],
            "arrayminus": [value - low for (low, _), value in zip(limits, seen, strict=True)],
        },
    }
    both = [_chance("as sure as right"), points]
    return _html("calibration", both, "Calibration", x="probability of the answer", y="share right", unit=True)


def scatter(truth: Reals, answers: Reals, names: Sequence[str]) -> str:
    """Plot numbers, (S,), against what was answered, (S,), with the line on which they are equal."""
    ends = [float(min(truth.min(), answers.min())), float(max(truth.max(), answers.max()))]
    truth, answers, shown = _thin(truth, answers, np.asarray(names))
    points = {**_line(truth, answers, "slides", _COLOURS[0]), "mode": "markers", "text": shown.tolist()}
    equal = {**_line(ends, ends, "equal", "#888888"), "line": {"color": "#888888", "dash": "dot"}}
    return _html("scatter", [equal, points], "Each slide", x="true", y="answered")


def free_response(rates: Reals, sensitivities: Reals) -> str:
    """Plot the share of lesions found, (N,), over the false positives a slide, (N,)."""
    line = _line(rates, sensitivities, "attention", _COLOURS[0], shape="hv")
    return _html("froc", [line], "FROC", x="false positives a slide", y="share of lesions found")


def survival_by_risk(outcomes: Reals, risk: Reals) -> str:
    """Plot the survival of the half with the lower predicted risk and of the other half.

    Parameters
    ----------
    outcomes
        (S, 2) times and events.
    risk
        (S,), higher where the event comes earlier.
    """
    high, lines = risk > np.median(risk), []
    for name, rows, colour in (("lower", ~high, _COLOURS[0]), ("higher", high, _COLOURS[1])):
        if rows.any():
            times, survival = _thin(*kaplan_meier(outcomes[rows, 0], outcomes[rows, 1]))
            name = f"{name} predicted risk ({rows.sum()})"
            lines.append(_line([0, *times], [1, *survival], name, colour, shape="hv"))
            [lost] = _thin(np.sort(outcomes[rows & (outcomes[:, 1] == 0), 0]))
            there = survival[np.searchsorted(times, lost, side="right") - 1] if len(lost) else lost
            ticks = {**_line(lost, there, f"{name}: last seen", colour), "mode": "markers", "showlegend": False}
            lines.append({**ticks, "marker": {"symbol": "line-ns-open", "color": colour, "size": 9}})
    return _html("survival", lines, "Kaplan and Meier's estimate", x="time", y="share without the event")


def _one_of(names: Sequence[str]) -> list[tuple[int, str, str]]:
    """The classes that are plotted against the rest: of two the second, as the other is its mirror image."""
    numbers = [1] if len(names) == 2 else range(len(names))
    return [(number, names[number], _COLOURS[i % len(_COLOURS)]) for i, number in enumerate(numbers)]


def _rates(positive: NDArray[np.bool_], scores: Reals) -> tuple[Reals, Reals]:
    """True and false positive rates at every threshold, from (0, 0) to (1, 1)."""
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.diff(scores[order]) != 0, True)
    hits, misses = positive[order].cumsum()[last], (~positive[order]).cumsum()[last]
    return np.append(0.0, hits / positive.sum()), np.append(0.0, misses / (~positive).sum())


def _thin(*curves: NDArray[Any]) -> list[NDArray[Any]]:
    """Leave so many points of curves that a page opens, evenly, the first and the last among them."""
    count = len(curves[0])
    kept = np.unique(np.linspace(0, count - 1, min(count, _POINTS)).round().astype(np.int64))
    return [curve[kept] for curve in curves]


def _line(x: Any, y: Any, name: str, colour: str, *, shape: str = "linear") -> dict[str, Any]:
    values = {"x": [float(v) for v in x], "y": [None if v is None else float(v) for v in y]}
    return {"type": "scatter", "mode": "lines", "name": name, "line": {"color": colour, "shape": shape}, **values}


def _band(x: Reals, low: Reals, high: Reals, colour: str) -> dict[str, Any]:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    around = _line([*x, *x[::-1]], [*high, *low[::-1]], "95 %", colour)
    hidden = {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip"}
    return {**around, **hidden, "fill": "toself", "fillcolor": f"rgba({red},{green},{blue},0.15)"}


def _chance(name: str = "chance") -> dict[str, Any]:
    return {**_line([0, 1], [0, 1], name, "#888888"), "line": {"color": "#888888", "dash": "dot"}}


def _html(
    name: str,
    traces: Sequence[Mapping[str, Any]],
    title: str,
    *,
    x: str = "",
    y: str = "",
    unit: bool = False,
    mark: float | None = None,
) -> str:
    """Write a plot; `unit` axes go from 0 to 1, and `mark` is a place on the x axis to be marked as the best."""
    from plotly.graph_objects import Figure
    from plotly.io import to_html

    figure = Figure(list(traces))
    figure.update_layout(
        template="none",
        title={"text": title, "font": {"size": 15}},
        height=320,
        margin={"l": 55, "r": 15, "t": 45, "b": 75},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        legend={"orientation": "h", "y": -0.28},
    )
    for axis, words in (("xaxis", x), ("yaxis", y)):
        figure.update_layout({axis: {"title": words, "zeroline": False, "range": [-0.02, 1.02] if unit else None}})
    if mark is not None:
        figure.add_vline(mark, line={"dash": "dash", "color": "#888888"}, annotation_text="kept")
    options = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["lasso2d", "select2d"]}
    plot = to_html(figure, include_plotlyjs=False, full_html=False, div_id=name, config=options)
    return f"<figure>{plot}</figure>"
