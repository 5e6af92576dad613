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
from storage.read.cache import ChunkCache

_OPEN_SLIDES = 128  # each holds a few file descriptors
_HELD_BYTES = 2 * 2**30  # PNG, JPEG and BMP images are held decoded, and take no more than this


class SlideImage:
    """A slide as an image of the model.

    Parameters
    ----------
    slide
        An open slide.
    background
        The value of pixels off the slide, from 0 (black) to 1 (white).

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
        """Names the slide's pixels and those off it; None where it has no identity (`storage.Slide.identity`)."""
        return self.slide.identity and f"{self.slide.identity}/{self.fill}"

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes as (N, C, h, w) of the slide's type; see `nested_ats.Image.read`."""
        return torch.from_numpy(self.slide.read_many(level, boxes.numpy(), fill=self.fill))


class SlideCache:
    """Keeps slides open, by path, and closes the least recently used first; it is thread safe.

    Parameters
    ----------
    background
        The value of pixels off the slide; see `SlideImage`.
    cache
        Where chunks of slides at URLs are kept.
    """

    def __init__(self, *, background: float, cache: CacheConfig | None = None) -> None:
        self._background = background
        self._cache = cache
        self._slides: OrderedDict[str, SlideImage] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, path: str) -> SlideImage:
        """Return a slide, which is opened unless it is open.

        Raises
        ------
        storage.StorageError
            The slide cannot be opened.
        """
        with self._lock:
            image = self._slides.pop(path, None)
        # This opens without the lock, as it may wait for a store. Two threads may open one slide, which does no harm.
        image = image or SlideImage(open_slide(path, self._cache), background=self._background)
        with self._lock:
            self._slides[path] = image
            while len(self._slides) > _OPEN_SLIDES or (len(self._slides) > 1 and self._held_bytes() > _HELD_BYTES):
                # It is not closed here, as another thread may read it; its descriptors go with the last reference.
                self._slides.popitem(last=False)
            return image

    def _held_bytes(self) -> int:
        return sum(image.slide.memory_bytes for image in self._slides.values())


def open_slide(path: str, cache: CacheConfig | None = None) -> Slide:
    """Open a pyramid, PNG, JPEG or BMP; chunks of those at URLs are kept in ``cache``.

    Raises
    ------
    storage.StorageError
        The slide cannot be opened, or the cache's folder cannot be used.
    """
    if cache is None or "://" not in path:
        return Slide(path)
    return Slide(path, cache=ChunkCache(cache.folder, int(cache.gigabytes * 1e9)))


def check_slide(slide: Slide, config: EncoderConfig, channels: int | None = None) -> list[int]:
    """See that a slide has what a model reads, and return the numbers of the levels that are read.

    Parameters
    ----------
    slide
        An open slide.
    config
        The configuration of the model.
    channels
        The number of channels that the slide must have.

    Raises
    ------
    DataError
        The slide has other channels, lacks a level, or is too small for the model's encoder.
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
    """Make a random key of 64 bits from what names a draw: seed, epoch, slide, number."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)
