"""What the model asks of an image: its levels, and boxes of pixels from one of them.

`Image` is the whole protocol; the model never sees a store. `ArrayImage` implements it in memory, the pipeline
does for slides.

Shape letters: B batch, N boxes, C channels, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from nested_ats.reading import Read

_INTEGERS = (torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32)


class Image(Protocol):
    """An image at several resolutions; level 0 is the finest.

    It may also have an ``identity``, a text or None. Equal texts promise equal pixels in every box of every level, so
    that features of its patches may be kept (`nested_ats.FeatureStore`). A model with a ``prior`` asks for a ``mask``
    of what there is to see (`nested_ats.Mask`).
    """

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every level, in its pixels."""
        ...

    @property
    def downsamples(self) -> Sequence[float]:
        """Level-0 pixels per pixel of every level, >= 1."""
        ...

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes of one size.

        Parameters
        ----------
        level
            Index into `shapes`.
        boxes
            (N, 4) int64: y, x, height, width in the level's pixels, all of one size. Pixels off the image are
            padded.

        Returns
        -------
        (N, C, height, width): integers of 8 or 16 bits over their full range, or floating point.
        """
        ...


class HasArea(Protocol):
    """What a model asks of the mask of an image; `nested_ats.Mask` is one."""

    def area(self, boxes_l0: Tensor) -> Tensor:
        """Area of the mask in (..., 4) boxes; see `nested_ats.Mask.area`."""
        ...


class ArrayImage:
    """An image in memory, with levels by 2x2 mean (an odd edge averages the pixels it has).

    Parameters
    ----------
    pixels
        (C, H, W), integers of up to 32 bits over their full range, or floating point.
    levels
        Number of levels, the first being `pixels` itself.
    background
        Value of pixels off the image, on the scale of `scale_pixels`.
    mask
        Where there is something to see, for models with a ``prior``.

    Raises
    ------
    ValueError
        The pixels are integers of 64 bits.
    """

    def __init__(
        self, pixels: Tensor, *, levels: int = 1, background: float = 0.0, mask: HasArea | None = None
    ) -> None:
        pixels = scale_pixels(pixels)
        self._background = background
        self.mask: HasArea | None = mask
        self._levels = [pixels]
        for _ in range(levels - 1):
            coarser = functional.avg_pool2d(self._levels[-1], 2, ceil_mode=True, count_include_pad=False)
            self._levels.append(coarser)

    @property
    def shapes(self) -> Sequence[tuple[int, int]]:
        """Height and width of every level."""
        return [(level.shape[-2], level.shape[-1]) for level in self._levels]

    @property
    def downsamples(self) -> Sequence[float]:
        """1, 2, 4, ..."""
        return [float(2**i) for i in range(len(self._levels))]

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """(N, C, h, w) of (N, 4) boxes; see `Image.read`."""
        return torch.stack([self._box(self._levels[level], *box) for box in boxes.tolist()])

    def _box(self, pixels: Tensor, y: int, x: int, h: int, w: int) -> Tensor:
        height, width = pixels.shape[-2:]
        out = pixels.new_full((pixels.shape[0], h, w), self._background)
        top, left = max(y, 0), max(x, 0)
        bottom, right = max(min(y + h, height), top), max(min(x + w, width), left)
        out[:, top - y : bottom - y, left - x : right - x] = pixels[:, top:bottom, left:right]
        return out


def scale_pixels(pixels: Tensor) -> Tensor:
    """Convert pixels to floating point: integers are divided by the largest value of their type.

    Raises
    ------
    ValueError
        The pixels are integers of 64 bits, or no numbers.
    """
    if pixels.is_floating_point():
        return pixels
    if pixels.dtype not in _INTEGERS:
        raise ValueError(f"pixels must be integers of 8, 16 or 32 bits, or floating point, not {pixels.dtype}")
    return pixels.float() / float(torch.iinfo(pixels.dtype).max)


def find_level(image: Image, downsample: float) -> int:
    """Find the level with a downsample; where several have it nearly, as in a small image, the nearest.

    Raises
    ------
    ValueError
        No level has the downsample to within half a pixel over the whole level.
    """
    levels = enumerate(zip(image.downsamples, image.shapes, strict=True))
    near = [level for level, (have, shape) in levels if abs(have / downsample - 1) * max(shape) < 0.5]
    if near:
        return min(near, key=lambda level: abs(image.downsamples[level] - downsample))
    there = ", ".join(f"{d:g}" for d in image.downsamples)
    raise ValueError(f"the image has no level at downsample {downsample:g} (it has {there})")


def batch_reads(images: Sequence[Image], downsample: float, boxes: Tensor) -> list[Read]:
    """List the reads of `read_batch`, one for each image, with its parameters and errors."""
    levels = [find_level(image, downsample) for image in images]
    return [partial(image.read, *rest) for image, *rest in zip(images, levels, boxes.cpu(), strict=True)]


def read_batch(images: Sequence[Image], downsample: float, boxes: Tensor) -> Tensor:
    """Read the same number of equal boxes from every image.

    Parameters
    ----------
    images
        The B images.
    downsample
        The downsample of the level to read.
    boxes
        (B, N, 4) int64: y, x, height, width.

    Returns
    -------
    (B, N, C, height, width), of the images' own type.

    Raises
    ------
    ValueError
        An image has no level at the downsample.
    """
    return torch.stack([read() for read in batch_reads(images, downsample, boxes)])
