"""Plots of what is true against what was answered, as PNGs.

Shape letters: S slides, T times.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pipeline.results.intervals import Reals
from pipeline.results.measures import kaplan_meier
from pipeline.results.pictures import to_png


def scatter(truth: Reals, answers: Reals) -> bytes:
    """Plot numbers, (S,), against what was answered, (S,), with the line on which they are equal."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    axes = figure.subplots()
    ends = [float(min(truth.min(), answers.min())), float(max(truth.max(), answers.max()))]
    axes.plot(ends, ends, color="grey", linewidth=1, label="equal")
    axes.scatter(truth, answers, s=16)
    axes.set(xlabel="true", ylabel="answered", title="Each slide")
    axes.legend()
    return to_png(figure)


def survival_by_risk(outcomes: Reals, risk: Reals) -> bytes:
    """Plot the survival of the half with the lower predicted risk and of the other half.

    Parameters
    ----------
    outcomes
        (S, 2) times and events.
    risk
        (S,), higher where the event comes earlier.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    high = risk > np.median(risk)
    for name, rows in (("lower predicted risk", ~high), ("higher predicted risk", high)):
        if rows.any():
            _step(axes, outcomes[rows], f"{name} ({rows.sum()})")
    axes.set(ylim=(0, 1.03), xlabel="time", ylabel="share without the event", title="Kaplan and Meier's estimate")
    axes.legend()
    return to_png(figure)


def _step(axes: Any, outcomes: Reals, label: str) -> None:
    times, survival = kaplan_meier(outcomes[:, 0], outcomes[:, 1])
    (line,) = axes.step([0, *times], [1, *survival], where="post", label=label)
    lost = outcomes[outcomes[:, 1] == 0, 0]
    place = np.searchsorted(times, lost, side="right") - 1
    there = np.where(place >= 0, survival[np.maximum(place, 0)], 1.0)
    axes.plot(lost, there, "|", color=line.get_color())  # the last look at slides without the event
