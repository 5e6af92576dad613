"""``data.normalize: auto``: measure mean and spread of the training slides, once, before a training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from pipeline.config import Config, parse_config
from pipeline.data.manifest import Entry
from pipeline.errors import UsageError
from pipeline.runs import read_run
from pipeline.stats import measure


def normalized(config: Config, entries: Sequence[Entry], folder: Path, fingerprint: str) -> Config:
    """Give the model the mean and the spread of each channel over the valid pixels of its training slides.

    A run that goes on keeps those that it began with. They are the same wherever they are measured.

    Parameters
    ----------
    config
        A configuration whose `data.normalize` is set; in what is returned it is not.
    entries
        The slides, or cases of several, with their splits.
    folder, fingerprint
        The folder of the run, if there is one already, and what identifies it.

    Raises
    ------
    DataError
        No training slide can be read.
    """
    mean, std = _kept(folder, fingerprint) or _measured(config, entries)
    model = replace(config.model, mean=mean, std=std)
    return config.model_copy(update={"model": model, "data": config.data.model_copy(update={"normalize": None})})


_Moments = tuple[tuple[float, ...], tuple[float, ...]]  # mean and spread of each channel


def _kept(folder: Path, fingerprint: str) -> _Moments | None:
    """What a run has begun with; None where it is another run, or there is none."""
    with suppress(UsageError):
        run = read_run(folder)
        model = parse_config(run["config"], str(folder)).model
        if run["fingerprint"] == fingerprint and isinstance(model.mean, tuple) and isinstance(model.std, tuple):
            return model.mean, model.std
    return None


def _measured(config: Config, entries: Sequence[Entry]) -> _Moments:
    training = [entry for entry in entries if entry.split == "train"]
    slides = [replace(slide, split="train") for entry in training for slide in entry.slides or (entry,)]
    found = measure(slides, channels=config.data.chosen, cache=config.data.cache)
    numbers = ", ".join(line.strip() for line in found.lines[1:])
    print(f"data.normalize: measured over {len(found.downsamples)} training slides: {numbers}", file=sys.stderr)
    return found.means, found.spreads
