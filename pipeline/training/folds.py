"""``train --fold all``: one training for each fold, one after another, or side by side on workers of a Ray cluster.

Every fold is a run of its own in a folder of its own, so that what holds of runs holds of folds: one that was stopped
goes on where it was, and one that is finished stays as it is. A fold that fails is reported, and the others go on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import cluster
from pipeline.config import Config
from pipeline.data.manifest import Entry
from pipeline.data.selection import Failure
from pipeline.errors import UsageError
from pipeline.files import file_name, make_folder
from pipeline.net import Net
from pipeline.runs import RUN
from pipeline.training.train import train


@dataclass(frozen=True)
class FoldResult:
    """What became of a fold's training."""

    fold: str
    folder: Path
    metrics: dict[str, Any] = field(default_factory=dict)  # of its last epoch
    failures: list[Failure] = field(default_factory=list)  # slides that were left out
    error: str = ""  # why it has no model; empty where it has one


def fold_folder(folder: Path, fold: str) -> Path:
    """Return the folder of a fold's run."""
    return folder / file_name(f"fold-{fold}")


def train_folds(
    folds: Mapping[str, Sequence[Entry]],
    config: Config,
    folder: Path,
    *,
    address: str = "none",
    workers: int = 1,
    device: str = "auto",
    mirror: str | None = None,
    init: Path | None = None,
    overwrite: bool = False,
    fail_fast: bool = False,
) -> Iterator[FoldResult]:
    """Train a model for each fold, or go on with those that were interrupted.

    Parameters
    ----------
    folds
        The slides of each fold's training with their splits (`pipeline.data.split_table.fold_entries`).
    config
        The resolved configuration, which all folds share.
    folder
        Gets the folders ``fold-NAME`` of the runs.
    address, workers
        Where and how many folds are trained at the same time, each by one worker; ``none`` trains one after another
        in this process.
    device, init, overwrite, fail_fast
        See `train`.
    mirror
        URL below which each run has its copy.

    Yields
    ------
    FoldResult
        One for each fold, as it ends.

    Raises
    ------
    UsageError
        `folder` is itself that of a run.
    """
    if (folder / RUN).exists():
        raise UsageError(f"{folder}: holds a run; give the folds another --out, below which each has its own")
    make_folder(folder)
    options = {"device": device, "init": init, "overwrite": overwrite, "fail_fast": fail_fast}
    tasks = cluster.run_tasks(
        partial(_Worker, folds, config, folder, mirror, options),
        list(folds),
        key=lambda fold: f"fold {fold}",
        address=address,
        workers=workers,
        device=device,
    )
    with closing(tasks):
        for outcome in tasks:
            fold = outcome.item
            yield outcome.result or FoldResult(fold, fold_folder(folder, fold), error=outcome.error or "")


class _Worker:
    """Trains one fold at a time in this process."""

    def __init__(
        self,
        folds: Mapping[str, Sequence[Entry]],
        config: Config,
        folder: Path,
        mirror: str | None,
        options: Mapping[str, Any],
    ) -> None:
        self._folds, self._config, self._folder = folds, config, folder.absolute()
        self._mirror, self._options = mirror, options

    def __call__(self, fold: str) -> FoldResult:
        place = fold_folder(self._folder, fold)
        mirror = f"{self._mirror.rstrip('/')}/{place.name}" if self._mirror else None
        with Net() as net:
            metrics, failures = train(self._folds[fold], self._config, place, mirror=mirror, **self._options)
            return FoldResult(fold, place, metrics, failures)
        return FoldResult(fold, place, error=net.error)
