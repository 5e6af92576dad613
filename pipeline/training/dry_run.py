"""``train --dry-run``: find what a training would refuse and what it would cost, without writing anything.

Notable: the cost is that of real steps of the training's own `Trainer`. The first is not measured, since code is
loaded and memory is first touched in it; the next one is, with its reads side by side as in training.
"""

from __future__ import annotations

import math
import os
import resource
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

import cluster
from nested_ats.config import EncoderConfig
from nested_ats.targets import Classes
from pipeline.config import Config
from pipeline.data.manifest import SPLITS, Entry
from pipeline.data.samples import Sample, SampleCache
from pipeline.data.selection import Failure, Selection, select
from pipeline.data.slides import Opening
from pipeline.data.targets import strata
from pipeline.errors import DataError, UsageError
from pipeline.files import make_folder
from pipeline.progress import duration
from pipeline.sections import AnyTarget
from pipeline.training.mirror import Mirror
from pipeline.training.train import check_folder, worker_arguments
from pipeline.training.trainer import make_trainer


@dataclass(frozen=True)
class Cost:
    """Cost of one training step of one worker."""

    slides: int  # those that could be read
    read_bytes: int  # as stored, with the metadata of slides opened for the first time
    seconds: float
    peak_bytes: int  # the peak memory of this process
    gpu_bytes: int  # the most that torch held on a GPU; 0 on a CPU
    device: str


def dry_run(
    entries: Sequence[Entry],
    config: Config,
    folder: Path,
    *,
    device: str = "auto",
    mirror: str | None = None,
    init: Path | None = None,
    overwrite: bool = False,
    fail_fast: bool = False,
) -> tuple[list[str], list[Failure]]:
    """Do what `train` does before its first step, and two steps, with its parameters and errors.

    Returns
    -------
    lines, failures
        The findings in words, and the slides that would be left out.
    """
    chosen = select(entries, config, fail_fast=fail_fast)
    config = chosen.config
    options: dict[str, Any] = {"mirror": mirror, "init": init, "fail_fast": fail_fast, "overwrite": overwrite}
    arguments = worker_arguments(chosen, config, folder, **options)
    _check_out(folder, arguments["fingerprint"], overwrite=overwrite)
    if mirror:
        Mirror(mirror, folder).check(arguments["fingerprint"], overwrite=overwrite)
    cost, unreadable = cluster.fit(measure_step, arguments | {"mirror": None}, device=device)
    if unreadable.keys() >= {entry.slide_id for entry in chosen.entries if entry.split == "train"}:
        slide_id, reason = next(iter(unreadable.items()))
        raise DataError(f"no training slide can be read; slide {slide_id}: {reason}")
    failures = chosen.failures + [Failure(slide_id, reason) for slide_id, reason in unreadable.items()]
    return [*_class_lines(chosen, config.target), *_level_lines(chosen), *_cost_lines(chosen, config, cost)], failures


def measure_step(context: cluster.Context, arguments: Mapping[str, Any]) -> tuple[Cost, dict[str, str]]:
    """Take two steps of a training, without writing anything, and measure the second.

    Parameters
    ----------
    context, arguments
        See `pipeline.training.trainer.train_worker`.

    Returns
    -------
    cost, unreadable
        The cost of the step, and the slides that could not be read, with the reason.
    """
    trainer = make_trainer(context, arguments)
    trainer.slides = slides = _CountedSlides(trainer.config.model, **trainer.config.data.opening)
    seconds, read = 0.0, 0
    began = time.perf_counter()
    before: Mapping[str, int] = {}
    batch: list[Entry] = []
    for batch in trainer.trial():
        seconds, began = time.perf_counter() - began, time.perf_counter()
        after = {entry.path: slides.bytes_read(entry.path) for entry in batch}
        read, before = sum(after[path] - before.get(path, 0) for path in after), after
    gpu = torch.cuda.max_memory_allocated(context.device) if context.device.startswith("cuda") else 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Cost(len(batch), read, seconds, peak, gpu, context.device), trainer.unreadable.reasons


class _CountedSlides(SampleCache):
    """Counts what was read from all slides that were opened, closed ones included."""

    def __init__(self, config: EncoderConfig, **options: Unpack[Opening]) -> None:
        super().__init__(config, **options)
        self._opened: defaultdict[str, set[Sample]] = defaultdict(set)

    def open(self, entry: Entry) -> Sample:
        image = super().open(entry)
        self._opened[entry.path].add(image)
        return image

    def bytes_read(self, path: str) -> int:
        return sum(image.statistics.bytes_read for image in self._opened[path])


def _check_out(folder: Path, fingerprint: str, *, overwrite: bool) -> None:
    """Check that a training may write into a folder or make it."""
    if folder.exists():
        make_folder(folder)
        check_folder(folder, fingerprint, overwrite=overwrite)
        return
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{folder}: cannot be made in {above}; choose another --out")


def _class_lines(chosen: Selection, config: AnyTarget) -> list[str]:
    """Slides of each stratum of the target, such as a class, by split."""
    names = strata(config, chosen.entries)
    counts = Counter(zip(names, (entry.split for entry in chosen.entries), strict=True))
    word = "class" if isinstance(chosen.target, Classes) else f"target {config.kind}, stratum"
    order = chosen.target.classes if isinstance(chosen.target, Classes) else sorted(set(names))
    lines = []
    for name in order:
        there = [f"{counts[name, split]} {split}" for split in SPLITS if counts[name, split]]
        lines.append(f"{word} {name}: {', '.join(there)}")
    return lines


def _level_lines(chosen: Selection) -> list[str]:
    """Slides of each choice of levels, the most frequent first."""
    words = Counter(", ".join(f"{downsample:.4g}x" for downsample in levels) for levels in chosen.downsamples)
    return [f"{count} slide{'s' * (count > 1)}: levels {levels}" for levels, count in words.most_common()]


def _cost_lines(chosen: Selection, config: Config, cost: Cost) -> list[str]:
    training = sum(entry.split == "train" for entry in chosen.entries)
    steps = math.ceil(training / config.train.batch_size)
    lines = [f"updates: {steps} an epoch, {steps * config.train.epochs} in all"]
    if not cost.slides:
        return [*lines, "a step: not measured, since none of its slides can be read"]
    epoch = cost.seconds / cost.slides * training
    memory = f"{_megabytes(cost.peak_bytes)} of memory" + (
        f" and {_megabytes(cost.gpu_bytes)} of the GPU's" if cost.gpu_bytes else ""
    )
    return [
        *lines,
        f"a step of {cost.slides} slides: reads {_megabytes(cost.read_bytes)}, takes {_seconds(cost.seconds)}",
        f"an epoch: {_seconds(epoch)}, all: {_seconds(epoch * config.train.epochs)}, without validation",
        f"peak: {memory}; measured in one step of one worker on {cost.device}",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.{1 if count < 1e8 else 0}f} MB"
