"""Slides as the model reads them: `SlideImage` is a `storage.Slide` behind the `nested_ats.Image` protocol."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nested_ats import ModelConfig
from nested_ats.images import find_level
from pipeline.errors import DataError
from pipeline.manifest import Entry
from storage import Slide

_OPEN_SLIDES = 128  # each holds a few file descriptors


class SlideImage:
    """A pyramid as an image of the model.

    Parameters
    ----------
    slide
        An open pyramid.
    background
        Value of pixels off the slide, from 0 (black) to 1 (white).
    """

    def __init__(self, slide: Slide, *, background: float = 0.0) -> None:
        self.slide = slide
        dtype = np.dtype(slide.dtype)
        self._fill = background if dtype.kind == "f" else round(background * np.iinfo(dtype).max)

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every level."""
        return [level.shape_yx for level in self.slide.levels]

    @property
    def downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of every level."""
        return [level.downsample for level in self.slide.levels]

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """(N, C, h, w) of the slide's type; see `nested_ats.Image.read`."""
        return torch.from_numpy(self.slide.read_many(level, boxes.numpy(), fill=self._fill))


class SlideCache:
    """Slides by path, kept open, the least recently used closed first; thread safe."""

    def __init__(self, *, background: float) -> None:
        self._background = background
        self._slides: OrderedDict[str, SlideImage] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str) -> SlideImage:
        """Open a slide, or return it open.

        Raises
        ------
        storage.StorageError
            It cannot be opened.
        """
        with self._lock:
            image = self._slides.pop(path, None)
        # Opened without the lock: it may wait for a store. Two threads may then open one slide, which does no harm.
        image = image or SlideImage(Slide(path), background=self._background)
        with self._lock:
            self._slides[path] = image
            if len(self._slides) > _OPEN_SLIDES:
                # Not closed here: another thread may be reading it; its descriptors go with the last reference.
                self._slides.popitem(last=False)
            return image


def check_slide(path: str, model: ModelConfig, channels: int | None = None) -> int:
    """Open a slide, see that it has what a model reads, and return its number of channels.

    Parameters
    ----------
    path
        Of a pyramid.
    model
        Whose downsamples are looked for.
    channels
        Number of channels that it must have.

    Raises
    ------
    storage.StorageError
        It cannot be opened.
    DataError
        It has other channels, or lacks a level.
    """
    with Slide(path) as slide:
        found = len(slide.channels)
        if channels is not None and found != channels:
            raise DataError(f"{path}: {found} channels where the model has {channels}; convert slides of one kind")
        try:
            for downsample in (*(level.downsample for level in model.levels), model.patch_downsample):
                find_level(SlideImage(slide), downsample)
        except ValueError as error:
            raise DataError(
                f"{path}: {error}; set the model's downsamples to levels there are, "
                "or convert with a smaller --min-level-size"
            ) from error
    return found


def find_pyramid(entry: Entry) -> str:
    """Path of an entry's pyramid.

    Raises
    ------
    DataError
        The path is a file: an image that was not converted.
    """
    if "://" not in entry.path and Path(entry.path).is_file():
        raise DataError(f"{entry.path}: not a pyramid; run nested-ats convert and use the manifest it writes")
    return entry.path


def draw_key(*parts: object) -> int:
    """Random key of 64 bits from what names a draw: seed, epoch, slide, number."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
