"""Random changes of drawn patches, which a training sees cut out, turned and stretched in one way alone without them.

Shape letters: B batch, n drawn patches, C channels, H W pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from nested_ats.sampling import fold_in, uniform

_JITTER, _WARP = 1000, 1001  # streams of a draw's keys; the first ones are those of the levels


class PatchAugment(NamedTuple):
    """How much each drawn patch is changed at random, by the draw's key alone; by default not at all.

    F_hat is then unbiased for the mean over such changes.

    Attributes
    ----------
    jitter
        The largest shift along each axis, as a share of the patch's side.
    warp
        The largest change of each of the four entries of the patch's linear map, which turns, stretches and shears it
        about its centre: 0.15 is up to 8.5 degrees and 15 % of a side. The patch is read with so much more around it.
    """

    jitter: float = 0.0
    warp: float = 0.0

    def move(self, centers_l0: Tensor, side_l0: float, keys: Tensor) -> Tensor:
        """Centres (B, n, 2) of patches with sides of so many level-0 pixels, each moved by the jitter."""
        if not self.jitter:
            return centers_l0
        places = _within_one(keys, _JITTER, centers_l0.shape)
        return centers_l0 + places * self.jitter * side_l0

    def side(self, side: int) -> int:
        """Side of the patches to read for warped ones of `side` pixels to lie within; even where that is."""
        return side + 2 * math.ceil(self.warp * side)

    def warped(self, patches: Tensor, side: int, keys: Tensor) -> Tensor:
        """Patches (B n, C, H, W) of `side(side)` pixels -> (B n, C, side, side), each with a map of its own."""
        drawn, wide = len(patches) // len(keys), patches.shape[-1]
        linear = torch.eye(2) + self.warp * _within_one(keys, _WARP, (len(keys), drawn, 2, 2)).float()
        maps = functional.pad(linear * (side / wide), (0, 1)).flatten(0, 1).to(patches)
        grid = functional.affine_grid(maps, [len(maps), patches.shape[1], side, side], align_corners=False)
        return functional.grid_sample(patches, grid, padding_mode="border", align_corners=False)


AS_THEY_ARE = PatchAugment()


def _within_one(keys: Tensor, stream: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers between -1 and 1 of a (B, ...) shape, those of a row by its key."""
    return 2 * uniform(fold_in(keys.cpu(), stream), math.prod(shape[1:])).reshape(shape) - 1
