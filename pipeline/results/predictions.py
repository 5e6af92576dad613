"""Read and write a folder of predictions: its table, and the file of each slide from which `predict` makes it.

slides/*.json           the result of each slide, written whole as it finishes
predictions.csv         one row a slide, in the order of the manifest
predictions.parquet     the same
predict.json            the settings of all of them
predict.lock            held by the process that predicts
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nested_ats import Classes, DiscreteSurvival, MultiLabel, Prediction, Target
from nested_ats.files import open_regular
from pipeline.config import digest
from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.files import file_name, read_inside, write_atomic, write_json
from pipeline.results.thresholds import Thresholds, decisive

RESULTS, TABLE, ABOUT, LOCK = "slides", "predictions", "predict.json", "predict.lock"
SIGNS = ("entropy", "uniform_entropy", "background")
_ERRORS = ("se_", "low_", "high_")  # each answer has a standard error, and an interval
PIXELS = "pixels"  # identities of them, in the result of a slide alone: they tell whether the training has seen them
_LAST = ("model", "status", "error")
OWN_COLUMNS = ("seen", "prediction", "draws", *SIGNS, "requests", "bytes_read", "seconds", *_LAST)  # and answers


def write_table(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write predictions.csv and predictions.parquet."""
    import pyarrow as pa
    from pyarrow import parquet

    names = list(dict.fromkeys(name for row in rows for name in row))
    # The identity comes first and the status last, whatever the first row has.
    names.sort(key=lambda name: _LAST.index(name) if name in _LAST else -1)
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(folder / f"{TABLE}.csv", text.getvalue())
    buffer = pa.BufferOutputStream()
    parquet.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), buffer)
    write_atomic(folder / f"{TABLE}.parquet", buffer.getvalue().to_pybytes())


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Read the rows of the table that `predict` wrote.

    Raises
    ------
    UsageError
        There is no table, or it is damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = folder / f"{TABLE}.parquet"
    try:
        rows: list[dict[str, Any]] = parquet.read_table(pa.BufferReader(read_inside(folder, path.name))).to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {path.name} here; give the --out of nested-ats predict") from None
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{path}: not a Parquet file ({reason}); run nested-ats predict again") from error
    return rows


def table_digest(folder: Path) -> str:
    """Hash the table that `read_predictions` reads, to tell whether it is the one that was evaluated."""
    return digest(read_inside(folder, f"{TABLE}.parquet").hex())


def check_folder(folder: Path, fingerprint: str, *, overwrite: bool) -> None:
    """See that a folder holds no predictions of other settings, or remove them.

    Raises
    ------
    UsageError
        The folder holds some, and `overwrite` is not set.
    """
    about = read_about(folder)
    same = about.get("fingerprint") == fingerprint
    there = list((folder / RESULTS).glob("*.json"))
    if there and not same and not overwrite:
        raise UsageError(
            f"{folder}: holds predictions of another model or other settings; give another --out, or --overwrite"
        )
    if overwrite:
        # The table goes, too: a run that is stopped from here on must not leave one of other settings.
        for path in (*there, folder / f"{TABLE}.csv", folder / f"{TABLE}.parquet"):
            path.unlink(missing_ok=True)


def write_result(results: Path, entry: Entry, row: dict[str, Any]) -> None:
    """Commit the result of a slide."""
    write_json(results / f"{file_name(entry.slide_id)}.json", {**_decisive(entry), **row})


def read_result(results: Path, entry: Entry) -> dict[str, Any] | None:
    """Return an earlier result of this slide; None where there is none, or it is damaged or of another file."""
    result = _read_object(results, f"{file_name(entry.slide_id)}.json")
    wanted = _decisive(entry)
    return result if result is not None and {name: result.pop(name, None) for name in wanted} == wanted else None


def _decisive(entry: Entry) -> dict[str, Any]:
    """What a manifest says of a slide that its result depends on: its place, its scale, and what its mask holds."""
    if entry.slides:
        return {"slides": [{"slide_id": slide.slide_id, **_decisive(slide)} for slide in entry.slides]}
    mask = None
    if entry.mask:
        with suppress(OSError), open_regular(Path(entry.mask)) as file:  # a mask at a URL goes by its name
            mask = hashlib.sha256(file.read()).hexdigest()[:16]
    return {"path": entry.path, "mpp": entry.mpp, "mask": mask or entry.mask or None}


def _read_object(folder: Path, name: str) -> dict[str, Any] | None:
    try:
        value = json.loads(read_inside(folder, name))
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_about(folder: Path) -> dict[str, Any]:
    """Read what `predict` says about the predictions in a folder; it is empty where there is nothing."""
    return _read_object(folder, ABOUT) or {}


def identity(entry: Entry) -> dict[str, str]:
    """Return the columns that say which slide this is, with those that its manifest brought along."""
    own = {"slide_id": entry.slide_id, "case_id": entry.case_id, "label": entry.label, "split": entry.split}
    return own | dict(entry.extra)


def answer_columns(target: Target) -> list[str]:
    """Return the columns of the answers: those that are probabilities have the prefix prob_."""
    return [f"prob_{name}" if target.probabilities else name for name in target.names]


def error_columns(target: Target) -> list[list[str]]:
    """Return the columns of the answers' standard errors, and of the lower and upper limits of their intervals."""
    return [[prefix + name for name in target.names] for prefix in _ERRORS]


def answers_of(target: Target, rows: Sequence[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Return the answers in rows of the table, (S, A)."""
    return np.array([[row[name] for name in answer_columns(target)] for row in rows], dtype=np.float64)


def answer_cells(target: Target, prediction: Prediction) -> dict[str, float | None]:
    """Return the cells of the answers of one slide, their standard errors and intervals; None stands for NaN."""
    names = [answer_columns(target), *error_columns(target)]
    values = (prediction.answers, prediction.standard_error, prediction.low, prediction.high)
    cells: dict[str, float | None] = {}
    for some, tensor in zip(names, values, strict=True):
        each = zip(some, tensor[0].tolist(), strict=True)
        cells |= {name: None if math.isnan(value) else value for name, value in each}
    return cells


def in_short(target: Target, answers: Sequence[float], thresholds: Thresholds | None = None) -> str:
    """Say in short what was answered for a slide.

    It is the most probable class, the labels that are more probable than not (or than their threshold), the number,
    the log hazard ratio, or the time that half of such slides survive.
    """
    answers = decisive(target, np.array([answers]), thresholds or {})[0].tolist()
    if isinstance(target, Classes):
        return target.classes[max(range(len(answers)), key=answers.__getitem__)]
    if isinstance(target, MultiLabel):
        return ";".join(name for name, answer in zip(target.labels, answers, strict=True) if answer > 0.5) or "none"
    if isinstance(target, DiscreteSurvival):
        past = [time for time, answer in zip(target.times, answers, strict=True) if answer < 0.5]
        return f"{past[0]:g}" if past else f"over {target.times[-1]:g}"
    return f"{answers[0]:.6g}"


def check_columns(entries: Sequence[Entry], target: Target, more: Sequence[str] = ()) -> None:
    """See that no column of a manifest has the name of one of the table's own, of which there may be `more`.

    A name that begins with prob_ would be taken for a class, too; columns such as low_grade are the user's own.
    """
    own = {*OWN_COLUMNS, *more, *answer_columns(target), *chain.from_iterable(error_columns(target))}
    for name in dict.fromkeys(name for entry in entries for name in entry.extra):
        if name in own or name.startswith("prob_"):
            raise UsageError(f"manifest: column {name} would be lost, as predictions have one too; rename it")
