"""Our own feature networks, from a patch to a feature vector (paper, appendix H), and the registry that names them.

None of them has batch statistics: a patch's feature must not depend on the patches it is batched with, or N workers
would not train the model that one does. Where the paper's networks have batch normalisation, ours have group
normalisation. `mobilenet_v2` and encoders from elsewhere (`nested_ats.networks.backbones`) may have it. Frozen or
trained in part (`nested_ats.networks.trainable`) they normalise by the statistics of their weights and are safe;
trained whole they are refused on several workers (`pipeline.training.step`).

Shape letters: P patches, C channels, H W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from nested_ats.networks.mobilenet import MobileNetV2Encoder

GIVEN = "given"  # the encoder of features that others have extracted


class _Encoder(nn.Module):
    """Runs `layers` one after the other."""

    features: int
    layers: nn.Sequential

    def forward(self, patches: Tensor) -> Tensor:
        """(P, C, H, W) -> (P, D)."""
        features: Tensor = self.layers(patches)
        return features


class LeNetEncoder(_Encoder):
    """Convolutions in the manner of LeNet-1 with a global max-pool at the end (appendix H.1); D = `channels`.

    H and W are at least 24.
    """

    def __init__(self, *, in_channels: int, channels: int = 32) -> None:
        super().__init__()
        self.features = channels
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels // 2, 5),
            nn.MaxPool2d(2),  # before the ReLU, with which it commutes, for a quarter of the work
            nn.ReLU(),
            nn.Conv2d(channels // 2, channels, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3),
            nn.AdaptiveMaxPool2d(1),
            nn.ReLU(),
            nn.Flatten(),
        )


class IlseEncoder(_Encoder):
    """The network of Ilse et al. (2018) for colon cancer patches (appendix H.2; their patches have 27 pixels).

    Their table, where conv(k, s, p)-n has n filters of k pixels with stride s and padding p: conv(4,1,0)-36 + ReLU,
    maxpool(2,2), conv(3,1,0)-48 + ReLU, maxpool(2,2), fc-512 + ReLU, dropout, fc-512 + ReLU, dropout. What follows
    there, mil-attention-128 and fc-1 + sigm, is `DeepMIL` here.

    Parameters
    ----------
    in_channels
        C.
    patch_size
        H = W; the linear layers are made for this size.
    features
        D, the width of both linear layers; theirs is 512.
    dropout
        Probability after each linear layer. Public versions of theirs have 0.5 or 0.2; ours has none by default,
        since what is dropped depends on the batch and so on the number of workers.
    """

    def __init__(self, *, in_channels: int, patch_size: int = 27, features: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = features
        side = ((patch_size - 3) // 2 - 2) // 2
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 36, 4),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(36, 48, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * side * side, features),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(features, features),
            nn.ReLU(),
            nn.Dropout(dropout),
        )


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
        self.stride = stride
        self.shortcut = nn.Identity() if same else nn.Conv2d(before, after, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # A 1x1 convolution of stride 2 by hand: torch 2.13's own, channels last with 8 channels on a CPU, writes past
        # its memory in the backward pass.
        return functional.relu(self.layers(x) + self.shortcut(x[..., :: self.stride, :: self.stride]))


class ResNetEncoder(_Encoder):
    """A ResNet with group normalisation and a global mean at the end; D = `channels` times the last width.

    Parameters
    ----------
    in_channels
        C.
    channels
        Output channels of the first convolution, a multiple of 8.
    stem, stem_stride
        Kernel and stride of the first convolution.
    widths, strides
        Width, in `channels`, and stride of each residual block of two 3x3 convolutions.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        channels: int = 32,
        stem: int = 5,
        stem_stride: int = 2,
        widths: Sequence[int] = (1, 2, 4),
        strides: Sequence[int] = (1, 2, 2),
    ) -> None:
        super().__init__()
        self.features = channels * widths[-1]
        before = [channels * width for width in (1, *widths[:-1])]
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, channels, stem, stride=stem_stride, padding=stem // 2, bias=False),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            *(_ResidualBlock(b, channels * w, s) for b, w, s in zip(before, widths, strides, strict=True)),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )


class GivenFeatures(_Encoder):
    """Takes features that others have extracted, (P, D, 1, 1), for what they are; or through one trained layer.

    Parameters
    ----------
    in_channels
        D of what is given.
    width
        None, or the width of a linear layer with ReLU, as CLAM's first one is (Lu et al. 2021; theirs has 512).
    of
        Which encoder has made them. It changes nothing here; whoever reads the features compares it with the files'.
    """

    def __init__(self, *, in_channels: int, width: int | None = None, of: str = "") -> None:
        super().__init__()
        del of
        self.features = width or in_channels
        layer = [] if width is None else [nn.Linear(in_channels, width), nn.ReLU()]
        self.layers = nn.Sequential(nn.Flatten(), *layer)


class Builtin(NamedTuple):
    """One of our own encoders.

    Attributes
    ----------
    build
        Is called with (in_channels, channels, patch_size, options); patch_size is 0 if sizes vary.
    smallest_patch
        Least side of a patch in pixels.
    channel_multiple
        ModelConfig.features must be a multiple of this.
    any_size
        Whether one network takes images of any size.
    imagenet
        Whether its published weights are for pixels normalised as ImageNet's.
    raw
        Whether what it takes is no pixels, and stays as it is.
    """

    build: Callable[[int, int, int, Mapping[str, Any]], nn.Module]
    smallest_patch: int
    channel_multiple: int = 1
    any_size: bool = True
    imagenet: bool = False
    raw: bool = False


def _resnet(**shape: Any) -> Builtin:
    return Builtin(lambda c, n, _, o: ResNetEncoder(in_channels=c, channels=n, **{**shape, **o}), 8, 8)


# The layer that the head adds is counted, as in He et al. (2016): resnet and resnet8 have 7 3x3 (or 5x5)
# convolutions on their longest path, resnet16 has 15.
ENCODERS: dict[str, Builtin] = {
    "lenet": Builtin(lambda c, n, _, o: LeNetEncoder(in_channels=c, channels=n, **o), 24, 2),
    "ilse": Builtin(lambda c, _, p, o: IlseEncoder(in_channels=c, patch_size=p, **o), 12, any_size=False),
    # Ours: as deep and with the same total stride of 8 as the paper's, but it strides in a 5x5 stem, which makes it
    # four times cheaper there, and doubles its width: D = 4 channels.
    "resnet": _resnet(),
    # Appendix H.3: 8 layers of 32 channels with strides 1, 2, 2, 2, as in the authors' code, but for group
    # normalisation after the convolutions where they have batch normalisation before them.
    "resnet8": _resnet(stem=3, stem_stride=1, widths=(1, 1, 1), strides=(2, 2, 2)),
    # The CNN baseline of H.1 and H.3: starts with 32 channels, doubled after every two residual blocks. The strides
    # are not in the paper: here the image is halved by the stem and wherever the width doubles.
    "resnet16": _resnet(stem=3, stem_stride=2, widths=(1, 1, 2, 2, 4, 4, 8), strides=(1, 1, 2, 1, 2, 1, 2)),
    GIVEN: Builtin(lambda c, _n, _, o: GivenFeatures(in_channels=c, **o), 1, any_size=False, raw=True),
    "mobilenet_v2": Builtin(lambda c, _n, _, o: MobileNetV2Encoder(in_channels=c, **o), 32, imagenet=True),
}
