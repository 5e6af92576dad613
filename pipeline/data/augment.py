"""Augmentation changes training images at random, anew in every epoch (paper, sections 4.3 and 4.4).

An image is not decoded to be changed. `AugmentedImage` stands before it and maps the boxes that the model asks for,
which keeps the cost that of the pixels read. All levels show one and the same change exactly, since everything is
moved by whole pixels of the coarsest level that the model reads, whatever the image's size.

Shape letters: N boxes, C channels, h w pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from nested_ats import PatchAugment
from nested_ats.images import HasArea, Image, find_level
from nested_ats.sampling import uniform
from pipeline.data.stain import StainJitter

if TYPE_CHECKING:
    from pipeline.sections import AugmentConfig


def of_patches(config: AugmentConfig) -> PatchAugment:
    """What of a configuration's changes is of each drawn patch; the rest is of the image (`AugmentedImage`)."""
    return PatchAugment(config.jitter, config.warp)


class _MovedMask(NamedTuple):
    """A mask behind the symmetry and the translation of an image; see `nested_ats.Mask`."""

    mask: HasArea
    shift: Tensor  # (2,) level-0 pixels
    mirrored: Tensor  # (2,) bool
    extent: Tensor  # (2,) level-0 pixels, the size of what is mirrored
    transposed: bool

    def area(self, boxes_l0: Tensor) -> Tensor:
        """Area of the mask in (..., 4) boxes of the changed image."""
        starts, ends = boxes_l0[..., :2] - self.shift, boxes_l0[..., 2:] - self.shift
        edges = [
            torch.where(self.mirrored, self.extent - far, near) for near, far in ((starts, ends), (ends, starts))
        ]
        return self.mask.area(torch.cat([edge.flip(-1) if self.transposed else edge for edge in edges], -1))


class AugmentedImage:
    """An image seen after a symmetry of the square, a translation, and changes of stains, contrast and brightness.

    The image lies on a plane of background, as it does for boxes that leave it. The plane may be transposed,
    mirrored top to bottom, mirrored left to right, and moved, while the frame that `shapes` tells stays where it
    was. What a translation moves out of the frame is still there for boxes that leave it, but under no cell of an
    attention map. A mirrored side is rounded up to whole pixels of the coarsest level read, so that the levels'
    pixels still cover each other: the image then begins with less than one such pixel of background.

    A value, of which x is the share of the largest of its type (1 for floats), becomes
    ``1/2 + contrast * (x - 1/2) + brightness`` once stains are changed (`pipeline.data.stain`), and is rounded and
    clipped where the type is one of integers. The background is changed like the image that it stands around, as its
    edge would show otherwise.

    Parameters
    ----------
    image
        The image to augment. Only its levels down to `downsample` are shown.
    config
        How much may change.
    key
        A random key of 64 bits: equal keys change equal images equally.
    downsample
        The downsample of the coarsest level that the model reads. A translation is a whole number of its pixels (none
        where the largest is less than one); a level whose downsample does not divide this one rounds it to a pixel.

    Raises
    ------
    ValueError
        The image has no such level.

    Features of its patches may be kept (`nested_ats.FeatureStore`) where it is the image itself or one of the 8
    symmetries of the image, each of which is kept apart.
    """

    def __init__(self, image: Image, config: AugmentConfig, key: int, *, downsample: float) -> None:
        self._image = image
        coarsest = find_level(image, downsample)
        symmetry, *rest = uniform(torch.tensor([key]), 11)[0].tolist()
        shifts, (contrast, brightness), stains = rest[:2], rest[2:4], rest[4:]
        turn = int(8 * symmetry) if config.flip else 0
        self._transposed, self._mirrored = bool(turn & 1), torch.tensor([bool(turn & 2), bool(turn & 4)])
        self._contrast: float = 1 + config.contrast * (2 * contrast - 1)
        self._brightness: float = config.brightness * (2 * brightness - 1)
        self._stains = StainJitter(config.hed, stains) if config.hed else None
        self.downsamples: Sequence[float] = list(image.downsamples)[: coarsest + 1]
        shapes = torch.tensor(list(image.shapes)[: coarsest + 1])  # (levels, 2)
        if self._transposed:
            shapes = shapes.flip(-1)
        ratios = (self.downsamples[-1] / torch.tensor(self.downsamples, dtype=torch.float64))[:, None]
        most = (config.translation * shapes[-1].double()).long()
        steps = (torch.tensor(shifts, dtype=torch.float64) * (2 * most + 1)).long() - most
        self._shifts = (steps * ratios).round().long()  # (levels, 2)
        self._extents = (shapes[-1] * ratios).round().long()  # (levels, 2), the size of what is mirrored
        shown = torch.where(self._mirrored, self._extents, shapes).tolist()
        self.shapes: Sequence[tuple[int, int]] = [(height, width) for height, width in shown]
        self._turn = turn
        self._changes_patches = any(of_patches(config))  # which then hardly come again

    @property
    def identity(self) -> str | None:
        """The identity of this symmetry of the image, if that has one; None where pixels or patches are changed."""
        identity: str | None = getattr(self._image, "identity", None)
        if identity is None or self._shifts.any() or self._changes_values or self._changes_patches:
            return None
        return f"{identity}/{self._turn}/{self._extents.tolist()}" if self._turn else identity

    @property
    def mask(self) -> _MovedMask | None:
        """The image's mask, moved like the image."""
        mask: HasArea | None = getattr(self._image, "mask", None)
        return (
            None
            if mask is None
            else _MovedMask(mask, self._shifts[0], self._mirrored, self._extents[0], self._transposed)
        )

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes as (N, C, h, w) of the image's own type; see `nested_ats.Image.read`."""
        starts, sizes = boxes[:, :2] - self._shifts[level], boxes[:, 2:]
        starts = torch.where(self._mirrored, self._extents[level] - starts - sizes, starts)
        if self._transposed:
            starts, sizes = starts.flip(-1), sizes.flip(-1)
        pixels = self._image.read(level, torch.cat([starts, sizes], -1))
        if self._transposed:
            pixels = pixels.mT
        if self._mirrored.any():
            bits = pixels.view(torch.int16) if pixels.dtype == torch.uint16 else pixels  # torch flips no uint16
            pixels = bits.flip([axis - 2 for axis in range(2) if self._mirrored[axis]]).view(pixels.dtype)
        return self._adjust(pixels)

    @property
    def _changes_values(self) -> bool:
        return self._contrast != 1 or self._brightness != 0 or self._stains is not None

    def _adjust(self, pixels: Tensor) -> Tensor:
        if not self._changes_values:
            return pixels
        limits = None if pixels.is_floating_point() else torch.iinfo(pixels.dtype)
        largest = float(limits.max) if limits else 1.0
        values = pixels if limits is None else pixels.float()
        if self._stains is not None:
            values = (self._stains(values / largest) * largest).to(values.dtype)
        changed = values * self._contrast + ((1 - self._contrast) / 2 + self._brightness) * largest
        return changed if limits is None else changed.round().clamp(limits.min, limits.max).to(pixels.dtype)
