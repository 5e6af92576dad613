"""Where there can be anything to see: tissue on a slide, the recorded area of a scene, or what a user has outlined.

A cell of an attention map whose patch would show too little of it gets the logit -inf, at every level: it is never
drawn, and none of the budget goes to empty glass. An image brings its `Mask` with it, of any resolution.

Shape letters: B images, H W pixels of a mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

from nested_ats.images import HasArea, Image

Prior = Literal["none", "tissue", "valid", "column"]
PRIORS: tuple[Prior, ...] = get_args(Prior)

_ROUNDING = 1e-6  # of sums of areas


class Mask:
    """A binary image over the whole of an image; the area of it in a box is exact, at the same cost for every box.

    Parameters
    ----------
    pixels
        (H, W) bool; the first pixel begins at the image's first corner.
    pitch_yx
        Height and width of a pixel of the mask in level-0 pixels of the image.
    """

    def __init__(self, pixels: Tensor, pitch_yx: tuple[float, float]) -> None:
        self.pixels, self.pitch_yx = pixels, pitch_yx
        sums = pixels.double().cumsum(0).cumsum(1)
        self._sums = functional.pad(sums, (1, 0, 1, 0))[None, None]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return self.pixels.nbytes + self._sums.nbytes

    def area(self, boxes_l0: Tensor) -> Tensor:
        """Area of the mask in boxes: (..., 4) y0, x0, y1, x1 in level-0 pixels -> (...) in squares of them.

        Off the mask there is nothing.
        """
        # The sums of all pixels above and left of a point are bilinear between the corners of pixels.
        y0, x0, y1, x1 = boxes_l0.double().unbind(-1)
        corners = torch.stack([torch.stack([y, x], -1) for y in (y0, y1) for x in (x0, x1)])
        side = torch.tensor(self.pixels.shape, dtype=torch.float64)
        points = corners / torch.tensor(self.pitch_yx, dtype=torch.float64) / side * 2 - 1
        flat = points.flip(-1).reshape(1, 1, -1, 2)
        found = functional.grid_sample(self._sums, flat, mode="bilinear", padding_mode="border", align_corners=True)
        top_left, top_right, low_left, low_right = found.reshape(corners.shape[:-1])
        pitch_y, pitch_x = self.pitch_yx
        area: Tensor = (low_right - low_left - top_right + top_left) * (pitch_y * pitch_x)
        return area


def worth_seeing(images: Sequence[Image], centers_l0: Tensor, reach_l0: float, least_l0: float) -> Tensor:
    """Whether enough of each image's mask lies around points.

    Parameters
    ----------
    images
        B of them, each with a ``mask``.
    centers_l0
        (B, ..., 2) float64, y and x in level-0 pixels.
    reach_l0
        Half the side of the box that is looked at around each, in level-0 pixels.
    least_l0
        Area of the mask that the box needs, in squares of level-0 pixels; some is always needed.

    Returns
    -------
    (B, ...) bool

    Raises
    ------
    ValueError
        An image has no mask.
    """
    boxes = torch.cat([centers_l0 - reach_l0, centers_l0 + reach_l0], -1)
    found = []
    for image, own in zip(images, boxes, strict=True):
        mask: HasArea | None = getattr(image, "mask", None)
        if mask is None:
            raise ValueError("the model's prior needs an image's mask, and this image has none; set its mask")
        area = mask.area(own)
        found.append((area >= least_l0 * (1 - _ROUNDING)) & (area > _ROUNDING))
    return torch.stack(found)
