"""MobileNetV2 (Sandler et al. 2018) without its classifier, with the names that torchvision's weights have.

The network is small enough for a CPU: frozen, with ImageNet's weights, it is the one to try first on a new kind of
image. It is written out here because neither torchvision nor timm is a dependency.

Shape letters: P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

from torch import Tensor, nn

# Expansion, channels, repeats and stride of the first of each group of blocks: table 2 of the paper.
_BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _convolution(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU6(),
    )


class _Block(nn.Module):
    """Inverted residual: expand, filter by channel, project."""

    def __init__(self, before: int, after: int, expansion: int, stride: int) -> None:
        super().__init__()
        inner = before * expansion
        self.same = stride == 1 and before == after
        self.conv = nn.Sequential(
            *([_convolution(before, inner, 1)] if expansion > 1 else []),
            _convolution(inner, inner, 3, stride, groups=inner),
            nn.Conv2d(inner, after, 1, bias=False),
            nn.BatchNorm2d(after),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.same else y


class MobileNetV2Encoder(nn.Module):
    """(P, C, H, W), H and W >= 32 -> (P, 1280).

    It has batch normalisation, which uses the statistics of its weights where the network is frozen.

    Parameters
    ----------
    in_channels
        C.
    """

    def __init__(self, *, in_channels: int) -> None:
        super().__init__()
        self.channels = 1280
        layers: list[nn.Module] = [_convolution(in_channels, 32, 3, 2)]
        before = 32
        for expansion, after, repeats, stride in _BLOCKS:
            for number in range(repeats):
                layers.append(_Block(before, after, expansion, stride if number == 0 else 1))
                before = after
        layers.append(_convolution(before, self.channels, 1))
        self.features = nn.Sequential(*layers)

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, 1280)."""
        pooled: Tensor = self.features(patches)
        return pooled.mean((-2, -1))
