"""Feature networks: from a patch to a feature vector (paper, appendix H).

None has batch statistics: a patch's feature must not depend on the patches it is batched with, or N workers
would not train the model that one does.

Shape letters: P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class LeNetEncoder(nn.Module):
    """Convolutions in the manner of LeNet-1 with a global max-pool at the end (appendix H.1); D = `channels`."""

    smallest_patch = 24  # pixels
    channel_multiple = 2

    def __init__(self, *, in_channels: int, channels: int = 32) -> None:
        super().__init__()
        self.features = channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 5),
            nn.MaxPool2d(2),  # before the ReLU, which it commutes with: a quarter of the work
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3),
            nn.AdaptiveMaxPool2d(1),
            nn.ReLU(),
            nn.Flatten(),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W), H and W >= 24 -> (P, D)."""
        features: Tensor = self.layers(patches)
        return features


class _ResidualBlock(nn.Module):
    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(8, after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1, bias=False),
            nn.GroupNorm(8, after),
        )
        same = before == after and stride == 1
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + self.shortcut(x))


class ResNetEncoder(nn.Module):
    """A ResNet of 8 layers (appendix H.3) with group normalisation; D = 4 `channels`, `channels` % 8 == 0."""

    smallest_patch = 8  # pixels
    channel_multiple = 8

    def __init__(self, *, in_channels: int, channels: int = 32) -> None:
        super().__init__()
        self.features = 4 * channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, 5, stride=2, padding=2, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            _ResidualBlock(channels, channels, 1),
            _ResidualBlock(channels, 2 * channels, 2),
            _ResidualBlock(2 * channels, 4 * channels, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, D)."""
        features: Tensor = self.layers(patches)
        return features


ENCODERS: dict[str, type[LeNetEncoder | ResNetEncoder]] = {
    "lenet": LeNetEncoder,
    "resnet": ResNetEncoder,
}
