"""Slides as the model reads them: `SlideImage` is a `storage.Slide` behind the `nested_ats.Image` protocol."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nested_ats.config import EncoderConfig
from nested_ats.images import find_level
from pipeline.config import CacheConfig
from pipeline.errors import DataError
from storage import Slide
from storage.place.urls import is_remote
from storage.read.cache import ChunkCache

_OPEN_SLIDES = 128  # each holds a few file descriptors
_HELD_BYTES = 2 * 2**30  # of PNG, JPEG and BMP images, which are held decoded


class SlideImage:
    """A slide as an image of the model.

    Parameters
    ----------
    slide
        An open slide.
    background
        Value of pixels off the slide, from 0 (black) to 1 (white).

    Attributes
    ----------
    fill : `background` as a value of the slide's type
    """

    def __init__(self, slide: Slide, *, background: float = 0.0) -> None:
        self.slide = slide
        dtype = np.dtype(slide.dtype)
        self.fill = background if dtype.kind == "f" else round(background * np.iinfo(dtype).max)

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every level."""
        return [level.shape_yx for level in self.slide.levels]

    @property
    def downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of every level."""
        return [level.downsample for level in self.slide.levels]

    @property
    def identity(self) -> str | None:
        """Of the slide's pixels and of those off it; None where it has none (`storage.Slide.identity`)."""
        return self.slide.identity and f"{self.slide.identity}/{self.fill}"

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """(N, C, h, w) of the slide's type; see `nested_ats.Image.read`."""
        return torch.from_numpy(self.slide.read_many(level, boxes.numpy(), fill=self.fill))


class SlideCache:
    """Slides by path, kept open, the least recently used closed first; thread safe.

    Parameters
    ----------
    background
        Value of pixels off the slide; see `SlideImage`.
    cache
        Where chunks of slides at URLs are kept.
    """

    def __init__(self, *, background: float, cache: CacheConfig | None = None) -> None:
        self._background = background
        self._cache = cache
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
        image = image or SlideImage(open_slide(path, self._cache), background=self._background)
        with self._lock:
            self._slides[path] = image
            while len(self._slides) > _OPEN_SLIDES or (len(self._slides) > 1 and self._held_bytes() > _HELD_BYTES):
                # Not closed here: another thread may be reading it; its descriptors go with the last reference.
                self._slides.popitem(last=False)
            return image

    def _held_bytes(self) -> int:
        return sum(image.slide.memory_bytes for image in self._slides.values())


def open_slide(path: str, cache: CacheConfig | None = None) -> Slide:
    """Open a pyramid, PNG, JPEG or BMP; chunks of those at URLs are kept in ``cache``.

    Raises
    ------
    storage.StorageError
        It cannot be opened, or the cache's folder cannot be used.
    """
    if cache is None or not is_remote(path):
        return Slide(path)
    return Slide(path, cache=ChunkCache(cache.folder, int(cache.gigabytes * 1e9)))


def check_slide(slide: Slide, config: EncoderConfig, channels: int | None = None) -> list[int]:
    """See that a slide has what a model reads, and return the numbers of the levels that are read.

    Parameters
    ----------
    slide
        Open.
    config
        Of the model.
    channels
        Number of channels that it must have.

    Raises
    ------
    DataError
        It has other channels, lacks a level, or is too small for the model's encoder.
    """
    path, found = slide.location, len(slide.channels)
    if channels is not None and found != channels:
        raise DataError(f"{path}: {found} channels where the model has {channels}; convert slides of one kind")
    try:
        found_levels = [find_level(SlideImage(slide), downsample) for downsample in config.downsamples]
    except ValueError as error:
        raise DataError(
            f"{path}: {error}; set the model's downsamples to levels there are, "
            "or convert with a smaller --min-level-size"
        ) from error
    height, width = slide.levels[max(found_levels)].shape_yx
    if min(height, width) < config.smallest_view:
        raise DataError(
            f"{path}: {height} x {width} pixels where the model looks first, and its encoder takes no less than "
            f"{config.smallest_view} on a side; leave it out, or choose a finer downsample"
        )
    return found_levels


def draw_key(*parts: object) -> int:
    """Random key of 64 bits from what names a draw: seed, epoch, slide, number."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
