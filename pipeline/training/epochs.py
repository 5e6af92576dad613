"""The metrics of an epoch: summed over slides and workers, put into words, and drawn as curves.

Shape letters: S slides, Q classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from torch import Tensor

from cluster import Context
from pipeline.data.manifest import Entry
from pipeline.results.intervals import area, area_interval, case_numbers
from pipeline.results.verdict import guess_cross_entropy, verdict
from pipeline.runs import CURVES, Position, read_metrics

TOTALS = ("loss", "cross_entropy", "accuracy", "entropy", "uniform_entropy", "background", "patches", "slides")


def means(totals: Tensor) -> dict[str, float]:
    """Means over the slides of an epoch so far; that of background is over the drawn patches, if there are any."""
    sums = dict(zip(TOTALS, totals.tolist(), strict=True))
    background, patches, slides = (sums.pop(name) for name in ("background", "patches", "slides"))
    found = {name: value / slides if slides else math.nan for name, value in sums.items()}
    return found | ({"background": background / patches} if patches else {})


def stored_share(looked_up: Tensor) -> dict[str, float]:
    """Share of patches whose features were kept, from (2,) found and looked up; empty if none was looked up."""
    found, asked = looked_up.tolist()
    return {"stored": found / asked} if asked else {}


def describe(metrics: Mapping[str, float]) -> str:
    """Describe the metrics of an epoch in a few words, for a progress bar."""
    cross_entropy, accuracy, entropy = (metrics[name] for name in ("cross_entropy", "accuracy", "entropy"))
    stored = f" {metrics['stored']:.0%} of patches stored" if "stored" in metrics else ""
    return f"cross-entropy {cross_entropy:.3f} accuracy {accuracy:.3f} entropy {entropy:.2f}{stored}"


def validation_auc(entries: Sequence[Entry], classes: Sequence[str], probabilities: Tensor) -> dict[str, float]:
    """Area under the ROC curve of the validation slides with its 95 % interval; empty where there is none.

    Parameters
    ----------
    entries
        The S slides.
    classes
        Names of the Q classes.
    probabilities
        (S, Q), with zeros for a slide that could not be read.
    """
    answers = probabilities.double().cpu().numpy()
    read = [i for i, answer in enumerate(answers) if answer.any()]
    cases = case_numbers((entries[i].case_id, entries[i].slide_id) for i in read)
    labels = np.array([classes.index(entries[i].label) for i in read])
    value = area(labels, answers[read]) if read else None
    if value is None:
        return {}
    low, high = area_interval(labels, answers[read], cases)[0]
    return {"val_auc": value, "val_auc_low": low, "val_auc_high": high}


def epoch_verdict(
    metrics: Mapping[str, float], training: Sequence[Entry], validation: Sequence[Entry], shares: Mapping[str, float]
) -> str:
    """Judge an epoch's metrics in words (`verdict`), by the validation slides where they suffice.

    Parameters
    ----------
    metrics
        Metrics of the epoch.
    training, validation
        The slides of each.
    shares
        `class_shares` of the training slides.
    """
    prefix = "val_" if "val_auc" in metrics else ""  # on slides of one class, always answering it is best
    return verdict(
        cross_entropy=metrics[f"{prefix}cross_entropy"],
        guess=guess_cross_entropy(shares, [entry.label for entry in (validation if prefix else training)]),
        auc=metrics.get("val_auc"),
        interval=(metrics["val_auc_low"], metrics["val_auc_high"]) if "val_auc" in metrics else None,
        entropy=metrics["entropy"],
        uniform=metrics["uniform_entropy"],
        background=metrics.get("background"),
    )


class Curves:
    """TensorBoard curves, written by rank 0; epochs that will be repeated are dropped from them."""

    def __init__(self, folder: Path, position: Position, context: Context) -> None:
        self.writer = None
        if context.rank == 0:
            from torch.utils.tensorboard import SummaryWriter

            there = (folder / CURVES).is_dir()
            self.writer = SummaryWriter(str(folder / CURVES), purge_step=position.epoch + 1)
            for metrics in [] if there else read_metrics(folder):  # of a run that goes on from its copy
                self.write(metrics)

    def write(self, metrics: Mapping[str, Any]) -> None:
        """Add an epoch to the curves."""
        for name, value in metrics.items():
            if self.writer and name not in ("epoch", "verdict"):
                self.writer.add_scalar(name, value, int(metrics["epoch"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.writer:
            self.writer.close()
