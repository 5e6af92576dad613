"""Scenes of a gigapixel that are rendered where they are looked at and never stored.

A scene is a grained plane with discs of 41 pixels, each in a cell of its own of 48 x 48. *Signs* are discs with a red
ring and a number, the same on all signs of a scene, which is its label. *Decoys* are signs turned inside out: the
same pixels in the reversed order of their distance from the centre, so that their mean is exactly that of a sign, and
at downsample 64 both are one pixel of haze. At downsample 16 a disc has three pixels, of which a sign's middle one
is bright and a decoy's red. *Distractors* have rings of other colours and any number.

- *villages*: 3 to 6 groups of 550 to 920 signs among 24 to 36 groups of as many decoys and 4,000 distractors
  (in a gigapixel).
- *needles*: 24 lone signs among 8,000 lone decoys in a gigapixel, and fewer in smaller scenes, but never less than 3
  signs. Nothing that is coarser than downsample 16 tells where to look.

Discs are added to the plane and nothing is clipped, so that a pixel of a coarse level is the mean of those that it
covers, computed from tables of means and then rounded like any pixel.

Shape letters: S side of a disc, K kinds of discs, N discs.
"""

from __future__ import annotations

from functools import cached_property, lru_cache
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.signs import DISTRACTOR_RINGS, SIGN_RING, DiscKind, disc_sprite
from storage.format.levels import Level
from storage.read.source import Counters, ReadStatistics

LABELS = ("50", "70", "80")
DOWNSAMPLES = (1, 4, 16, 64)
CELL, RADIUS, GRAIN = 48, 20, 64  # pixels: of a disc's cell, of a disc, of the period of the grain
SIDE = 2 * RADIUS + 3
_MIDDLE, _RANGE = 128, 175 / 255  # of all values; those of discs are pressed together, so that none is clipped
_SHADES = (0.84, 0.92, 1.0)

Floats = NDArray[np.float32]


class Discs(NamedTuple):
    """The discs of a scene, sorted by their tops."""

    top: NDArray[np.int64]  # (N,) pixels
    left: NDArray[np.int64]  # (N,)
    kind: NDArray[np.int64]  # (N,) row of `_kinds`


@lru_cache
def _kinds() -> tuple[list[list[int]], Floats]:
    """Return rows of signs of each label, of decoys and of others, and what each adds to the plane, (K, S, S, 3)."""
    rows: list[list[int]] = []
    added: list[Floats] = []
    for label in LABELS:
        rows.append([])
        for shade in _SHADES:
            rows[-1].append(len(added))
            added.append(_added(DiscKind(SIGN_RING, label, shade, (0, 0))))
    rows.append([])
    for sign in added[:]:
        rows[-1].append(len(added))
        added.append(_inside_out(sign))
    rows.append([])
    for ring in DISTRACTOR_RINGS:
        for label in (*LABELS, "20", "40", "60"):
            rows[-1].append(len(added))
            added.append(_added(DiscKind(ring, label, _SHADES[len(added) % len(_SHADES)], (0, 0))))
    return rows, np.stack(added)


def _added(kind: DiscKind) -> Floats:
    colour, coverage = disc_sprite(RADIUS, kind)
    return ((colour * _RANGE + 40 - _MIDDLE) * (coverage / 255)).astype(np.float32)


def _inside_out(added: Floats) -> Floats:
    """Order the pixels of a disc the other way round by their distance from the centre."""
    offset = np.arange(SIDE) - SIDE // 2
    distance = np.hypot(offset[:, None], offset[None, :]).ravel()
    inside = np.argsort(distance, kind="stable")[: int((distance <= RADIUS).sum())]
    turned = added.reshape(-1, 3).copy()
    turned[inside] = turned[inside[::-1]]
    return turned.reshape(added.shape)


@lru_cache
def _means(downsample: int) -> Floats:
    """Return what a disc adds to the pixels of a level: (K, d, d, n, n, 3) by where in a pixel it begins."""
    _, added = _kinds()
    count = -(-(SIDE - 1) // downsample) + 1
    found = np.zeros((len(added), downsample, downsample, count, count, 3), np.float32)
    rows = np.zeros((downsample, count, SIDE), np.float32)  # of each beginning, the share of a pixel that each row is
    for begin in range(downsample):
        rows[begin, (begin + np.arange(SIDE)) // downsample, np.arange(SIDE)] = 1 / downsample
    for kind, each in enumerate(added):
        found[kind] = np.einsum("ayi,ijc,bxj->abyxc", rows, each, rows, optimize=True)
    return found


@lru_cache
def _grain(downsample: int) -> Floats:
    """Return the periodic grain of a level, with mean 0: (64 / d, 64 / d, 3)."""
    grain = np.random.default_rng(20191).uniform(-12, 12, (GRAIN, GRAIN, 3))
    grain -= grain.mean((0, 1))
    side = GRAIN // downsample
    means: Floats = grain.reshape(side, downsample, side, downsample, 3).mean((1, 3)).astype(np.float32)
    return means


class Scene:
    """One scene as an image of the model: the protocol of `nested_ats.Image`, and what the pipeline asks of a slide.

    Parameters
    ----------
    task
        ``villages`` or ``needles``.
    index
        Number of the scene, which alone decides all of it.
    side
        Height and width in pixels, a multiple of 64.
    """

    scale, own_mpp, mpp, georeference, mask, identity = 1.0, None, None, None, None, None
    hides_opacity, memory_bytes, made_by = False, 0, ""
    numbers = (0, 1, 2)

    def __init__(self, task: str, index: int, side: int) -> None:
        self.location = f"{task}/{side}/{index}"
        self.label = LABELS[index % len(LABELS)]
        self.downsamples = tuple(float(each) for each in DOWNSAMPLES)
        self.shapes = tuple((side // each, side // each) for each in DOWNSAMPLES)
        self.sources = list(range(len(DOWNSAMPLES)))
        self._counters = Counters()
        self._task, self._index, self._side = task, index, side

    @classmethod
    def at(cls, location: str) -> Self:
        """Return the scene that has this place."""
        task, side, index = location.split("/")
        return cls(task, int(index), int(side))

    @property
    def statistics(self) -> ReadStatistics:
        """Counts of what was read."""
        return self._counters.snapshot()

    @property
    def slide(self) -> Self:
        """Itself, in the place of a slide."""
        return self

    @property
    def slides(self) -> list[Self]:
        """Itself alone."""
        return [self]

    @property
    def levels(self) -> list[Level]:
        """Levels as a slide has them."""
        both = zip(self.shapes, self.downsamples, strict=True)
        return [Level(shape, each, None, 1, 1, (each, each), (0.0, 0.0)) for shape, each in both]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        """Do nothing."""

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Return (N, 3, h, w) uint8 of boxes of a level; off the scene the plane goes on without discs."""
        found = np.stack([self._render(DOWNSAMPLES[level], *box) for box in boxes.tolist()])
        self._counters.add(requests=len(boxes), read=found.nbytes)
        return torch.from_numpy(found).permute(0, 3, 1, 2)

    def _render(self, downsample: int, y: int, x: int, h: int, w: int) -> NDArray[np.uint8]:
        grain = _grain(downsample)
        rows, columns = np.arange(y, y + h), np.arange(x, x + w)
        plane = grain[rows % len(grain)][:, columns % len(grain)]
        blocks = self._blocks
        plane += blocks[rows * downsample // GRAIN % len(blocks)][:, columns * downsample // GRAIN % len(blocks)]
        discs, table = self.discs, _means(downsample)
        count = table.shape[3]
        padded = np.zeros((h + 2 * count, w + 2 * count, 3), np.float32)
        first, last = np.searchsorted(discs.top, [y * downsample - SIDE + 1, (y + h) * downsample])
        part = slice(first, last)
        near = (discs.left[part] > x * downsample - SIDE) & (discs.left[part] < (x + w) * downsample)
        top, left, kind = (each[part][near] for each in discs)
        place = (
            (top // downsample - y + count)[:, None, None] + np.arange(count)[:, None],
            (left // downsample - x + count)[:, None, None] + np.arange(count),
        )
        np.add.at(padded, place, table[kind, top % downsample, left % downsample])
        plane += padded[count : count + h, count : count + w]
        return np.rint(plane).astype(np.uint8)

    @cached_property
    def _blocks(self) -> Floats:
        """The plane's colour in each square of 64 x 64 pixels, periodic."""
        rng = np.random.default_rng([1, self._index])
        return (_MIDDLE + rng.uniform(-4, 4, 3) + rng.uniform(-6, 6, (97, 97, 3))).astype(np.float32)

    @cached_property
    def discs(self) -> Discs:
        """All discs."""
        rng = np.random.default_rng([2, self._index, self._side])
        rows, _ = _kinds()
        signs, decoys, others = rows[self._index % len(LABELS)], rows[len(LABELS)], rows[-1]
        cells = self._side // CELL
        free = np.ones((cells, cells), dtype=bool)
        megapixels = self._side**2 / 2**20
        chosen: list[tuple[NDArray[np.int64], list[int]]] = []
        if self._task == "villages":
            for kinds, most in ((signs, rng.integers(3, 7)), (decoys, rng.integers(24, 37))):
                groups = max(1, round(int(most) / 1024 * megapixels))
                chosen += [(_group(rng, free), kinds) for _ in range(groups)]
            lone = [(round(4000 / 1024 * megapixels), others)]
        else:
            lone = [(max(3, round(24 / 1024 * megapixels)), signs), (round(8000 / 1024 * megapixels), decoys)]
        for number, kinds in lone:
            places = rng.choice(np.flatnonzero(free), number, replace=False)
            free.ravel()[places] = False
            chosen.append((np.stack(np.divmod(places, cells), 1), kinds))
        places = np.concatenate([each for each, _ in chosen]) * CELL
        places += rng.integers(0, CELL - SIDE + 1, places.shape)
        kind = np.concatenate([rng.choice(kinds, len(each)) for each, kinds in chosen])
        order = np.argsort(places[:, 0], kind="stable")
        return Discs(places[order, 0], places[order, 1], kind[order])


def _group(rng: np.random.Generator, free: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Take the cells of a round group of 550 to 920 discs, clear of the others: (n, 2)."""
    radius = int(rng.integers(14, 19))
    cells = len(free)
    while True:
        y, x = rng.integers(radius, cells - radius, 2)
        around = free[max(0, y - radius - 3) : y + radius + 4, max(0, x - radius - 3) : x + radius + 4]
        if around.all():
            break
    offset = np.arange(-radius, radius + 1)
    inside = (np.hypot(offset[:, None], offset) <= radius) & (rng.random((len(offset), len(offset))) < 0.9)
    found: NDArray[np.int64] = np.argwhere(inside) + np.array([y - radius, x - radius])
    free[found[:, 0], found[:, 1]] = False
    return found
