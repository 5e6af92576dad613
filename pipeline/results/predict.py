"""``predict``: classify slides with a trained model, in this process or on a pool of workers.

Running it again classifies only the slides whose results are missing in the folder of predictions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import cluster
from nested_ats.targets import read_target
from pipeline.data.cases import group_cases
from pipeline.data.manifest import Entry
from pipeline.data.splits import RunSplits
from pipeline.files import alone, make_folder, write_json
from pipeline.net import Net
from pipeline.progress import progress
from pipeline.results import predictions
from pipeline.results.classifier import Classifier, failed
from pipeline.results.settings import Options, prediction_settings
from pipeline.results.verdict import run_shares
from pipeline.runs import read_run, short
from storage import Slide
from storage.images.image import TIFF_SUFFIXES
from storage.place.urls import is_remote


def predict(
    entries: Sequence[Entry],
    run: Path,
    folder: Path,
    *,
    address: str = "none",
    workers: int = 1,
    timeout_s: float = 3600.0,
    overwrite: bool = False,
    **options: Unpack[Options],
) -> list[dict[str, Any]]:
    """Classify slides.

    Parameters
    ----------
    entries
        The slides; labels are carried into the table where there are any.
    run
        The folder of a training run that has finished.
    folder
        Where predictions.csv, predictions.parquet and one JSON file a slide go.
    address, workers
        The address of a Ray cluster and the number of workers there; ``none`` is this process.
    timeout_s
        How many seconds a slide may take before its Ray worker is replaced.
    overwrite
        Whether to classify again what is there.
    options
        The `Settings` to change.

    Returns
    -------
    The table's row of each slide, in the order of `entries`; failed slides have an ``error``. ``split`` is the run's
    where the manifest has none, ``seen`` says whether the training has seen the slide (`RunSplits.seen`), and
    ``model`` tells which model answered.

    Raises
    ------
    UsageError
        `run` is no finished run, `samples` does not fit the model, `folder` holds other predictions, or another
        process writes to it.
    """
    settings = prediction_settings(run, **options)
    about = read_run(run)
    splits, model = RunSplits(about["entries"], about["identities"]), short(settings.model_sha256)
    entries, fingerprint = splits.fill(entries), settings.fingerprint
    if settings.unit == "case":
        entries = group_cases(entries)
    predictions.check_columns(entries, read_target(about["target"]))
    results = make_folder(folder / predictions.RESULTS)
    with alone(folder / predictions.LOCK, "another prediction is being written there"):
        predictions.check_folder(folder, fingerprint, overwrite=overwrite)
        # What `evaluate` wants to know of the training.
        facts = {"model": model, "target": about["target"], "told_by": about["config"]["target"]}
        facts |= {"thresholds": settings.thresholds} if settings.thresholds else {}
        facts |= {"class_shares": shares} if (shares := run_shares(about)) else {}
        write_json(folder / predictions.ABOUT, {"settings": settings.plain, "fingerprint": fingerprint, **facts})
        rows = {entry.slide_id: predictions.read_result(results, entry) for entry in entries}
        tasks = cluster.run_tasks(
            partial(Classifier, settings),
            [entry for entry in entries if rows[entry.slide_id] is None],
            key=lambda entry: entry.slide_id,
            address=address,
            workers=workers,
            device=settings.device,
            timeout_s=timeout_s,
            cost=pixels,
        )
        with closing(tasks):
            _collect(tasks, rows, results)
        table = []
        for entry in entries:
            row = dict(rows[entry.slide_id] or {})
            seen = splits.seen(entry, row.pop(predictions.PIXELS, ()))
            table.append(predictions.identity(entry) | {"seen": seen} | row | {"model": model})
        predictions.write_table(folder, table)
        return table


def _collect(
    outcomes: Iterable[cluster.Outcome[Entry, Any]], rows: dict[str, dict[str, Any] | None], results: Path
) -> None:
    """Enter results in the rows as they come, and commit each to its file."""
    with progress("predict") as update:
        for outcome in outcomes:
            entry = outcome.item
            row = outcome.result or failed(outcome.error)  # there is no result where its worker was lost
            if row["status"] == "ok":
                predictions.write_result(results, entry, row)
            rows[entry.slide_id] = row
            update(sum(row is not None for row in rows.values()), len(rows), entry.slide_id)


def pixels(entry: Entry) -> int:
    """Count the pixels of a local slide, so that the largest start first; for others it takes a request: 0."""
    if entry.slides:
        return sum(map(pixels, entry.slides))
    if is_remote(entry.path):
        return 0
    with Net():
        if os.path.isdir(entry.path) or entry.path.lower().endswith(TIFF_SUFFIXES):  # others are decoded whole
            with Slide(entry.path) as slide:
                return math.prod(slide.shape_yx)
    return 0
