"""``stats``: mean, spread and percentiles of each channel over the slides of a split, as the model sees pixels.

Notable: each slide is read at its finest level of at most `MAX_SAMPLES` numbers, whole, and every pixel of it that
holds data counts once. Means of coarser levels are those of the finest; their spread is smaller, as pixels are
averaged.

Shape letters: C channels, H height, W width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.data.manifest import Entry
from pipeline.data.slides import Channels, channel_numbers, open_slide
from pipeline.errors import DataError, UsageError
from pipeline.net import Net
from pipeline.progress import each_slide
from pipeline.sections import CacheConfig
from storage import Slide, processors

PERCENTILES = (1, 5, 50, 95, 99)
MAX_SAMPLES = 3 * 4_000_000  # of all channels, that are read of a slide
_CONSTANT = 1e-9  # spread of a channel, all of it rounding
_KEPT = 4096  # numbers of a channel and slide, of which percentiles are taken where every one could be different


@dataclass(frozen=True)
class ChannelStats:
    """What a channel's pixels are like, on the scale of the model: the largest value of integers is 1."""

    name: str
    pixels: int  # that hold data
    mean: float
    std: float
    percentiles: dict[str, float]  # by "1", "5", "50", "95" and "99"


@dataclass(frozen=True)
class Stats:
    """Statistics of a split."""

    channels: list[ChannelStats]
    downsamples: dict[str, float]  # of the level that was read, by slide id
    failures: list[tuple[str, str]]  # slide id and why it does not count

    @property
    def means(self) -> tuple[float, ...]:
        """The mean of each channel, for `model.mean`."""
        return tuple(channel.mean for channel in self.channels)

    @property
    def spreads(self) -> tuple[float, ...]:
        """The standard deviation of each channel, for `model.std`; that of a constant one is 1."""
        return tuple(channel.std if channel.std > _CONSTANT else 1.0 for channel in self.channels)

    @property
    def lines(self) -> list[str]:
        """The lines of a configuration that have the model take these means and spreads."""
        means, stds = (", ".join(f"{each:.4g}" for each in values) for values in (self.means, self.spreads))
        return ["model:", f"  mean: [{means}]", f"  std: [{stds}]"]


@dataclass(frozen=True)
class _Tally:
    """One channel of one slide: how many pixels, their mean and sum of squared distances, and values by frequency."""

    count: int
    mean: float
    squares: float
    values: NDArray[np.float64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class _Found:
    entry: Entry
    names: tuple[str, ...] = ()
    downsample: float = 1.0
    tallies: tuple[_Tally, ...] = ()
    error: str = ""


def measure(
    entries: Sequence[Entry],
    *,
    split: str = "train",
    channels: Channels = None,
    cache: CacheConfig | None = None,
    fail_fast: bool = False,
) -> Stats:
    """Measure the pixels of the slides of a split.

    Mean and spread are exact over the levels that are read, and so are percentiles of integers of up to 16 bits;
    those of other numbers are of a sample of 4096 of each channel of each slide.

    Parameters
    ----------
    entries
        The slides; where none has a split, all of them count.
    split
        Which of them count: train, val or test.
    channels
        Which channels, by name or number; None means all.
    cache
        Where chunks of slides at URLs are kept.
    fail_fast
        Whether to stop at the first slide that cannot be read.

    Raises
    ------
    UsageError
        No slide is in the split.
    DataError
        No slide, or with `fail_fast` not every slide, can be read.
    """
    chosen = [entry for entry in entries if entry.split == split] if any(e.split for e in entries) else list(entries)
    if not chosen:
        raise UsageError(f"no slide is in split {split!r}; splits there are: {_splits(entries)}")
    found = _look_at_all(chosen, channels, cache, fail_fast=fail_fast)
    counts = Counter(len(one.names) for one in found if not one.error)
    if not counts:
        raise DataError(f"no slide can be used; the first: {found[0].error}")
    count, many = counts.most_common(1)[0]
    why = f"channels, where {many} of {counts.total()} slides have {count}"
    errors = [
        one.error or ("" if len(one.names) == count else f"{one.entry.path}: {len(one.names)} {why}") for one in found
    ]
    used = [one for one, error in zip(found, errors, strict=True) if not error]
    return Stats(
        channels=[_pool(name, [one.tallies[c] for one in used]) for c, name in enumerate(used[0].names)],
        downsamples={one.entry.slide_id: one.downsample for one in used},
        failures=[(one.entry.slide_id, error) for one, error in zip(found, errors, strict=True) if error],
    )


def _splits(entries: Sequence[Entry]) -> str:
    return ", ".join(sorted({entry.split or "none" for entry in entries}))


def _look_at_all(
    entries: Sequence[Entry], channels: Channels, cache: CacheConfig | None, *, fail_fast: bool
) -> list[_Found]:
    def look(entry: Entry) -> _Found:
        with Net(entry.slide_id, fail_fast=fail_fast) as net, open_slide(entry.path, cache) as slide:
            level = _level(slide)
            numbers = channel_numbers(slide, channels)
            names = tuple(slide.channels[number] for number in numbers)
            return _Found(entry, names, slide.levels[level].downsample, _tallies(slide, level, numbers))
        return _Found(entry, error=net.error)

    return list(each_slide("stats", entries, look, threads=processors()))


def _level(slide: Slide) -> int:
    """Number of the finest level that is small enough, or of the coarsest."""
    most = MAX_SAMPLES / len(slide.channels)
    fitting = (i for i, level in enumerate(slide.levels) if level.shape_yx[0] * level.shape_yx[1] <= most)
    return next(fitting, len(slide.levels) - 1)


def _tallies(slide: Slide, level: int, numbers: Sequence[int]) -> tuple[_Tally, ...]:
    """Tally channels of a level."""
    pixels = slide.read(level, (0, 0, *slide.levels[level].shape_yx))
    there, pixels = slide.holds_data(pixels)[numbers], pixels[numbers]
    if pixels.dtype.kind == "f" and np.isinf(pixels).any():
        raise DataError(
            f"{slide.location}: holds infinite numbers, with which nothing computes; mend it or leave it out"
        )
    largest = slide.largest_value
    return tuple(_tally(channel[own], largest) for channel, own in zip(pixels, there, strict=True))


def _tally(values: NDArray[Any], largest: int) -> _Tally:
    """Tally the (N,) values of a channel that hold data."""
    if values.dtype.itemsize <= 2:
        low = int(values.min(initial=0))
        counts = np.bincount(values.astype(np.int64) - low)
        there = np.flatnonzero(counts)
        kept, weights = (there + low) / largest, counts[there].astype(np.float64)
    else:
        chosen = np.random.default_rng(0).permutation(values.size)[:_KEPT]
        kept = values[chosen].astype(np.float64) / largest
        weights = np.full(kept.size, values.size / max(kept.size, 1))
    scaled = values.astype(np.float64) / largest
    mean = float(scaled.mean()) if values.size else 0.0
    return _Tally(values.size, mean, float(((scaled - mean) ** 2).sum()), kept, weights)


def _pool(name: str, tallies: Sequence[_Tally]) -> ChannelStats:
    """Put the tallies of all slides together."""
    count = sum(tally.count for tally in tallies)
    if not count:
        return ChannelStats(name, 0, 0.0, 0.0, {str(p): 0.0 for p in PERCENTILES})
    mean = sum(tally.count * tally.mean for tally in tallies) / count
    squares = sum(tally.squares + tally.count * (tally.mean - mean) ** 2 for tally in tallies)
    values = np.concatenate([tally.values for tally in tallies])
    order = values.argsort(kind="stable")
    below = np.concatenate([tally.weights for tally in tallies])[order].cumsum()
    # The smallest value that so many percent do not exceed; rounding must not lead past the last one.
    places = np.searchsorted(below, np.array(PERCENTILES) / 100 * below[-1] * (1 - 1e-12))
    percentiles = {str(p): float(values[order[i]]) for p, i in zip(PERCENTILES, places.tolist(), strict=True)}
    return ChannelStats(name, count, float(mean), float((squares / count) ** 0.5), percentiles)
