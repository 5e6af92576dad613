"""Features that others have extracted, as images: a cohort of TRIDENT's or CLAM's h5 files needs no slides.

One pixel is one tile and its channels are the tile's features, so that all models, samplers and augmentations by
symmetries work as on slides. Tiles keep their places to each other: they lie on the grid that their coordinates tell.
CLAM's grids begin anew in every contour; a tile whose cell is taken goes to the nearest free one. What lies between
tiles is under no mask, so every tile is one cell of the population, and nothing else is.

Shape letters: N tiles or boxes, D features, H W cells of the grid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nested_ats.mask import Mask
from pipeline.data.bags import Bag, read_bag_file
from pipeline.data.manifest import Entry
from pipeline.errors import DataError
from pipeline.files import file_name
from storage import ReadStatistics
from storage.format.levels import Level
from storage.place.urls import is_remote

_SPARSE, _SMALL = 100, 10_000  # cells of a grid for each tile, and beside them, that are still a grid
_DENSE = 30  # cells of one grid for each tile, as where tissue is sparse
_FEW_STEPS = 4  # of a grid, between most neighbours, where many tiles are left out
_Cells = NDArray[np.int64]


class FeatureFile:
    """The features of one slide, read whole.

    Parameters
    ----------
    entry
        Its path is that of an h5 file with ``features`` and ``coords`` (`pipeline.data.bags`).

    Attributes
    ----------
    location : the file
    features : (N, D) float32
    cells : (N, 2) int64, row and column of each tile on the grid; no two are alike
    made_by : what the file says of its encoder, as in ``features_uni_v1``; empty where it says nothing

    Raises
    ------
    DataError
        The file is missing, damaged, or says that it is of another slide; or its coordinates are on no grid.
    """

    mpp = None
    georeference = None

    def __init__(self, entry: Entry) -> None:
        if is_remote(entry.path):
            raise DataError(f"{entry.path}: files of features are read from a disk; copy it there")
        bag = read_bag_file(Path(entry.path))
        self.location = entry.path
        _check_name(bag, entry)
        self.features = torch.from_numpy(bag.features)
        self.made_by = bag.made_by
        self.cells = lay_out(bag, entry.path)
        height, width = (int(each) + 1 for each in self.cells.max(0))
        self.levels = (Level((height, width), 1.0, None, 1, 1, (1.0, 1.0), (0.0, 0.0)),)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing; the file was closed when it had been read."""

    @property
    def identity(self) -> str:
        """Equal for equal features, by which copies of a slide are found."""
        return "features/" + hashlib.sha256(self.features.numpy().tobytes()).hexdigest()


class FeatureImage:
    """The features of a slide as an image of the model: one level, a pixel a tile, D channels.

    Parameters
    ----------
    entry
        See `FeatureFile`, with its errors.

    Attributes
    ----------
    slide : the file
    numbers : of the channels, from 0
    mask : the cells that are tiles
    """

    scale, fill, own_mpp = 1.0, 0, None
    identity = None  # the features are at hand: nothing is to be kept of them elsewhere
    downsamples: Sequence[float] = (1.0,)

    def __init__(self, entry: Entry) -> None:
        self.slide = FeatureFile(entry)
        shape = self.slide.levels[0].shape_yx
        places = torch.from_numpy(self.slide.cells)
        self._rows = torch.full(shape, -1, dtype=torch.int32)  # of each cell; -1: there is no tile
        self._rows[places[:, 0], places[:, 1]] = torch.arange(len(places), dtype=torch.int32)
        self.mask = Mask(self._rows >= 0, (1.0, 1.0))
        self.numbers = list(range(self.slide.features.shape[1]))
        self.shapes: Sequence[tuple[int, int]] = (shape,)
        self.sources = [0]

    @property
    def memory_bytes(self) -> int:
        """Bytes of features and of the grid that are held while it is open."""
        return self.slide.features.nbytes + self._rows.nbytes + self.mask.nbytes

    @property
    def slides(self) -> list[FeatureImage]:
        """The one slide; a case has several."""
        return [self]

    @property
    def statistics(self) -> ReadStatistics:
        """Counts of what was read: the file, once."""
        return ReadStatistics(requests=1, bytes_read=self.slide.features.nbytes)

    def places(self) -> list[tuple[FeatureImage, Tensor]]:
        """Return the slide with its first pixel, which is the image's, (2,)."""
        return [(self, torch.zeros(2, dtype=torch.int64))]

    def close(self) -> None:
        """Close the file."""
        self.slide.close()

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes as (N, D, h, w), with 0 where there is no tile; see `nested_ats.Image.read`."""
        assert level == 0  # noqa: S101  there is no other
        height, width = boxes[0, 2:].tolist()
        y = boxes[:, 0, None] + torch.arange(height)
        x = boxes[:, 1, None] + torch.arange(width)
        inside = [(axis >= 0) & (axis < side) for axis, side in zip((y, x), self.shapes[0], strict=True)]
        rows = self._rows[(y * inside[0])[:, :, None], (x * inside[1])[:, None, :]].long()
        rows = torch.where(inside[0][:, :, None] & inside[1][:, None, :], rows, -1)
        pixels = self.slide.features[rows.clamp_min(0)] * (rows >= 0)[..., None]
        return pixels.permute(0, 3, 1, 2)


def _check_name(bag: Bag, entry: Entry) -> None:
    """Raise DataError where a file says that it is of another slide."""
    said = str(bag.about.get("name", entry.slide_id))
    if said != entry.slide_id and Path(entry.path).stem not in (said, file_name(said)):
        raise DataError(f"{entry.path}: says that it is of slide {said}, not of {entry.slide_id}; mend the manifest")


def lay_out(bag: Bag, path: str) -> _Cells:
    """Return the cell of each tile, (N, 2) row and column from 0, no two of which are alike.

    Raises
    ------
    DataError
        The coordinates are not those of tiles on a grid.
    """
    yx = bag.coords_xy[:, ::-1]
    if "level0_width" in bag.about and (yx >= (bag.about["level0_height"], bag.about["level0_width"])).any():
        raise DataError(f"{path}: has tiles beyond its slide's size; extract it again")
    offsets = yx - yx.min(0)
    # Of one grid all offsets are multiples of its step; those of several grids share a few pixels at most.
    exact, usual = int(np.gcd.reduce(offsets, axis=None)) or 1, _usual_step(bag.coords_xy)
    dense = float(np.prod(offsets.max(0) / exact + 1)) <= _DENSE * len(offsets)
    step = exact if dense or usual <= _FEW_STEPS * exact else usual
    cells: _Cells = np.floor(offsets / step + 0.5).astype(np.int64)  # halves go one way
    free_anew = _repeated(cells)
    height, width = (int(each) + 1 for each in cells.max(0))
    if height * width > _SPARSE * len(cells) + _SMALL or 2 * len(free_anew) > len(cells):
        raise DataError(f"{path}: its coords are not those of tiles on a grid; extract it again")
    taken = set(map(tuple, cells.tolist()))
    for row in free_anew:
        cells[row] = next(cell for cell in _around(*cells[row].tolist()) if cell not in taken)
        taken.add(tuple(cells[row].tolist()))
    return cells


def _usual_step(coords: _Cells) -> int:
    """Return the most frequent distance of neighbours in a row or column of tiles; 1 where none has one."""
    coords, distances = np.unique(coords, axis=0), []
    for axis in range(2):
        steps = np.diff(coords[np.lexsort((coords[:, axis], coords[:, 1 - axis]))], axis=0)
        distances.append(steps[steps[:, 1 - axis] == 0][:, axis])
    found, counts = np.unique(np.concatenate(distances), return_counts=True)
    return int(found[counts.argmax()]) if len(found) else 1


def _repeated(cells: _Cells) -> list[int]:
    """Rows whose cell an earlier row has."""
    _, first = np.unique(cells, axis=0, return_index=True)
    return sorted(set(range(len(cells))) - set(first.tolist()))


def _around(y: int, x: int) -> Iterator[tuple[int, int]]:
    """Cells around one that have no negative number, the nearest first."""
    reach = 1
    while True:
        ring = [(dy, dx) for dy in range(-reach, reach + 1) for dx in range(-reach, reach + 1)]
        ring = sorted((d for d in ring if max(map(abs, d)) == reach), key=lambda d: d[0] ** 2 + d[1] ** 2)
        yield from ((y + dy, x + dx) for dy, dx in ring if y + dy >= 0 and x + dx >= 0)
        reach += 1
