"""Several images as one, so that a model attends over all of them and draws where it matters, whichever the image.

Images lie one below the other with gaps between, wide enough that nothing that is read around a cell of one reaches
into another. The gaps are under no mask, so a model with a ``prior`` never draws there, and its cost depends on its
budget and on what it looks at first, not on the number of images.

Shape letters: N boxes, C channels, H W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nested_ats.config import ModelConfig, PatchConfig
from nested_ats.images import HasArea, Image, find_level, scale_pixels


class Mosaic:
    """Images of one case as one `Image`.

    Parameters
    ----------
    images
        At least one; each has the levels that the model reads.
    config
        The configuration of the model.
    background
        The value of pixels between images, on the scale of `scale_pixels`.

    Attributes
    ----------
    corners_l0 : (images, 2) int64, the first pixel of each image, y and x in level-0 pixels of the mosaic
    sizes_l0 : (images, 2) int64, height and width of each

    Raises
    ------
    ValueError
        An image lacks a level that the model reads.
    """

    def __init__(self, images: Sequence[Image], config: PatchConfig, *, background: float = 0.0) -> None:
        self._images, self._background = list(images), background
        self.downsamples: Sequence[float] = sorted({1.0, *config.downsamples})
        self._levels = [[find_level(image, each) for each in self.downsamples] for image in images]
        self.sizes_l0 = torch.tensor([image.shapes[0] for image in images])
        unit, gap = _unit_and_gap(config)
        steps = [math.ceil((height + gap) / unit) * unit for height, _ in self.sizes_l0.tolist()]
        tops = [round(sum(steps[:number])) for number in range(len(steps))]
        self.corners_l0 = torch.tensor([[top, 0] for top in tops])
        height, width = sum(steps), math.ceil(int(self.sizes_l0[:, 1].max()) / unit) * unit
        self.shapes: Sequence[tuple[int, int]] = [
            (math.ceil(height / each), math.ceil(width / each)) for each in self.downsamples
        ]

    @property
    def mask(self) -> _MosaicMask:
        """The masks of all images, or all of an image that has none; gaps are under none."""
        masks = [getattr(image, "mask", None) for image in self._images]
        return _MosaicMask(masks, self.corners_l0, self.sizes_l0)

    def read(self, level: int, boxes: Tensor) -> Tensor:
        """Read boxes as (N, C, h, w); see `Image.read`. They are floating point where the types of images differ."""
        corners = self._corners(level)
        ends = corners + torch.tensor(
            [image.shapes[own[level]] for image, own in zip(self._images, self._levels, strict=True)]
        )
        touched = (boxes[:, None, :2] < ends) & (boxes[:, None, :2] + boxes[:, None, 2:] > corners)  # (N, images, 2)
        touches = touched.all(-1)
        alone = touches.sum(-1) <= 1
        owner = torch.where(touches.any(-1), touches.long().argmax(-1), 0)  # of gaps any image reads the background
        parts: dict[int, Tensor] = {}
        for number in sorted(set(owner[alone].tolist())):
            rows = (alone & (owner == number)).nonzero().flatten()
            parts |= dict(zip(rows.tolist(), self._read(number, level, boxes[rows], corners), strict=True))
        for row in (~alone).nonzero().flatten().tolist():
            parts[row] = self._paste(level, boxes[row], touches[row], corners, ends)
        return torch.stack(_alike([parts[row] for row in range(len(boxes))]))

    def _paste(self, level: int, box: Tensor, touches: Tensor, corners: Tensor, ends: Tensor) -> Tensor:
        """Read a box that several images share, (C, h, w)."""
        starts, pieces = [], []
        for number in touches.nonzero().flatten().tolist():
            start = torch.maximum(box[:2], corners[number])
            end = torch.minimum(box[:2] + box[2:], ends[number])
            starts.append((start - box[:2]).tolist())
            pieces.append(self._read(number, level, torch.cat([start, end - start])[None], corners)[0])
        pieces = _alike(pieces)
        height, width = box[2:].tolist()
        pasted = pieces[0].new_full((len(pieces[0]), height, width), self._fill(pieces[0]))
        for (y, x), piece in zip(starts, pieces, strict=True):
            pasted[:, y : y + piece.shape[1], x : x + piece.shape[2]] = piece
        return pasted

    def _read(self, number: int, level: int, boxes: Tensor, corners: Tensor) -> Tensor:
        moved = torch.cat([boxes[:, :2] - corners[number], boxes[:, 2:]], -1)
        return self._images[number].read(self._levels[number][level], moved)

    def _corners(self, level: int) -> Tensor:
        """The first pixel of each image in pixels of a level, (images, 2)."""
        return (self.corners_l0 / self.downsamples[level]).round().long()

    def _fill(self, like: Tensor) -> float:
        return self._background if like.is_floating_point() else round(self._background * torch.iinfo(like.dtype).max)


class _MosaicMask:
    """The masks of images at their places."""

    def __init__(self, masks: Sequence[HasArea | None], corners_l0: Tensor, sizes_l0: Tensor) -> None:
        self._masks, self._corners, self._sizes = masks, corners_l0.double(), sizes_l0.double()

    def area(self, boxes_l0: Tensor) -> Tensor:
        """Area of the masks in (..., 4) boxes; see `nested_ats.Mask.area`."""
        total = boxes_l0.new_zeros(boxes_l0.shape[:-1], dtype=torch.float64)
        for mask, corner, size in zip(self._masks, self._corners, self._sizes, strict=True):
            own = boxes_l0.double() - corner.repeat(2)
            if mask is not None:
                total += mask.area(own)
            else:
                low, high = own[..., :2].clamp_min(0), own[..., 2:].minimum(size)
                total += (high - low).clamp_min(0).prod(-1)
        return total


def _unit_and_gap(config: PatchConfig) -> tuple[float, float]:
    """Level-0 pixels that images begin at multiples of, and those that are left between them, at least.

    What is read around a cell reaches beyond it by no more than the largest view, its margin, or a patch.
    """
    patch = config.patch_size * config.patch_downsample
    if not isinstance(config, ModelConfig):
        return max(config.cell_l0, *config.downsamples), patch
    views = [level.downsample * ((level.size or level.unit) + 2 * len(level.channels)) for level in config.levels]
    return config.levels[0].extent_l0, max(patch, *views)


def _alike(parts: Sequence[Tensor]) -> list[Tensor]:
    """Turn tensors to floating point where their types differ."""
    return [scale_pixels(part) for part in parts] if len({part.dtype for part in parts}) > 1 else list(parts)
