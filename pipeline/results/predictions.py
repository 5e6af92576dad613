"""Read and write a folder of predictions: its table, and the parts from which `predict` makes it.

parts/*.parquet         the results of slides as they finish
predictions.csv         one row a slide, in the order of the manifest
predictions.parquet     the same
predict.json            the settings of all of them
predict.lock            held by the process that predicts
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nested_ats import Classes, DiscreteSurvival, MultiLabel, Prediction, Target
from nested_ats.files import open_regular
from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.files import open_inside, read_inside
from pipeline.results.parts import BYTES, part_files
from pipeline.results.table import LAST, TABLE, Rows
from pipeline.results.thresholds import Thresholds, decisive

if TYPE_CHECKING:
    import pyarrow as pa

PARTS, ABOUT, LOCK = "parts", "predict.json", "predict.lock"
SIGNS = ("entropy", "uniform_entropy", "background")
_ERRORS = ("se_", "low_", "high_")  # each answer has a standard error, and an interval
PIXELS = "pixels"  # identities of them, in the parts alone: they tell whether the training has seen them
OWN_COLUMNS = ("seen", "prediction", "draws", *SIGNS, "requests", "bytes_read", "seconds", *LAST)  # and answers


def read_predictions(folder: Path) -> Rows:
    """Read the rows of the table that `predict` wrote.

    Raises
    ------
    UsageError
        There is no table, or it is damaged.
    """
    try:
        return Rows(folder)
    except FileNotFoundError:
        raise UsageError(f"{folder}: no {TABLE}.parquet here; give the --out of nested-ats predict") from None


def table_digest(folder: Path) -> str:
    """Hash the table that `read_predictions` reads, to tell whether it is the one that was evaluated."""
    with open_inside(folder, f"{TABLE}.parquet") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def check_folder(folder: Path, fingerprint: str, *, overwrite: bool) -> None:
    """See that a folder holds no predictions of other settings, or remove them.

    Raises
    ------
    UsageError
        The folder holds some, and `overwrite` is not set.
    """
    about = read_about(folder)
    same = about.get("fingerprint") == fingerprint
    there = part_files(folder / PARTS)
    if there and not same and not overwrite:
        raise UsageError(
            f"{folder}: holds predictions of another model or other settings; give another --out, or --overwrite"
        )
    if overwrite:
        # The table goes, too: a run that is stopped from here on must not leave one of other settings.
        for path in (*there, folder / f"{TABLE}.csv", folder / f"{TABLE}.parquet"):
            path.unlink(missing_ok=True)


def result_schema(target: Target) -> pa.Schema:
    """Return the columns of the results of slides, in the order of the table."""
    import pyarrow as pa

    numbers = [*answer_columns(target), *chain.from_iterable(error_columns(target))]
    types = {
        "prediction": pa.string(),
        **dict.fromkeys(numbers, pa.float64()),
        "draws": pa.int64(),
        **dict.fromkeys(SIGNS, pa.float64()),
        **dict.fromkeys(("requests", "bytes_read"), pa.int64()),
        "seconds": pa.float64(),
        PIXELS: pa.list_(pa.string()),
    }
    return pa.schema(types.items())


def receipt(entry: Entry) -> bytes:
    """Name a slide and what a manifest says of it that its result depends on, in `BYTES` bytes.

    This is its place, its scale, and what its mask holds.
    """
    told = [text for slide in entry.slides or [entry] for text in (slide.slide_id, *_decisive(slide))]
    return hashlib.blake2b("\0".join([entry.slide_id, *told]).encode(), digest_size=BYTES).digest()


def _decisive(entry: Entry) -> tuple[str, str, str]:
    mask = ""
    if entry.mask:
        with suppress(OSError), open_regular(Path(entry.mask)) as file:  # a mask at a URL goes by its name
            mask = hashlib.sha256(file.read()).hexdigest()[:16]
    return entry.path, str(entry.mpp), mask or entry.mask


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
