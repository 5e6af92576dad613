"""``predict``: classify slides with a trained model, in this process or on a pool of workers.

Running it again classifies only the slides whose results are missing in the folder of predictions. Of a million
slides nothing is held in memory but their entries; results go to the disk as they come (`parts`), and the table is
made of them piece by piece.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

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
from pipeline.results.parts import BYTES, Parts
from pipeline.results.settings import Options, prediction_settings
from pipeline.results.table import LAST, Rows, write_pieces
from pipeline.results.verdict import run_shares
from pipeline.runs import read_run, short
from storage import Slide
from storage.images.image import TIFF_SUFFIXES
from storage.place.urls import is_remote

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_S = 1.0  # so many seconds of work are sent to a Ray worker at once, as long as slides take less
_OPENED = 10_000  # more are not opened beforehand to start the largest first, which evens the end of a short run
_PIECE = 16_384  # rows of the table that are made at once


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
) -> Rows:
    """Classify slides.

    Parameters
    ----------
    entries
        The slides; labels are carried into the table where there are any.
    run
        The folder of a training run that has finished.
    folder
        Where predictions.csv, predictions.parquet and the parts go that they are made of.
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
    The table's row of each slide, in the order of `entries`; failed slides have an ``error`` and no answers.
    ``split`` is the run's where the manifest has none, ``seen`` says whether the training has seen the slide
    (`RunSplits.seen`), and ``model`` tells which model answered.

    Raises
    ------
    UsageError
        `run` is no finished run, `samples` does not fit the model, `folder` holds other predictions, or another
        process writes to it.
    """
    settings = prediction_settings(run, **options)
    about = read_run(run)
    target, splits = read_target(about["target"]), RunSplits.of_run(about)
    entries, fingerprint, model = splits.fill(entries), settings.fingerprint, short(settings.model_sha256)
    if settings.unit == "case":
        entries = group_cases(entries)
    predictions.check_columns(entries, target)
    make_folder(folder)
    with alone(folder / predictions.LOCK, "another prediction is being written there"):
        predictions.check_folder(folder, fingerprint, overwrite=overwrite)
        # What `evaluate` wants to know of the training.
        facts = {"model": model, "target": about["target"], "told_by": about["config"]["target"]}
        facts |= {"thresholds": settings.thresholds} if settings.thresholds else {}
        facts |= {"class_shares": shares} if (shares := run_shares(about)) else {}
        write_json(folder / predictions.ABOUT, {"settings": settings.plain, "fingerprint": fingerprint, **facts})
        parts = Parts(folder / predictions.PARTS, predictions.result_schema(target), workers)
        receipts = np.fromiter(map(predictions.receipt, entries), f"S{BYTES}", len(entries))
        missing = np.flatnonzero(parts.find(receipts) < 0).tolist()
        tasks = cluster.run_tasks(
            partial(Classifier, settings),
            [entries[number] for number in missing],
            key=lambda entry: entry.slide_id,
            address=address,
            workers=workers,
            device=settings.device,
            timeout_s=timeout_s,
            cost=pixels if len(missing) <= _OPENED else None,
            batch_s=_BATCH_S,
        )
        with closing(tasks):
            errors = _collect(tasks, parts, len(entries) - len(missing), len(entries))
        found = parts.find(receipts)
        pieces = (slice(start, start + _PIECE) for start in range(0, max(len(entries), 1), _PIECE))
        names = list(dict.fromkeys(name for entry in entries for name in predictions.identity(entry)))
        finish = partial(_finish, names=names, splits=splits, model=model, errors=errors)
        write_pieces(folder, (finish(entries[piece], parts.take(found[piece])) for piece in pieces))
    return predictions.read_predictions(folder)


def _collect(outcomes: Iterable[cluster.Outcome[Entry, Any]], parts: Parts, done: int, count: int) -> dict[str, str]:
    """Keep results as they come; return the errors of slides that have none."""
    errors = {}
    with progress("predict") as update:
        try:
            for number, outcome in enumerate(outcomes, done + 1):
                entry, row = outcome.item, outcome.result or failed(outcome.error)  # none: its worker was lost
                if row["status"] == "ok":
                    parts.add(predictions.receipt(entry), row, row["seconds"])
                else:
                    errors[entry.slide_id] = row["error"]
                update(number, count, entry.slide_id)
        finally:
            parts.flush()
    return errors


def _finish(
    entries: Sequence[Entry],
    results: pa.Table,
    *,
    names: Sequence[str],
    splits: RunSplits,
    model: str,
    errors: Mapping[str, str],
) -> pa.Table:
    """Make the piece of the table of some entries and their results, which are null where there are none."""
    import pyarrow as pa

    rows = [predictions.identity(entry) for entry in entries]
    texts = {name: [row.get(name) for row in rows] for name in names}
    pixels, there = (results.column(name).to_pylist() for name in (predictions.PIXELS, "prediction"))
    texts["seen"] = [splits.seen(entry, known or ()) for entry, known in zip(entries, pixels, strict=True)]
    texts["model"] = [model] * len(entries)
    texts["status"] = ["failed" if answer is None else "ok" for answer in there]
    changed = "its mask changed while it was classified; run predict again"
    texts["error"] = [
        errors.get(entry.slide_id, changed) if answer is None else ""
        for entry, answer in zip(entries, there, strict=True)
    ]
    columns = {name: pa.array(cells, pa.string()) for name, cells in texts.items()}
    numbers = {name: results.column(name) for name in results.column_names if name != predictions.PIXELS}
    return pa.table({name: {**columns, **numbers}[name] for name in (*names, "seen", *numbers, *LAST)})


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
