"""Jitter of stains: the amounts of hematoxylin, eosin and DAB in a slide are changed at random (Tellez et al., 2018).

By Ruifrok and Johnston's colour deconvolution a pixel's optical density is a mixture of the densities of three
stains. Each amount is scaled and shifted, and the mixture is made anew. As everything is linear in density, this is
one 3 x 3 matrix and one shift for a whole slide, and costs a logarithm, a power and a small product a pixel.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Optical densities in red, green and blue of each stain, of unit length: those of scikit-image's `rgb_from_hed`.
_STAINS = torch.tensor([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]], dtype=torch.float64)
_LEAST = 1e-6  # of light, as there
_SHIFT = 0.2  # of optical density (natural), that a full strength shifts an amount by; pale tissue has about as much


class StainJitter:
    """A change of stains, the same for all pixels of a slide.

    Parameters
    ----------
    strength
        The largest relative change of an amount, from 0 to 1; its largest shift is a fifth of that, in density.
    draws
        Six numbers from 0 to 1 that decide it: three scales, three shifts.
    """

    def __init__(self, strength: float, draws: list[float]) -> None:
        change = strength * (2 * torch.tensor(draws, dtype=torch.float64) - 1)
        # Amounts are density @ inverse; scaled, shifted, and made density again.
        self.matrix = (torch.linalg.inv(_STAINS) @ torch.diag(1 + change[:3]) @ _STAINS).float()
        self.shift = (change[3:] @ _STAINS * _SHIFT).float()

    def __call__(self, pixels: Tensor) -> Tensor:
        """Change (N, 3, h, w) shares of the largest value, red first, into the same, from 0 to 1."""
        density = -pixels.clamp(_LEAST, 1).log()
        changed = torch.einsum("nchw,cd->ndhw", density, self.matrix) + self.shift[:, None, None]
        return (-changed).exp().clamp(0, 1)
