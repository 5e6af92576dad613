"""The tables of `learning.py`, from its result files alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from learning_arms import ARMS, TASKS
from learning_run import DRAWS
from made_with import print_versions


def show(results: dict[str, Any]) -> None:
    """Print a table for each task: median over seeds, and range."""
    for name in TASKS:
        task = results["settings"][name]
        images = f"{task['train']} images" + ("" if task["folds"] else f" to train on and {task['test']} to test on")
        print(f"\n{name}: {images}, {task['folds'] or 'no'} folds, {task['epochs']} epochs")
        print(f"{'arm':58}{'seeds':>6}{'test error':>20}{'four draws':>20}{'AUC':>24}{'epochs to 90 %':>16}{'s':>6}")
        for arm in ARMS:
            runs = runs_of(results["runs"], name, arm)
            if runs:
                errors = [spread([100 * each[f"test_error_{draws}"] for each in runs], "{:.1f}") for draws in DRAWS]
                auc = spread([each[f"auc_{DRAWS[0]}"] for each in runs], "{:.3f}") if task["classes"] == 2 else ""
                epochs = spread([each["epochs_to_90"] or math.inf for each in runs], "{:.0f}")
                seconds = statistics.median(each["seconds"] for each in runs)
                cells = "".join(f"{each + ' %':>20}" for each in errors)
                print(f"{arm:58}{len(runs):6}{cells}{auc:>24}{epochs:>16}{seconds:6.0f}")
    print("\nmedian [range] over seeds; inf: never reached. Test and AUC: one draw an image, where not four.")
    print_versions(results["runs"])


def runs_of(runs: Sequence[dict[str, Any]], task: str, arm: str) -> list[dict[str, Any]]:
    """Those of one arm of a task."""
    return [each for each in runs if (each["task"], each["arm"]) == (task, arm)]


def spread(values: list[float], form: str) -> str:
    """Median [range]."""
    middle, low, high = (form.format(v) for v in (statistics.median(values), min(values), max(values)))
    return f"{middle} [{low}, {high}]"


def compare(files: Sequence[dict[str, Any]]) -> None:
    """Print two tables, in Markdown, of the arms of all tasks of some result files: medians over seeds, and ranges.

    Raises
    ------
    SystemExit
        Runs of a task have other settings in one file than in another.
    """
    runs = [each for file in files for each in file["runs"]]
    tasks = [name for name in TASKS if any(each["task"] == name for each in runs)]
    for name in tasks:
        having = [file["settings"] for file in files if any(each["task"] == name for each in file["runs"])]
        if any((each[name], each["course"]) != (having[0][name], having[0]["course"]) for each in having):
            raise SystemExit(f"{name}: the files have it by different settings, which no one table can show")
    for title, key, unit, form in (
        (f"test error of {DRAWS[-1]} draws in percent", f"test_error_{DRAWS[-1]}", 100, "{:.1f}"),
        ("epochs to 90 % of the training images", "epochs_to_90", 1, "{:.0f}"),
    ):
        print(f"| {title} | {' | '.join(tasks)} |\n|{'---|' * (len(tasks) + 1)}")
        for arm in ARMS:
            cells = [[each[key] for each in runs_of(runs, name, arm)] for name in tasks]
            if any(cells):
                told = [brief([math.inf if each is None else unit * each for each in cell], form) for cell in cells]
                print(f"| {arm} | {' | '.join(told)} |")
        print()


def brief(values: list[float], form: str) -> str:
    """Median and range over seeds, and the number of those where it is not three."""
    if not values:
        return ""
    words = (spread(values, form) if len(set(values)) > 1 else form.format(values[0])).replace("inf", "never")
    return words if len(values) == 3 else f"{words} ({len(values)} seed{'s' if len(values) > 1 else ''})"
