"""Attention networks: from a view of an image to one logit per cell of a map.

Every convolution is valid and the network reads `margin` pixels beyond the view on each side, so that the cells
tile the view exactly and a cell's logit depends on the pixels around it alone, not on where the view ends.

Shape letters: B batch, C channels, H W pixels of the view without its margin, s stride.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class AttentionNetwork(nn.Module):
    """A few 3x3 convolutions with ReLU, max-pooling, and a linear map to logits (equation 18; appendix H).

    The authors' code has a fourth 3x3 convolution as the map to logits, before the max-pooling; here it is 1x1 and
    comes after, so that a cell costs one product and sees one pixel less around it.

    Parameters
    ----------
    in_channels
        C of the views.
    channels
        Output channels of each 3x3 convolution; the paper has (8, 8) in H.1 and H.2, (8, 16, 32) in H.3.
    stride
        Pixels of the view per cell, the pool size; the paper has 1 and 8.
    silent
        Start with a map of zeros, as a network that refines a parent's map must.

    Attributes
    ----------
    margin
        Pixels read beyond the view on each side.
    """

    def __init__(self, *, in_channels: int, channels: Sequence[int], stride: int, silent: bool = False) -> None:
        super().__init__()
        self.stride = stride
        self.margin = len(channels)
        layers: list[nn.Module] = []
        for before, after in zip([in_channels, *channels[:-1]], channels, strict=True):
            layers += [nn.Conv2d(before, after, 3), nn.ReLU()]
        if stride > 1:
            layers.append(nn.MaxPool2d(stride))
        # A bias would not change the softmax, and an optimizer would let it drift on rounding noise.
        last = nn.Conv2d(channels[-1], 1, 1, bias=False)
        if silent:
            nn.init.zeros_(last.weight)
        self.layers = nn.Sequential(*layers, last)

    def forward(self, view: Tensor) -> Tensor:
        """(B, C, H + 2 margin, W + 2 margin) with H, W multiples of the stride -> (B, H / s, W / s) logits."""
        logits: Tensor = self.layers(view)
        return logits.squeeze(1)
