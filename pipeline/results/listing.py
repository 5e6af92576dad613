"""List the training runs below a folder: what differs between them, how far they are, and how good they are."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nested_ats.targets import read_target
from pipeline.data.manifest import SPLITS
from pipeline.errors import UsageError
from pipeline.files import read_inside
from pipeline.results.evaluate import METRICS
from pipeline.results.predictions import read_about
from pipeline.runs import MODEL, RUN, model_fingerprint, read_metrics, read_run

_FIGURES = ("accuracy", "balanced_accuracy", "auc")  # of evaluations of before, which do not name theirs
_UNTOLD = ("data.cache", "data.features")  # where things are kept decides no result


def list_runs(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Describe the runs of a folder and of those below it.

    Returns
    -------
    ``runs``, in the order of their names, each with ``run`` (its folder), ``epochs`` that are done and those that are
    ``planned``, ``finished``, how many ``slides`` of each split, ``settings`` (those that differ between the runs),
    ``validation`` (figures of the best epoch), and ``tests``: of each evaluated folder of predictions below `folder`
    that its model made the name, the split, and its ``figures`` with their intervals. ``others`` are evaluated
    predictions of no single one of these models.

    Raises
    ------
    UsageError
        No run is there.
    """
    found = [path.parent for path in sorted(folder.rglob(RUN))]
    if not found:
        raise UsageError(
            f"{folder}: no training run here or below; give the folder of some --out of nested-ats train"
        )
    abouts = [read_run(run) for run in found]
    settings = [dict(_flat(about["config"])) for about in abouts]
    tests, models = list(_tests(folder)), [_model(run) for run in found]
    runs = [
        {
            "run": str(run),
            **_progress(run, about),
            "settings": own,
            "tests": [test for made_by, test in tests if made_by == model],
        }
        for run, about, own, model in zip(found, abouts, _differing(settings), models, strict=True)
    ]
    return {"runs": runs, "others": [test for made_by, test in tests if made_by not in models]}


def _flat(values: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration by their dotted names."""
    if name in _UNTOLD:
        return
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _flat(value, f"{name}.{key}".lstrip("."))
    elif isinstance(values, list) and any(isinstance(value, dict) for value in values):
        for number, value in enumerate(values):
            yield from _flat(value, f"{name}.{number}")
    else:
        yield name, values


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Keep what is not the same in all; a setting that one does not have is None there."""
    names = dict.fromkeys(name for each in settings for name in each)
    differ = [name for name in names if len({json.dumps(each.get(name)) for each in settings}) > 1]
    return [{name: each.get(name) for name in differ} for each in settings]


def _progress(run: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    counts = Counter(row["split"] for row in about["entries"])
    lines, course = read_metrics(run), about["config"]["train"]
    loss = read_target(about["target"]).loss_name
    figure = f"val_{loss if course['best_by'] == 'loss' else course['best_by']}"
    judged = [line for line in lines if not math.isnan(line.get(figure, math.nan))]
    best = (
        (min if course["best_by"] in ("loss", "mae") else max)(judged, key=lambda line: line[figure])
        if judged
        else {}
    )
    return {
        "epochs": len(lines),
        "planned": course["epochs"],
        "finished": (run / MODEL).is_dir(),
        "slides": {split: counts[split] for split in SPLITS if counts[split]},
        "validation": {name: value for name, value in best.items() if name == "epoch" or name.startswith("val_")},
    }


def _model(run: Path) -> str | None:
    return model_fingerprint(run) if (run / MODEL).is_dir() else None


def _tests(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the evaluated predictions below a folder, each with the model that made them."""
    for path in sorted(folder.rglob(METRICS)):
        try:
            metrics = json.loads(read_inside(path.parent, METRICS))
            test = {"predictions": str(path.parent), "slides": metrics["slides"], "split": metrics["split"]}
            names = metrics.get("measures", _FIGURES)
            test["figures"] = {name: {key: metrics[name][key] for key in ("value", "interval_95")} for name in names}
        except (ValueError, LookupError, TypeError):
            continue  # a file of that name of something else
        if (model := read_about(path.parent).get("model")) is not None:
            yield model, test
