"""The table and the figure of `rivals.py`, from its result file alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from made_with import print_versions
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rivals_data import TASKS
from rivals_run import METHODS

from pipeline.results.intervals import wilson

Piece = dict[str, Any]
SHOWN = [name for method in METHODS for name in (method, f"{method}, one draw")]
_AXES = {
    "bytes": "bytes read of a test image",
    "pixels": "pixels read over those of the image",
    "test_seconds": "seconds for a test image",
    "images": "images to train on",
}


def show(pieces: Sequence[Piece]) -> None:
    """Print a table a task: means over seeds, and the interval that so many test images leave."""
    pieces = with_one_draw(pieces)
    for task in [name for name in TASKS if any(each["task"] == name for each in pieces)]:
        own = [each for each in pieces if each["task"] == task]
        print(f"\n{task}: {' x '.join(map(str, TASKS[task].shape_yx))} pixels")
        print(
            f"{'method':24}{'images':>7}{'epochs':>7}{'seeds':>6}{'test error [95 %]':>24}{'AUC':>7}{'kB read':>9}",
            end="",
        )
        print(f"{'pixels':>8}{'s/test image':>14}{'s/image trained':>17}{'hours':>7}{'peak GB':>9}")
        for group in grouped(own):
            print(line(group))
        for words in TASKS[task].published:
            print(f"published: {words}")
    print(
        "\nkB: read of files, compressed. pixels: read at all levels, over those of the finest. hours: of training."
    )
    print_versions(pieces)


def with_one_draw(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces, and after each that was tested with one draw too a piece of that test."""
    tests = [
        [each, *({**each, **test, "method": f"{each['method']}, one draw"} for test in each["one_draw"])]
        for each in pieces
    ]
    return [each for both in tests for each in both]


def grouped(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Pieces that differ in the seed alone, by images, and then in the order of `SHOWN`."""
    groups: dict[tuple[int, int, int], list[Piece]] = {}
    for each in pieces:
        groups.setdefault((each["images"], SHOWN.index(each["method"]), each["epochs"]), []).append(each)
    return [groups[key] for key in sorted(groups)]


def line(group: Sequence[Piece]) -> str:
    """One line of the table."""
    first = group[0]
    error = _mean(group, "test_error")
    low, high = wilson(error, first["tests"])
    interval = f"{100 * error:.1f} [{100 * low:.1f}, {100 * high:.1f}] %"
    auc = f"{_mean(group, 'auc'):.3f}" if "auc" in first else ""
    words = f"{first['method']:24}{first['images']:7}{first['epochs']:7}{len(group):6}{interval:>24}{auc:>7}"
    words += f"{_mean(group, 'bytes') / 1e3:9.1f}{_mean(group, 'pixels'):8.1%}{_mean(group, 'test_seconds'):14.3f}"
    hours = _mean(group, "training_seconds") / 3600
    return words + f"{_mean(group, 'image_seconds'):17.4f}{hours:7.2f}{_mean(group, 'peak_bytes') / 1e9:9.2f}"


def draw(pieces: Sequence[Piece], path: Path) -> None:
    """Write a figure, a row for each task: test error against bytes, pixels, time, and training images."""
    pieces = with_one_draw(pieces)
    tasks = [name for name in TASKS if any(each["task"] == name for each in pieces)]
    figure = Figure(figsize=(4 * len(_AXES), 3.2 * len(tasks)), layout="constrained")
    for panels, task in zip(figure.subplots(len(tasks), len(_AXES), squeeze=False), tasks, strict=True):
        own = [each for each in pieces if each["task"] == task]
        most = [each for each in own if each["images"] == max(other["images"] for other in own)]
        for panel, (name, words) in zip(panels, _AXES.items(), strict=True):
            for method in SHOWN:
                shown = own if name == "images" else most
                _points(panel, [group for group in grouped(shown) if group[0]["method"] == method], name)
            panel.set(xlabel=words, ylabel="test error", xscale="log", title=task, ylim=(0, 1))
            panel.grid(alpha=0.3)
        panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _points(panel: Axes, groups: Sequence[Sequence[Piece]], name: str) -> None:
    if not groups:
        return
    errors = [_mean(group, "test_error") for group in groups]
    limits = [wilson(error, group[0]["tests"]) for error, group in zip(errors, groups, strict=True)]
    reach = [[e - float(low) for e, (low, _) in zip(errors, limits, strict=True)]]
    reach += [[float(high) - e for e, (_, high) in zip(errors, limits, strict=True)]]
    places = [_mean(group, name) for group in groups]
    style = "-" if name == "images" else ""
    panel.errorbar(places, errors, yerr=reach, marker="o", linestyle=style, capsize=2, label=groups[0][0]["method"])


def _mean(group: Sequence[Piece], name: str) -> float:
    return statistics.fmean(each.get(name, math.nan) for each in group)
