"""``calibrate``: a temperature that makes a model's probabilities say how often it is right (Guo et al., 2017).

The logits of a class model are divided by it, which changes no ranking of classes. It is fitted to the predictions of
the validation slides, kept in the run, and applied by `predict` and `heatmap`.

Shape letters: S slides, Q classes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from nested_ats.targets import Classes, read_target
from pipeline.config import parse_config
from pipeline.data.manifest import read_entry
from pipeline.data.targets import row_of, truth
from pipeline.errors import DataError, UsageError
from pipeline.files import write_json
from pipeline.results.intervals import Numbers, Reals
from pipeline.results.measures import calibration_error
from pipeline.results.predict import predict
from pipeline.results.predictions import answers_of
from pipeline.results.settings import Options, prediction_settings
from pipeline.results.thresholds import YOUDEN, choose_thresholds, labels_of
from pipeline.runs import CALIBRATION, RUN, read_run

_LEAST = 1e-12  # probability, of which there is a logarithm
_RANGE = (1e-2, 1e2)  # of temperatures


def calibrate(
    run: Path,
    *,
    threshold: Sequence[str] = (),
    address: str = "none",
    workers: int = 1,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Fit the temperature of a run to its validation slides, choose thresholds, and keep both in calibration.json.

    Parameters
    ----------
    run
        The folder of a run that has finished, with validation slides.
    threshold
        How thresholds are chosen (`choose_thresholds`); by default there are none, and the most probable class is
        answered.
    address, workers, options
        See `pipeline.results.predict.predict`.

    Returns
    -------
    ``temperature``, which is None of several labels, and of classes that are all answered rightly where there are
    thresholds; ``thresholds``; ``slides`` and ``failed``; and of classes ``before`` and ``after`` with the
    ``cross_entropy`` and the expected calibration error ``ece`` of the validation slides.

    Raises
    ------
    UsageError
        The run has not finished, does not answer classes (or labels, with thresholds), or has no validation slides.
    DataError
        No temperature is best: all slides are answered rightly, or none can be read.
    """
    about = read_run(run)
    target = read_target(about["target"])
    if not (isinstance(target, Classes) or (threshold and labels_of(target))):
        raise UsageError(f"{run}: of a {target.kind} target; a temperature is for classes and grades")
    if threshold:
        choose_thresholds(target, np.zeros(0), np.zeros((0, 0)), [each for each in threshold if each != YOUDEN])
    entries = [read_entry(row) for row in about["entries"] if row["split"] == "val"]
    if not entries:
        raise UsageError(f"{run}: has no validation slides to calibrate by; train with data.validation above 0")
    own: Options = {**options, "uncalibrated": True}
    settings = prediction_settings(run, **own)
    with tempfile.TemporaryDirectory() as folder:
        rows = predict(entries, run, Path(folder), address=address, workers=workers, **own)
    pairs = [(entry, row) for entry, row in zip(entries, rows, strict=True) if row["status"] == "ok"]
    if not pairs:
        raise DataError(f"{run}: no validation slide can be read; the first: {rows[0]['error']}")
    config = parse_config({"target": about["config"]["target"]}, RUN).target
    labels = truth(target, config, [row_of(entry) for entry, _ in pairs]).numpy()
    probabilities = answers_of(target, [row for _, row in pairs])
    found: dict[str, Any] = {
        "model": settings.model_sha256,
        "temperature": None,
        "slides": len(pairs),
        "failed": len(rows) - len(pairs),
    }
    if isinstance(target, Classes):
        found |= _temperature(run, probabilities, labels, required=not threshold)
        probabilities = _softmax(np.log(np.clip(probabilities, _LEAST, 1)) / (found["temperature"] or 1))
    found["thresholds"] = choose_thresholds(target, labels, probabilities, threshold) if threshold else {}
    write_json(run / CALIBRATION, found)
    return found


def _temperature(run: Path, probabilities: Reals, labels: Numbers, *, required: bool) -> dict[str, Any]:
    logits = np.log(np.clip(probabilities, _LEAST, 1))
    temperature = fit_temperature(logits, labels)
    if temperature is None and required:
        raise DataError(
            f"{run}: all {len(labels)} validation slides are answered rightly, so that nothing tells how sure is too "
            "sure; calibrate with more validation slides (data.validation), or leave the model as it is"
        )
    after = _describe(logits / (temperature or 1), labels)
    return {"temperature": temperature, "before": _describe(logits, labels), "after": after}


def fit_temperature(logits: Reals, labels: Numbers) -> float | None:
    """Return the temperature of the least cross-entropy, within 0.01 and 100; None where all answers are right.

    The cross-entropy is convex in one over the temperature, and its slope there is the mean over slides of how far
    the logit that the model expects lies above that of the true class. It crosses 0 once, which bisection finds.

    Parameters
    ----------
    logits
        (S, Q), S >= 1; an equal shift of a slide's logits changes nothing.
    labels
        (S,), the numbers of the true classes.
    """
    if bool((logits.argmax(1) == labels).all()):
        return None
    own = logits[np.arange(len(labels)), labels]

    def slope(inverse: float) -> float:
        return float(((_softmax(logits * inverse) * logits).sum(1) - own).mean())

    low, high = (math.log(1 / limit) for limit in reversed(_RANGE))
    for _ in range(60):  # until no other number lies between
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def _describe(logits: Reals, labels: Numbers) -> dict[str, float]:
    probabilities = _softmax(logits)
    own = np.clip(probabilities[np.arange(len(labels)), labels], _LEAST, 1)
    return {"cross_entropy": float(-np.log(own).mean()), "ece": calibration_error(probabilities, labels)}


def _softmax(logits: Reals) -> Reals:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    shares: Reals = powers / powers.sum(1, keepdims=True)
    return shares
